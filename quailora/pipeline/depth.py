"""Along the depth: what is done with a block on the hidden states of the quantized blocks before it.

Its linears are fitted on the inputs that they have there, and its factors are refined: one of the two, or both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from quailora import ops
from quailora.adapters.targets import Target
from quailora.calibration.block import BlockRun, DeployedLinear, in_place, to_device
from quailora.calibration.distributed import Processes
from quailora.calibration.hidden_states import HiddenStates
from quailora.calibration.inputs import InputPair, groups_by_input, receiving
from quailora.errors import CalibrationError
from quailora.modeling.blocks import linear_weight
from quailora.pipeline.solved import Solved
from quailora.quantization.protocol import QuantizedWeight
from quailora.refinement.blocks import refine_block
from quailora.refinement.config import RefinementConfig
from quailora.reporting.markdown import count
from quailora.reporting.report import BlockReport

# Q of a linear, and A and B as they were saved; None where no adapter is on it.
Restored = tuple[QuantizedWeight, Tensor | None, Tensor | None]


@dataclass(frozen=True, eq=False)
class Streams:
    """The hidden states of all batches.

    full: of the full-precision model. quantized: of the quantized one with its factors, where that is asked for.
    """

    full: HiddenStates
    quantized: HiddenStates | None = None

    @property
    def edits(self) -> int:
        return self.full.edits + (self.quantized.edits if self.quantized is not None else 0)

    def enter(self, number: int, hidden: Tensor) -> None:
        """Set what enters the first block, which is the same for both."""
        self.full[number] = hidden
        if self.quantized is not None:
            self.quantized[number] = hidden

    def halve(self) -> None:
        self.full.halve()
        if self.quantized is not None:
            self.quantized.halve()


@dataclass(frozen=True, eq=False)
class Depth:
    """What a run does along the depth.

    refinement: how blocks are refined; None does not.
    quantized_inputs: whether linears are fitted on their inputs behind quantized layers.
    restore: what a finished block was given, from its index and its linears, whose W is in memory; called on the main
        process only.
    """

    refinement: RefinementConfig | None
    quantized_inputs: bool
    seed: int
    processes: Processes
    restore: Callable[[int, Mapping[str, nn.Module]], Mapping[str, Restored]]

    @staticmethod
    def groups(run: BlockRun, linears: Mapping[str, nn.Module], streams: Streams) -> list[list[str]]:
        """Linears that share an input, in the order in which they run; see `groups_by_input`."""
        # In the first batch, which has the longest sequences: of a few tokens, all may be sent to one expert.
        with ops.half_products(run.device, [run.dtype]):
            forward = partial(run.forward, 0, streams.full[0])
            return groups_by_input(linears, run.batches[0].input_ids.numel(), forward)

    @staticmethod
    def compare(
        run: BlockRun,
        linears: Mapping[str, nn.Module],
        name: str,
        deployed: Mapping[str, DeployedLinear],
        streams: Streams,
        *,
        propagate: bool,
    ) -> InputPair:
        """Both inputs of linear `name`: in the full-precision model, and behind quantized blocks and those linears of
        this block that are `deployed` already. With `propagate`, the full-precision model's hidden states move on.

        Raises CalibrationError where a batch does not reach it with all of its tokens, once, in both.
        """
        assert streams.quantized is not None
        linear = linears[name]
        pair = InputPair(linear_weight(linear).shape[1], run.device)
        casts = _casts(run, deployed)
        seen: list[Tensor] = []

        def receive(full: Tensor) -> None:
            check(full, *seen)
            pair.update(full, seen.pop(), keep)

        def check(*received: Tensor) -> None:
            rows, tokens = [x.shape[:-1].numel() for x in received], batch.input_ids.numel()
            if rows and rows != [tokens] * 2:
                raise CalibrationError(
                    f"{name} receives {rows} rows of a batch of {count(tokens, 'token')}, so what it receives in the "
                    "full-precision model and in the quantized one cannot be paired; take inputs='full' (--inputs full)"
                )

        with ops.half_products(run.device, [run.dtype]):
            for number, batch in enumerate(run.batches):
                keep = to_device(batch.keep, run.device)
                with receiving(linear, seen.append, stop=True), in_place(linears, casts):
                    run.forward(number, streams.quantized[number])
                with receiving(linear, receive, stop=not propagate):
                    hidden = run.forward(number, streams.full[number])
                check(*seen)
                if propagate:
                    streams.full[number] = hidden
                    del hidden
        return pair

    def deployed(self, solved: Sequence[Solved], device: torch.device) -> dict[str, DeployedLinear]:
        """Those of the main process, on every rank."""
        found = self.processes.broadcast(solved)
        return _deployed(found, device)

    def restored(self, index: int, linears: Mapping[str, nn.Module], device: torch.device) -> dict[str, DeployedLinear]:
        """A finished block's linears as they are deployed."""
        found = self.processes.broadcast(self.restore(index, linears) if self.processes.is_main else {})
        return {name: _on(device, *each) for name, each in found.items()}

    def refined(
        self,
        run: BlockRun,
        name: str,
        index: int,
        solved: Sequence[Solved],
        linears: Mapping[str, nn.Module],
        streams: Streams,
    ) -> tuple[list[Solved], dict[str, DeployedLinear], BlockReport | None]:
        """What was solved of a block with its factors refined, and the linears with them; the same on every rank. No
        report: no adapter is on the block, or blocks are not refined."""
        assert streams.quantized is not None
        deployed = _deployed(solved, run.device)
        if self.refinement is None or all(each.A is None for each in deployed.values()):
            return list(solved), deployed, None
        deployed, row = refine_block(
            run,
            linears,
            deployed,
            streams.quantized,
            streams.full,
            self.refinement,
            self.processes,
            name=name,
            seed=self.seed + index,
        )
        return [_with(each, deployed[each.name]) for each in solved], deployed, row

    @staticmethod
    def as_saved(
        deployed: Mapping[str, DeployedLinear], targets: Mapping[str, Target | None]
    ) -> dict[str, DeployedLinear]:
        """The same with A and B as a run that resumes this one will read them."""
        found = dict(deployed)
        for name, each in deployed.items():
            target = targets.get(name)
            if target is not None and each.A is not None and each.B is not None:
                a, b = target.factors(*target.weights(each.A, each.B))
                found[name] = replace(each, A=a, B=b)
        return found

    @staticmethod
    def advance(
        run: BlockRun, linears: Mapping[str, nn.Module], deployed: Mapping[str, DeployedLinear], streams: Streams
    ) -> None:
        """Move the quantized stream on to the next block."""
        assert streams.quantized is not None
        with in_place(linears, _casts(run, deployed)):
            run.propagate(streams.quantized)


def _casts(run: BlockRun, deployed: Mapping[str, DeployedLinear]) -> dict[str, DeployedLinear]:
    """With A and B in the block's dtype, as refinement has them: fp32 products would take longer than those with Q."""
    return {name: each.computing_in(run.dtype) for name, each in deployed.items()}


def _deployed(solved: Sequence[Solved], device: torch.device) -> dict[str, DeployedLinear]:
    found = {}
    for each in solved:
        assert each.quantized is not None
        sides = (each.factors.A, each.factors.B) if each.factors is not None else (None, None)
        found[each.name] = _on(device, each.quantized, *sides)
    return found


def _on(device: torch.device, quantized: QuantizedWeight, a: Tensor | None, b: Tensor | None) -> DeployedLinear:
    q = quantized.to(device).dequantize()
    return DeployedLinear(q, None if a is None else a.to(device), None if b is None else b.to(device))


def _with(solved: Solved, deployed: DeployedLinear) -> Solved:
    if solved.factors is None:
        return solved
    assert deployed.A is not None and deployed.B is not None
    return replace(solved, factors=replace(solved.factors, A=deployed.A.cpu(), B=deployed.B.cpu()))
