"""The loop over the blocks: activations -> H -> Q -> factors, with one block in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn

from quailora import ops
from quailora.adapters.lora import Target
from quailora.calibration.data import Batch
from quailora.calibration.gram import Gram
from quailora.calibration.hidden_states import HiddenStates
from quailora.calibration.hooks import Call, Calls, collect
from quailora.errors import QuailoraError
from quailora.memory.allocator import return_freed_memory
from quailora.memory.planner import Plan
from quailora.modeling.streamed_model import Block, StreamedModel, linear_weight
from quailora.pipeline.distributed import Crew
from quailora.quantization.bitsandbytes import QuantizedWeight
from quailora.reporting.progress import Progress
from quailora.reporting.report import LayerReport
from quailora.solvers.config import SolverConfig
from quailora.solvers.solve import Linear, LoraFactors, solve_group


@dataclass
class Stages:
    """Seconds spent by stage. On CUDA, work that is queued in one stage may be waited for in another."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - start


# The factors of a target, on the CPU, and its row of the report.
Solved = tuple[Target, LoraFactors, LayerReport]


@dataclass
class Loop:
    """What the loop over the blocks works with.

    quantized_weight: gives the Q of a target, for its full-precision weight (m, n).
    finish: takes what was solved of a block, by its index; called on the leader of the crew only.
    folder: where hidden states go if the plan has them on disk.
    """

    model: StreamedModel
    plan: Plan
    settings: SolverConfig
    quantized_weight: Callable[[Target, Tensor], QuantizedWeight]
    finish: Callable[[int, list[Solved]], None]
    crew: Crew
    progress: Progress
    stages: Stages
    folder: Path

    def run(self, targets: Collection[Target], batches: Sequence[Batch], finished: Collection[int]) -> None:
        """Solve for every target, but in `finished` blocks, whose forward pass alone is run."""
        model, stages = self.model, self.stages
        inside = {name: index for index, block in enumerate(model.blocks) for name in block.linears()}
        waiting = {t.name: t for t in targets if t.name in inside and inside[t.name] not in finished}
        last = max((inside[name] for name in waiting), default=-1)
        # A caller's autocast must not reach the full-precision forward pass, nor H.
        with (
            torch.no_grad(),
            torch.autocast(model.device.type, enabled=False),
            memory_errors(model.device, _SMALLER),
            HiddenStates(model.device, self.folder if self.plan.states == "disk" else None) as states,
        ):
            calls: list[list[Call]] = []
            if waiting:
                with stages("load"), model.resident(*model.outside_blocks()):
                    recorder = Calls(model)
                    with ops.half_products(model.device, [model.dtype]):
                        for number, batch in enumerate(batches):
                            states[number], of_batch = recorder.record(batch)
                            calls.append(of_batch)
            try:
                for index in self.progress.blocks(range(last + 1)):
                    with self._resident(index, last):
                        self._block(index, waiting, batches, states, [of_batch[index] for of_batch in calls])
            finally:
                model.forget_prefetched()

    @contextmanager
    def _resident(self, index: int, last: int) -> Iterator[None]:
        """The block's weights in memory, and the next one's on their way."""
        with ExitStack() as stack:
            with self.stages("load"):
                stack.enter_context(self.model.resident(_prefix(self.model.blocks[index])))
            if self.plan.prefetch and index < last:
                self.model.prefetch(_prefix(self.model.blocks[index + 1]))
            yield

    def _block(
        self,
        index: int,
        waiting: dict[str, Target],
        batches: Sequence[Batch],
        states: HiddenStates,
        calls: Sequence[Call],
    ) -> None:
        block = self.model.blocks[index]
        linears = {name: linear for name, linear in block.linears().items() if name in waiting}
        passes = self.plan.passes[index] if linears else ((),)
        solved: list[Solved] = []
        for turn, planned in enumerate(passes):
            names = [name for name in planned if name in linears]
            last = turn == len(passes) - 1
            with (
                self.stages("forward"),
                ops.half_products(self.model.device, [self.model.dtype]),
                collect({name: linears[name] for name in names}) as collector,
            ):
                for number, batch in enumerate(batches):
                    keep = batch.keep
                    if keep is not None and self.model.device.type == "cuda":
                        keep = keep.pin_memory().to(self.model.device, non_blocking=True)
                    with collector.batch(keep):
                        hidden = calls[number].run(block.module, states[number])
                    if last:
                        states[number] = hidden
                    del hidden
            grams = collector.grams
            del collector
            return_freed_memory()
            if self.crew.together:
                with self.stages("share"):
                    grams = self.crew.merge(grams, self.model.device)
            reached = {name: waiting.pop(name) for name in names if name in grams}
            solved += self._solve(reached, linears, grams, last)
        for _, _, row in solved:
            self.progress.layer(row)
        if solved:
            with self.stages("write"):
                self.finish(index, solved)

    def _solve(
        self, targets: dict[str, Target], linears: dict[str, nn.Module], grams: dict[str, Gram], overwrite: bool
    ) -> list[Solved]:
        """Those of all ranks on the leader, none elsewhere. Empties `grams`, so that each H goes when it was used."""
        owners = self.crew.deal({name: linears[name].get_parameter("weight").numel() for name in targets})
        mine: list[tuple[str, LoraFactors, LayerReport]] = []
        while grams:
            gram = next(iter(grams.values()))
            names = [name for name, its in grams.items() if its is gram]
            own = [name for name in names if owners[name] == self.crew.rank]
            if own:
                weights = [linear_weight(linears[name]) for name in own]
                mine += self._solve_group([targets[name] for name in own], weights, gram, overwrite)
            for name in names:
                del grams[name]
            del gram
            return_freed_memory()
        order = {name: place for place, name in enumerate(targets)}
        of_all = [each for of_one in self.crew.to_leader(mine) for each in of_one]
        return [(targets[name], *rest) for name, *rest in sorted(of_all, key=lambda each: order[each[0]])]  # type: ignore[misc]

    def _solve_group(
        self, targets: Sequence[Target], weights: Sequence[Tensor], gram: Gram, overwrite: bool
    ) -> list[tuple[str, LoraFactors, LayerReport]]:
        start = perf_counter()
        with self.stages("quantize"):
            quantized = [self.quantized_weight(*each) for each in zip(targets, weights, strict=True)]
        with self.stages("solve"):
            factors = solve_group(
                [
                    Linear(weight, q, target.rank, target.name)
                    for target, weight, q in zip(targets, weights, quantized, strict=True)
                ],
                gram,
                self.settings,
                overwrite_weights=overwrite,  # the block has run
            )
            factors = [replace(found, A=found.A.cpu(), B=found.B.cpu()) for found in factors]
        seconds = (perf_counter() - start) / sum(weight.numel() for weight in weights)
        return [
            (target.name, found, _row(target, found, gram.tokens, seconds * weight.numel()))
            for target, weight, found in zip(targets, weights, factors, strict=True)
        ]


def _prefix(block: Block) -> str:
    return f"{block.name}."


def _row(target: Target, factors: LoraFactors, tokens: int, seconds: float) -> LayerReport:
    return LayerReport(
        name=target.name,
        outputs=len(factors.A),
        inputs=len(factors.B),
        rank=target.rank,
        tokens=tokens,
        weight_error=factors.error_norm,
        weight_error_after=factors.residual_norm,
        output_error=math.sqrt(2 * factors.initial / tokens),
        output_error_after=math.sqrt(2 * factors.objective / tokens),
        jitter=factors.jitter,
        seconds=seconds,
    )


_SMALLER = (
    "lower memory_budget (--memory-budget), which the plan keeps to, or batch_size (--batch-size 1) or sequence_length "
    "(--sequence-length)"
)


@contextmanager
def memory_errors(device: torch.device, advice: str) -> Iterator[None]:
    """Within it, that a device has no more memory is a QuailoraError with `advice`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise QuailoraError(f"{device} is out of memory: {advice}. {' '.join(str(error).split())[:200]}") from error
