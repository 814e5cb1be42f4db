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
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TypeVar

import torch
from torch import Tensor, nn

from quailora import ops
from quailora.adapters.targets import Target
from quailora.calibration.calls import Call, Calls
from quailora.calibration.data import Batch
from quailora.calibration.gram import Gram
from quailora.calibration.hidden_states import HiddenStates
from quailora.errors import QuailoraError
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

T = TypeVar("T")


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
    finish: called with the index of a block, what was solved of it, and the `shrunk` of every rank; on the main process
        only.
    folder: where hidden states go if the plan has them on disk.
    trim: called where much memory was just freed; see `Meter.trim`.
    may_shrink: whether a device that runs out of memory may get smaller micro-batches than the plan's.
    shrunk: block -> the size of the micro-batches from it on, where this rank ran out of memory: in an earlier run that
        this one resumes, and in this one. The size decides bits, so what is there is repeated.
    notes: for the report; filled here.
    """

    model: StreamedModel
    plan: Plan
    solver: SolverConfig
    quantized_weight: Callable[[Target, Tensor], QuantizedWeight]
    finish: Callable[[int, list[Solved], list[dict[int, int]]], None]
    processes: Processes
    progress: Progress
    stages: Stages
    folder: Path
    trim: Callable[[], None]
    may_shrink: bool
    shrunk: dict[int, int]
    notes: list[str]

    def __post_init__(self) -> None:
        self._recorder = Calls(self.model)
        self._batches: list[Batch] = []
        self._calls: list[list[Call]] = []  # by batch and block

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
            self._batches = list(batches)
            self._note_shrunk()
            if waiting:
                self._embed(states)
            try:
                for index in self.progress.blocks(range(last + 1)):
                    with self._resident(index, last):
                        self._block(index, waiting, states)
                    self.trim()
            finally:
                model.forget_prefetched()

    def _embed(self, states: HiddenStates | None = None) -> None:
        """Record what each block is called with, by batch; `states` gets the hidden states that enter the first."""
        model = self.model
        self._calls.clear()
        halves = ops.half_products(model.device, [model.dtype])
        with self.stages("load"), model.resident(*model.outside_blocks()), halves:
            for number, batch in enumerate(self._batches):
                hidden, of_batch = self._recorder.record(batch)
                self._calls.append(of_batch)
                if states is not None:
                    states[number] = hidden
                del hidden
        self.trim()

    @contextmanager
    def _resident(self, index: int, last: int) -> Iterator[None]:
        """The block's weights are in memory, and the next block's are being read."""
        with ExitStack() as stack:
            with self.stages("load"):
                stack.enter_context(self.model.resident(_prefix(self.model.blocks[index])))
                self.trim()  # what weights were converted from
            if self.plan.prefetch and index < last:
                self.model.prefetch(_prefix(self.model.blocks[index + 1]))
            yield

    def _forward(self, index: int, states: HiddenStates, step: Callable[[BlockRun], T]) -> T:
        """`step` of a block, which runs it over every batch.

        If the device runs out of memory before any hidden states have changed, the micro-batches are halved and the
        step is repeated. Batches are sorted by length, longest first, so it is the first one that runs out.
        """
        model = self.model
        while True:
            edits = states.edits
            run = BlockRun(
                module=model.blocks[index].module,
                device=model.device,
                dtype=model.dtype,
                batches=self._batches,
                calls=[of_batch[index] for of_batch in self._calls],
            )
            try:
                with self.stages("forward"):
                    return step(run)
            except torch.OutOfMemoryError:
                if not self.may_shrink or states.edits != edits or all(len(b.input_ids) == 1 for b in self._batches):
                    raise
            self._halve(index, states)

    def _halve(self, index: int, states: HiddenStates) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        states.halve()
        self._batches = [half for batch in self._batches for half in batch.halves()]
        self._embed()  # masks and position embeddings are by batch
        self.shrunk[index] = self._largest_batch()
        self._note_shrunk()

    def _note_shrunk(self) -> None:
        if self.shrunk:
            index = max(self.shrunk)
            self.notes[:] = [
                f"{self.model.device} ran out of memory with the planned micro-batches of {self.plan.batch_size} "
                f"sequences: from block {index} on they had {self.shrunk[index]}. A lower memory_budget "
                "(--memory-budget) avoids this"
            ]

    def _largest_batch(self) -> int:
        return max((len(batch.input_ids) for batch in self._batches), default=0)

    def _block(self, index: int, waiting: dict[str, Target], states: HiddenStates) -> None:
        size = self.shrunk.get(index, math.inf)
        while self._largest_batch() > size:
            self._halve(index, states)
        linears = {name: linear for name, linear in self.model.blocks[index].linears().items() if name in waiting}
        if not linears:
            self._forward(index, states, lambda run: run.propagate(states))
            return
        solved: list[Solved] = []
        passes = self.plan.passes[index]
        for number, planned in enumerate(passes):
            last_pass = number == len(passes) - 1
            captured = {name: linears[name] for name in planned if name in linears}
            capture = partial(BlockRun.capture, linears=captured, states=states, propagate=last_pass)
            grams = self._forward(index, states, capture)
            self.trim()
            if self.processes.distributed:
                with self.stages("share"):
                    grams = self.processes.all_reduce(grams, self.model.device)
            reached = {name: waiting.pop(name) for name in captured if name in grams}
            solved += self._solve(reached, linears, grams, overwrite=last_pass)
        for each in solved:
            self.progress.layer(each.row)
        shrunk = self.processes.gather(self.shrunk)
        if solved:
            with self.stages("write"):
                self.finish(index, solved, shrunk)

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
            self.trim()
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
