"""The loop over the blocks, with one block in memory: H, Q, factors.

for block in blocks:
    grams = block.capture(linears, full)          # H of each distinct input; `full` moves on to the next block
    solved = solve(weights, grams)                # Q and the factors of every linear that a token reached
    ...                                           # or both group by group, on inputs behind what is quantized already
    solved = refine(solved, quantized, full)      # where asked for
    finish(solved)
    block.advance(quantized, solved)              # hidden states of the quantized blocks, where asked for
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from quailora import ops
from quailora.adapters.targets import Target
from quailora.calibration.block import BlockRun, DeployedLinear
from quailora.calibration.calls import Call, Calls
from quailora.calibration.data import Batch
from quailora.calibration.distributed import Processes
from quailora.calibration.hidden_states import HiddenStates
from quailora.memory.budget import memory_errors
from quailora.memory.planner import Plan
from quailora.modeling.blocks import Block
from quailora.modeling.streamed_model import StreamedModel
from quailora.pipeline.depth import Depth, Streams
from quailora.pipeline.quantize import QuantizeAndSolve
from quailora.pipeline.solved import Solved, unreached
from quailora.pipeline.solving import Solving
from quailora.pipeline.stages import Stages
from quailora.reporting.markdown import count
from quailora.reporting.progress import Progress
from quailora.reporting.report import BlockReport

T = TypeVar("T")


@dataclass
class Loop:
    """What the loop over the blocks works with.

    initialize: finds Q and the factors of linears that share an input.
    keep_q: whether every Q is kept, and linears that no token reached are rounded to nearest.
    finish: called with the index of a block, what was solved of it, the `shrunk` of every rank, and how it was refined;
        on the main process only.
    folder: where hidden states go if the plan has them on disk.
    trim: called where much memory was just freed; see `Meter.trim`.
    may_shrink: whether a device that runs out of memory may get smaller micro-batches than the plan's.
    shrunk: block -> the size of the micro-batches from it on, where this rank ran out of memory: in an earlier run that
        this one resumes, and in this one. The size decides bits, so what is there is repeated.
    notes: for the report; filled here.
    depth: what is done along the depth; None is nothing. It takes `keep_q`.
    """

    model: StreamedModel
    plan: Plan
    initialize: QuantizeAndSolve
    keep_q: bool
    finish: Callable[[int, list[Solved], list[dict[int, int]], BlockReport | None], None]
    processes: Processes
    progress: Progress
    stages: Stages
    folder: Path
    trim: Callable[[], None]
    may_shrink: bool
    shrunk: dict[int, int]
    notes: list[str]
    depth: Depth | None = None

    def __post_init__(self) -> None:
        self._recorder = Calls(self.model)
        self._solve = Solving(self.initialize, self.keep_q, self.processes, self.stages, self.trim)
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
            ExitStack() as stack,
        ):
            folder = self.folder if self.plan.states == "disk" else None
            full, *quantized = (
                stack.enter_context(HiddenStates(model.device, folder, self.plan.states == "device"))
                for _ in range(1 if self.depth is None else 2)
            )
            states = Streams(full, *quantized)
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

    def _embed(self, states: Streams | None = None) -> None:
        """Record what each block is called with, by batch; `states` gets the hidden states that enter the first."""
        model = self.model
        self._calls.clear()
        halves = ops.half_products(model.device, [model.dtype])
        with self.stages("load"), model.resident(*model.outside_blocks()), halves:
            for number, batch in enumerate(self._batches):
                hidden, of_batch = self._recorder.record(batch)
                self._calls.append(of_batch)
                if states is not None:
                    states.enter(number, hidden)
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

    def _forward(self, index: int, states: Streams, step: Callable[[BlockRun], T], stage: str = "forward") -> T:
        """`step` of a block, which runs it over every batch.

        If the device runs out of memory before any hidden states have changed, the micro-batches are halved and the
        step is repeated. Batches are sorted by length, longest first, so it is the first one that runs out. Steps that
        all ranks take together are not repeated by one of them.
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
                with self.stages(stage):
                    return step(run)
            except torch.OutOfMemoryError:
                apart = stage == "refine" and self.processes.distributed  # the others wait for this one's gradients
                smallest = all(len(batch.input_ids) == 1 for batch in self._batches)
                if apart or smallest or not self.may_shrink or states.edits != edits:
                    raise
            self._halve(index, states)

    def _halve(self, index: int, states: Streams) -> None:
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
                f"{self.model.device} ran out of memory with the planned micro-batches of "
                f"{count(self.plan.batch_size, 'sequence')}: from block {index} on they had {self.shrunk[index]}. A "
                "lower memory_budget (--memory-budget) avoids this"
            ]

    def _largest_batch(self) -> int:
        return max((len(batch.input_ids) for batch in self._batches), default=0)

    def _block(self, index: int, waiting: dict[str, Target | None], states: Streams) -> None:
        size = self.shrunk.get(index, math.inf)
        while self._largest_batch() > size:
            self._halve(index, states)
        every = self.model.blocks[index].linears()
        linears = {name: linear for name, linear in every.items() if name in waiting}
        if not linears:
            self._forward(index, states, lambda run: run.propagate(states.full))
            if self.depth is not None:
                with self.stages("quantize"):
                    deployed = self.depth.restored(index, every, self.model.device)
                self._forward(index, states, partial(Depth.advance, linears=every, deployed=deployed, streams=states))
            return
        targets = {name: waiting[name] for name in linears}
        if self.depth is not None and self.depth.quantized_inputs:
            solved = self._on_quantized(index, linears, waiting, states, self.depth)
        else:
            solved = self._on_full(index, linears, waiting, states)
        if self.keep_q and self.processes.is_main:
            with self.stages("quantize"):
                solved += [unreached(name, linears[name], self.initialize) for name in linears if name in waiting]
        for each in solved:
            if each.row is not None:
                self.progress.layer(each.row)
        refined = None
        if self.depth is not None:
            solved, deployed, refined = self._refine(index, solved, targets, linears, states)
        shrunk = self.processes.gather(self.shrunk)
        if solved and self.processes.is_main:
            with self.stages("write"):
                self.finish(index, solved, shrunk, refined)
        if self.depth is not None:
            self._forward(index, states, partial(Depth.advance, linears=linears, deployed=deployed, streams=states))

    def _on_full(
        self,
        index: int,
        linears: dict[str, nn.Module],
        waiting: dict[str, Target | None],
        states: Streams,
        propagate: bool = True,
    ) -> list[Solved]:
        """Linears fitted on their inputs in the full-precision model, in one pass or several. Those that a token
        reached are no longer `waiting`."""
        solved: list[Solved] = []
        passes = [here for names in self.plan.passes[index] if (here := [name for name in names if name in linears])]
        for number, names in enumerate(passes):
            last_pass = propagate and number == len(passes) - 1
            captured = {name: linears[name] for name in names}
            capture = partial(BlockRun.capture, linears=captured, states=states.full, propagate=last_pass)
            grams = self._forward(index, states, capture)
            self.trim()
            if self.processes.distributed:
                with self.stages("share"):
                    grams = self.processes.all_reduce(grams, self.model.device)
            reached = {name: waiting.pop(name) for name in captured if name in grams}
            solved += self._solve(reached, linears, grams, overwrite=last_pass)
        return solved

    def _on_quantized(
        self,
        index: int,
        linears: dict[str, nn.Module],
        waiting: dict[str, Target | None],
        states: Streams,
        depth: Depth,
    ) -> list[Solved]:
        """Linears fitted on their inputs behind quantized ones, group by group as they run. Those whose inputs cannot
        be paired come first, on their inputs in the full-precision model."""
        groups: list[list[str]] = []
        if self.processes.is_main:
            groups = self._forward(index, states, partial(Depth.groups, linears=linears, streams=states))
        groups = self.processes.broadcast(groups)
        rest = {name: linear for name, linear in linears.items() if not any(name in group for group in groups)}
        solved = self._on_full(index, rest, waiting, states, propagate=not groups)
        deployed = depth.deployed(solved, self.model.device)
        for number, group in enumerate(groups):
            compare = partial(
                Depth.compare,
                linears=linears,
                name=group[0],
                deployed=deployed,
                streams=states,
                propagate=number == len(groups) - 1,
            )
            pair = self._forward(index, states, compare)
            self.trim()
            if self.processes.distributed:
                with self.stages("share"):
                    self.processes.reduce(pair)
            reached = {name: waiting.pop(name) for name in group}
            found = self._solve(reached, linears, dict.fromkeys(group, pair.gram), overwrite=False, pair=pair)
            del pair
            deployed |= depth.deployed(found, self.model.device)
            solved += found
        return solved

    def _refine(
        self,
        index: int,
        solved: list[Solved],
        targets: dict[str, Target | None],
        linears: dict[str, nn.Module],
        states: Streams,
    ) -> tuple[list[Solved], dict[str, DeployedLinear], BlockReport | None]:
        """What was solved with refined factors; the linears with them, as a run that resumes this one has them."""
        assert self.depth is not None
        everywhere = self.processes.broadcast(solved)
        step = partial(
            self.depth.refined,
            name=self.model.blocks[index].name,
            index=index,
            solved=everywhere,
            linears=linears,
            streams=states,
        )
        found, deployed, report = self._forward(index, states, step, "refine")
        self.trim()
        return found, Depth.as_saved(deployed, targets), report


def _prefix(block: Block) -> str:
    return f"{block.name}."


_SMALLER = "lower memory_budget (--memory-budget), batch_size (--batch-size 1), or sequence_length (--sequence-length)"
