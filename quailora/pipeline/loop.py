"""The loop over the blocks, with one block in memory: H, Q, factors.

for block in blocks:
    grams = block.capture(linears, hidden)        # H of each distinct input; `hidden` moves on to the next block
    solved = solve(weights, grams)                # Q and the factors of every linear that a token reached
    finish(solved)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
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
from quailora.pipeline.quantize import Initialized, QuantizeAndSolve
from quailora.pipeline.stages import Stages
from quailora.quantization.protocol import QuantizedBase, QuantizedWeight
from quailora.quantization.verify import digest
from quailora.reporting.progress import Progress
from quailora.reporting.report import LayerReport
from quailora.solvers.solve import LoraFactors

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Solved:
    """A linear that has its Q, which is kept if a base is written, and its factors if an adapter is on it; on the
    CPU."""

    name: str
    digest: str
    quantized: QuantizedWeight | None = None
    target: Target | None = None
    factors: LoraFactors | None = None
    row: LayerReport | None = None


@dataclass
class Loop:
    """What the loop over the blocks works with.

    initialize: finds Q and the factors of linears that share an input.
    base: the base that will be written: every Q is kept, and linears that no token reached are rounded to nearest; None
        keeps none.
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
    initialize: QuantizeAndSolve
    base: QuantizedBase | None
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

    def run(self, targets: Mapping[str, Target | None], batches: Sequence[Batch], finished: Collection[int]) -> None:
        """Find Q of every linear in `targets`, and the factors where it has a target. Blocks in `finished` are only
        propagated through."""
        model = self.model
        block_of = {name: index for index, block in enumerate(model.blocks) for name in block.linears()}
        waiting = {
            name: target for name, target in targets.items() if name in block_of and block_of[name] not in finished
        }
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

    def _block(self, index: int, waiting: dict[str, Target | None], states: HiddenStates) -> None:
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
        if self.base is not None and self.processes.is_main:
            with self.stages("quantize"):
                solved += [_unreached(name, linears[name], self.base) for name in linears if name in waiting]
        for each in solved:
            if each.row is not None:
                self.progress.layer(each.row)
        shrunk = self.processes.gather(self.shrunk)
        if solved:
            with self.stages("write"):
                self.finish(index, solved, shrunk)

    def _solve(
        self, targets: dict[str, Target | None], linears: dict[str, nn.Module], grams: dict[str, Gram], overwrite: bool
    ) -> list[Solved]:
        """What all ranks solved, on the main process; nothing elsewhere. Empties `grams`: each H is freed after use."""
        owners = self.processes.assign({name: linears[name].get_parameter("weight").numel() for name in targets})
        mine: list[Solved] = []
        while grams:
            gram = next(iter(grams.values()))
            names = [name for name, its in grams.items() if its is gram]
            own = {name: targets[name] for name in names if owners[name] == self.processes.rank}
            if own:
                mine += self._solve_group(own, {name: linear_weight(linears[name]) for name in own}, gram, overwrite)
            for name in names:
                del grams[name]
            del gram
            self.trim()
        found = {each.name: each for of_one in self.processes.gather(mine) for each in of_one}
        return [replace(found[name], target=targets[name]) for name in targets if name in found]

    def _solve_group(
        self, targets: Mapping[str, Target | None], weights: dict[str, Tensor], gram: Gram, overwrite: bool
    ) -> list[Solved]:
        """Linears that share an input. `overwrite`: the block will not run again, and weights may be overwritten."""
        start = perf_counter()
        ranks = {name: target.rank for name, target in targets.items() if target is not None}
        found = self.initialize(weights, ranks, gram, overwrite=overwrite)
        seconds = (perf_counter() - start) / sum(weight.numel() for weight in weights.values())
        solved = []
        for name, each in found.items():
            quantized = None if self.base is None else each.quantized.to(_CPU)
            factors, row = each.factors, None
            its_digest = digest(each.quantized)
            if factors is not None:
                row = _row(name, each, gram.tokens, seconds * weights[name].numel(), its_digest)
                factors = replace(factors, A=factors.A.cpu(), B=factors.B.cpu())
            solved.append(Solved(name, its_digest, quantized, factors=factors, row=row))
        return solved


def _prefix(block: Block) -> str:
    return f"{block.name}."


def _row(name: str, found: Initialized, tokens: int, seconds: float, digest: str) -> LayerReport:
    factors = found.factors
    assert factors is not None

    def per_token(objective: float) -> float:
        return math.sqrt(2 * objective / tokens)

    return LayerReport(
        name=name,
        outputs=len(factors.A),
        inputs=len(factors.B),
        rank=factors.A.shape[1],
        tokens=tokens,
        weight_error=factors.error_norm,
        weight_error_after=factors.residual_norm,
        output_error=per_token(factors.initial),
        output_error_after=per_token(factors.objective),
        jitter=factors.jitter,
        seconds=seconds,
        nuclear_norm=float(factors.A.square().sum()),  # A and B are balanced
        digest=digest,
        more_damping=found.more_damping,
        alternations=[
            [per_token(before), per_token(after)] for before, after in zip(found.before, found.after, strict=True)
        ],
    )


def _unreached(name: str, linear: nn.Module, base: QuantizedBase) -> Solved:
    quantized = base.quantize(linear_weight(linear)).to(_CPU)
    return Solved(name, digest(quantized), quantized)


_CPU = torch.device("cpu")
_SMALLER = "lower memory_budget (--memory-budget), batch_size (--batch-size 1), or sequence_length (--sequence-length)"


@contextmanager
def memory_errors(device: torch.device, advice: str) -> Iterator[None]:
    """Within it, a device that runs out of memory is a QuailoraError with `advice`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise QuailoraError(f"{device} is out of memory: {advice}. {' '.join(str(error).split())[:200]}") from error
