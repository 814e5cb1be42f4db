"""What `build_adapter` and `initialize` share: the run that both make, the data they read, and the report."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from quailora import ops
from quailora.adapters.targets import Target
from quailora.calibration.data import Calibration
from quailora.calibration.distributed import Processes
from quailora.errors import AdapterError, CalibrationError
from quailora.memory.budget import Meter
from quailora.memory.planner import Plan, make_plan
from quailora.memory.sizes import Base
from quailora.modeling.streamed_model import StreamedModel
from quailora.pipeline.depth import Depth, Restored
from quailora.pipeline.loop import Loop
from quailora.pipeline.quantize import QuantizeAndSolve
from quailora.pipeline.solved import Solved
from quailora.pipeline.stages import Stages
from quailora.quantization.protocol import QuantizedBase
from quailora.refinement.config import RefinementConfig
from quailora.reporting.markdown import count
from quailora.reporting.progress import Progress
from quailora.reporting.report import BlockReport, LayerReport, Report
from quailora.solvers.config import SolverConfig


@dataclass(frozen=True, eq=False)
class Run:
    """One run over a model.

    stream: the full-precision model; W comes in its dtype.
    targets, left: the linears to find factors for, and the other adapted modules with the reason for each.
    form: how the base is quantized.
    unadapted: the linears that no adapter is on and that are quantized all the same, where a base is written or blocks
        are refined.
    refinement: how blocks are refined; None does not.
    counted: what the plan counts with, if it is not `form`.
    quantized_inputs: whether linears are fitted on their inputs behind quantized layers; it takes `unadapted`.

    Raises CalibrationError where there is too little data to hold some out.
    """

    stream: StreamedModel
    targets: list[Target]
    left: dict[str, str]
    data: Calibration
    form: QuantizedBase
    solver: SolverConfig
    meter: Meter
    processes: Processes
    unadapted: Sequence[str] | None = None
    refinement: RefinementConfig | None = None
    counted: Base | None = None
    quantized_inputs: bool = False
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.refinement is not None and len(self.data) < 2 * self.processes.size:
            of_each = "" if self.processes.size == 1 else f" for each of {self.processes.size} processes"
            raise CalibrationError(
                f"refine (--refine) holds some of the data out, so it takes at least 2 sequences{of_each}: "
                f"{self.data.source} has {len(self.data)}; give more data, raise samples (--samples), or lower "
                "sequence_length (--sequence-length)"
            )

    @cached_property
    def stages(self) -> Stages:
        return Stages(self.stream.device)

    def plan(self, batch_size: int | None, *, timed: bool = False) -> Plan:
        """The fastest plan within the budget, the same on every process; if `timed`, with an estimate of the time.
        Raises BudgetError."""
        processes, meter = self.processes, self.meter
        plan = make_plan(
            self.stream,
            {target.name: target.rank for target in self.targets} | dict.fromkeys(self.unadapted or (), 0),
            self.counted or self.form,
            self.solver,
            samples=-(-len(self.data) // processes.size),
            sequence_length=self.data.longest,
            memory_budget=processes.minimum(meter.budget),
            host_memory_budget=processes.minimum(meter.host_budget),
            batch_size=batch_size,
            held=processes.maximum(meter.held()),
            refinement=self.refinement,
            quantized_inputs=self.quantized_inputs,
            timed=timed and processes.is_main,
        )
        meter.expect(plan.peak)
        return plan

    def solve(
        self,
        plan: Plan,
        initialize: QuantizeAndSolve,
        finish: Callable[[int, list[Solved], list[dict[int, int]], BlockReport | None], None],
        *,
        folder: Path,
        restore: Callable[[int, Mapping[str, nn.Module]], Mapping[str, Restored]] = lambda index, linears: {},
        finished: Collection[int] = (),
        known: Sequence[LayerReport] = (),
        shrunk: Mapping[int, int] | None = None,
        progress: bool = True,
    ) -> None:
        """Run the loop over all blocks but those in `finished`, whose rows of the report are `known`; see `Loop`, and
        `Depth` for `restore`."""
        with ExitStack() as stack:
            shown = progress and self.processes.is_main
            depth = None
            if self.refinement is not None or self.quantized_inputs:
                depth = Depth(self.refinement, self.quantized_inputs, self.solver.seed, self.processes, restore)
            bar = stack.enter_context(Progress(enabled=shown, finished=finished, layers=known, estimate=plan.seconds))
            stack.enter_context(self.meter)
            loop = Loop(
                model=self.stream,
                plan=plan,
                initialize=initialize,
                keep_q=self.unadapted is not None,
                finish=finish,
                processes=self.processes,
                progress=bar,
                stages=self.stages,
                folder=folder,
                trim=self.meter.trim,
                may_shrink=self.meter.config.batch_size is None,
                shrunk=dict(shrunk or {}),
                notes=self.notes,
                depth=depth,
            )
            targets = dict.fromkeys(self.unadapted or ()) | {target.name: target for target in self.targets}
            loop.run(targets, list(self.processes.shard(self.data).batches(plan.batch_size)), finished)

    def report(
        self,
        plan: Plan,
        layers: list[LayerReport],
        record: dict[str, Any],
        *notes: str,
        digests: Mapping[str, str] | None = None,
        blocks: Sequence[BlockReport] = (),
    ) -> Report:
        """What was done.

        digests: of quantized linears that no adapter is on.
        Raises AdapterError where no targeted linear received a token.
        """
        left = self.left | _unreached(self.targets, layers, self.stream)
        base = record["base"] | {"digests": {row.name: row.digest for row in layers} | dict(digests or {})}
        every = [*_notes(self.stream, self.data, layers), *self.notes, *_stopped(blocks), *_more_damped(layers)]
        every += [*(_on_full_inputs(layers) if self.quantized_inputs else []), *notes]
        figures = self.meter.figures(plan.peak)
        return Report(layers, left, every, record | {"base": base}, self.stages.seconds, figures, list(blocks))


def _stopped(blocks: Sequence[BlockReport]) -> list[str]:
    def kept(row: BlockReport) -> str:
        return f"those of step {row.steps}" if row.steps else "those found layer by layer"

    return [f"{row.name}: {row.stopped}, and its factors are {kept(row)}" for row in blocks if row.stopped]


def _unreached(targets: list[Target], layers: list[LayerReport], stream: StreamedModel) -> dict[str, str]:
    """The targets that no factors were found for, with why. Raises AdapterError where none were found at all."""
    solved = {row.name for row in layers}
    unreached = {target.name: _why_unreached(target.name, stream) for target in targets if target.name not in solved}
    if not layers:
        raise AdapterError(f"no targeted linear received calibration tokens: {enumerate_reasons(unreached)}")
    return unreached


def _why_unreached(name: str, stream: StreamedModel) -> str:
    module = dict(stream.model.named_modules()).get(name)
    if module is None:
        return f"{type(stream.model).__name__}, which {stream.checkpoint.name} is loaded as, has no such module"
    if module not in set(stream.decoder.modules()):
        return "outside the language model (such as a vision tower): calibration data is text, which does not reach it"
    if not any(name.startswith(f"{block.name}.") for block in stream.blocks):
        return "it stands outside the decoder's blocks"
    if "expert" in name:
        return "no calibration token reached it"
    return "the full-precision model did not call it in its forward pass, so its inputs are not known"


# A choice. Factors fit what is particular to their tokens too, the more so the fewer there are.
_TOKENS_PER_INPUT = 8


def _notes(stream: StreamedModel, data: Calibration, layers: list[LayerReport]) -> list[str]:
    """What is worth saying once: data that was passed over, or is little; that H took the slow path; and of fused
    expert weights, parameters of three dimensions which no base quantizes."""
    notes = data.notes()
    if few := [layer for layer in layers if layer.tokens < _TOKENS_PER_INPUT * layer.inputs]:
        least = min(few, key=lambda layer: layer.tokens / layer.inputs)
        notes.append(
            f"{count(len(few), 'linear')} saw fewer than {_TOKENS_PER_INPUT} tokens for each of their inputs "
            f"({least.name}: {count(least.tokens, 'token')}, {count(least.inputs, 'input')}): on other text more of "
            "their error is left than is reported here; more data would do better"
        )
    gram = ops.backends(stream.device)["gram_"]
    if gram.backend == "reference":
        notes.append(f"H was added up by plain PyTorch, not by the compiled extension: {gram.others['extension']}")
    fused = [
        (name, tuple(parameter.shape))
        for name, parameter in stream.model.named_parameters()
        if parameter.dim() == 3
        and any(name.startswith(f"{block.name}.") for block in stream.blocks)
        and not isinstance(stream.model.get_submodule(name.rpartition(".")[0]), nn.Conv1d)
    ]
    if fused:
        name, shape = fused[0]
        notes.append(
            f"{len(fused)} fused expert weights (the first is {name}, {shape}) stay in full precision in the quantized "
            "base: there is no error of theirs to undo, and they are left alone"
        )
    return notes


def _more_damped(layers: list[LayerReport]) -> list[str]:
    dampings = {layer.name: layer.more_damping for layer in layers if layer.more_damping is not None}
    if not dampings:
        return []
    name, damping = max(dampings.items(), key=lambda item: item[1])
    return [
        f"H of {count(len(dampings), 'linear')} is too poor for error feedback with the rounding damping asked for: up "
        f"to {damping:g} was used ({name}); more calibration data would help"
    ]


def _on_full_inputs(layers: list[LayerReport]) -> list[str]:
    names = [layer.name for layer in layers if not layer.quantized_inputs]
    if not names:
        return []
    return [
        f"{count(len(names), 'linear')} ({names[0]} for one) had to be fitted on inputs in the full-precision model: "
        "not every token gets there once, so there is no telling which inputs in the two models belong together"
    ]


def enumerate_reasons(reasons: dict[str, str]) -> str:
    if not reasons:
        return "the configuration matches no module"
    name, why = next(iter(reasons.items()))
    return f"{name}: {why}" + (f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else "")
