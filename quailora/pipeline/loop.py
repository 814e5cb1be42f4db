"""The loop over the blocks, with one block in memory: H, Q, factors.

for block in blocks:
    grams = block.capture(linears, hidden)        # H of each distinct input; `hidden` moves on to the next block
    solved = solve(weights, grams)                # Q and the factors of every linear that a token reached
    finish(solved)
"""

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
from quailora.calibration.calls import Call, Calls
from quailora.calibration.data import Batch
from quailora.calibration.gram import Gram
from quailora.calibration.hidden_states import HiddenStates
from quailora.errors import QuailoraError
from quailora.memory.allocator import return_freed_memory
from quailora.memory.planner import Plan
from quailora.modeling.blocks import Block, linear_weight
from quailora.modeling.streamed_model import StreamedModel
from quailora.pipeline.block import BlockRun
from quailora.pipeline.distributed import Processes
from quailora.quantization.protocol import QuantizedWeight
from quailora.quantization.verify import digest
from quailora.reporting.progress import Progress
from quailora.reporting.report import LayerReport
from quailora.solvers.config import SolverConfig
from quailora.solvers.inputs import Linear
from quailora.solvers.solve import LoraFactors, solve_group


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


@dataclass(frozen=True, eq=False)
class Solved:
    """A linear that has its factors: they are on the CPU."""

    target: Target
    factors: LoraFactors
    row: LayerReport


@dataclass
class Loop:
    """What the loop over the blocks works with.

    quantized_weight: the Q of a target, given its full-precision weight (m, n).
    finish: called with the index of a block and what was solved of it, on the main process only.
    folder: where hidden states go if the plan has them on disk.
    """

    model: StreamedModel
    plan: Plan
    solver: SolverConfig
    quantized_weight: Callable[[Target, Tensor], QuantizedWeight]
    finish: Callable[[int, list[Solved]], None]
    processes: Processes
    progress: Progress
    stages: Stages
    folder: Path

    def run(self, targets: Collection[Target], batches: Sequence[Batch], finished: Collection[int]) -> None:
        """Find the factors of every target. Blocks in `finished` are only propagated through."""
        model = self.model
        block_of = {name: index for index, block in enumerate(model.blocks) for name in block.linears()}
        waiting = {t.name: t for t in targets if t.name in block_of and block_of[t.name] not in finished}
        last = max((block_of[name] for name in waiting), default=-1)
        # The caller's autocast must reach neither the full-precision forward pass nor H.
        with (
            torch.no_grad(),
            torch.autocast(model.device.type, enabled=False),
            memory_errors(model.device, _SMALLER),
            HiddenStates(model.device, self.folder if self.plan.states == "disk" else None) as states,
        ):
            calls = self._embed(batches, states) if waiting else []
            try:
                for index in self.progress.blocks(range(last + 1)):
                    with self._resident(index, last):
                        run = BlockRun(
                            module=model.blocks[index].module,
                            device=model.device,
                            dtype=model.dtype,
                            batches=batches,
                            calls=[of_batch[index] for of_batch in calls],
                        )
                        self._block(index, run, waiting, states)
            finally:
                model.forget_prefetched()

    def _embed(self, batches: Sequence[Batch], states: HiddenStates) -> list[list[Call]]:
        """The hidden states that enter the first block; and what each block is called with, by batch and block."""
        model, calls = self.model, []
        with self.stages("load"), model.resident(*model.outside_blocks()):
            recorder = Calls(model)
            with ops.half_products(model.device, [model.dtype]):
                for number, batch in enumerate(batches):
                    states[number], of_batch = recorder.record(batch)
                    calls.append(of_batch)
        return calls

    @contextmanager
    def _resident(self, index: int, last: int) -> Iterator[None]:
        """The block's weights are in memory, and the next block's are being read."""
        with ExitStack() as stack:
            with self.stages("load"):
                stack.enter_context(self.model.resident(_prefix(self.model.blocks[index])))
            if self.plan.prefetch and index < last:
                self.model.prefetch(_prefix(self.model.blocks[index + 1]))
            yield

    def _block(self, index: int, run: BlockRun, waiting: dict[str, Target], states: HiddenStates) -> None:
        linears = {name: linear for name, linear in self.model.blocks[index].linears().items() if name in waiting}
        if not linears:
            with self.stages("forward"):
                run.propagate(states)
            return
        solved: list[Solved] = []
        passes = self.plan.passes[index]
        for number, planned in enumerate(passes):
            last_pass = number == len(passes) - 1
            captured = {name: linears[name] for name in planned if name in linears}
            with self.stages("forward"):
                grams = run.capture(captured, states, propagate=last_pass)
            return_freed_memory()
            if self.processes.distributed:
                with self.stages("share"):
                    grams = self.processes.all_reduce(grams, self.model.device)
            reached = {name: waiting.pop(name) for name in captured if name in grams}
            solved += self._solve(reached, linears, grams, overwrite=last_pass)
        for each in solved:
            self.progress.layer(each.row)
        if solved:
            with self.stages("write"):
                self.finish(index, solved)

    def _solve(
        self, targets: dict[str, Target], linears: dict[str, nn.Module], grams: dict[str, Gram], overwrite: bool
    ) -> list[Solved]:
        """What all ranks solved, on the main process; nothing elsewhere. Empties `grams`: each H is freed after use."""
        owners = self.processes.assign({name: linears[name].get_parameter("weight").numel() for name in targets})
        mine: list[tuple[str, LoraFactors, LayerReport]] = []
        while grams:
            gram = next(iter(grams.values()))
            names = [name for name, its in grams.items() if its is gram]
            own = [name for name in names if owners[name] == self.processes.rank]
            if own:
                weights = [linear_weight(linears[name]) for name in own]
                mine += self._solve_group([targets[name] for name in own], weights, gram, overwrite)
            for name in names:
                del grams[name]
            del gram
            return_freed_memory()
        of_ranks = self.processes.gather(mine)
        found = {name: Solved(targets[name], factors, row) for of_one in of_ranks for name, factors, row in of_one}
        return [found[name] for name in targets if name in found]

    def _solve_group(
        self, targets: Sequence[Target], weights: Sequence[Tensor], gram: Gram, overwrite: bool
    ) -> list[tuple[str, LoraFactors, LayerReport]]:
        """Linears that share an input."""
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
                self.solver,
                overwrite_weights=overwrite,  # the block will not run again
            )
            factors = [replace(found, A=found.A.cpu(), B=found.B.cpu()) for found in factors]
        seconds = (perf_counter() - start) / sum(weight.numel() for weight in weights)
        return [
            (target.name, found, _row(target, found, gram.tokens, seconds * weight.numel(), digest(q)))
            for target, weight, q, found in zip(targets, weights, quantized, factors, strict=True)
        ]


def _prefix(block: Block) -> str:
    return f"{block.name}."


def _row(target: Target, factors: LoraFactors, tokens: int, seconds: float, digest: str) -> LayerReport:
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
        digest=digest,
    )


_SMALLER = "lower memory_budget (--memory-budget), batch_size (--batch-size 1), or sequence_length (--sequence-length)"


@contextmanager
def memory_errors(device: torch.device, advice: str) -> Iterator[None]:
    """Within it, a device that runs out of memory is a QuailoraError with `advice`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise QuailoraError(f"{device} is out of memory: {advice}. {' '.join(str(error).split())[:200]}") from error
