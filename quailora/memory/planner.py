"""From a memory budget and shapes, a plan: the micro-batch, where hidden states are kept, and the passes over a block.

For each block, a run has in memory, one phase after the other:

    load       its weights, while they are read
    forward    its weights and the next block's, which are read ahead; one H (n x n, fp32) for each distinct input of
               the pass; activations of one micro-batch
    solve      weights and the H not used yet; quantized weights, E and the solver's thin matrices for one group of
               linears that share an input
               where linears are fitted behind quantized layers, one group's H and D (n x n, fp32) at a time, in two
               models: what is quantized of the block is beside its weights, and targets are beside them while solving
    refine     where blocks are refined: weights, every Q of the block, the factors with their gradients, Adam's moments
               and the best so far, and what one micro-batch keeps for the backward pass

and, before the first block, the embeddings. The hidden states of all tokens are kept too, on the device, in host memory
or in a file, and those of the quantized model beside them where blocks are refined or inputs are those of quantized
layers.
On a CPU, device and host share one memory and everything counts; on a GPU only what torch allocates there does.

All of it is arithmetic on shapes, rounded up where shapes do not determine the size. Nothing is read or run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import ceil
from time import perf_counter
from typing import Any

import torch

from quailora import ops
from quailora.errors import BudgetError, QuailoraError
from quailora.memory.allocator import overhead
from quailora.memory.budget import OF_FREE, about, describe_bytes, free_memory
from quailora.memory.depth import comparing, deployed, retargeting, work
from quailora.memory.sizes import Base, BlockSizes, Device, activations, block_sizes, called_with, outside, solving
from quailora.memory.training import refining
from quailora.modeling.prefetch import STAGING_BYTES
from quailora.modeling.streamed_model import StreamedModel
from quailora.refinement.config import RefinementConfig
from quailora.reporting.markdown import count
from quailora.solvers.config import SolverConfig
from quailora.solvers.registry import SOLVERS

TOKENS_PER_BATCH = 8192  # enough for efficient matrix products, and small next to a block's weights
_FEWER_TOKENS = 2048  # still efficient; below this, each halving of the batch costs time

_READ_RATE = 2e9  # bytes per second: an NVMe disk, assumed

_PHASES = ("embeddings", "load", "forward", "solve", "refine")


@dataclass(frozen=True)
class Part:
    """Something that takes memory.

    where: "device", "host" or "disk". phase: as at the top of this module; "all" is throughout.
    """

    name: str
    bytes: int
    where: str
    phase: str


@dataclass(frozen=True)
class Plan:
    """How a run proceeds and what memory it takes. For each phase, `parts` are those of the block that needs most."""

    device: str
    batch_size: int
    states: str  # where hidden states are between blocks: "host" or "disk", or on a GPU also "device"
    prefetch: bool
    passes: tuple[tuple[tuple[str, ...], ...], ...]  # by block: the linears whose H each pass accumulates
    parts: tuple[Part, ...]
    budget: int
    flops: dict[str, int]  # "forward", "H", "solve"; "inputs", "refine"
    read: int  # bytes of weights
    seconds: float | None = None  # None: not estimated

    @property
    def peak(self) -> int:
        """Peak memory on the device, in bytes."""
        return max(self._total("device", phase) for phase in _PHASES)

    @property
    def host(self) -> int:
        """Bytes of host memory, for a GPU; on a CPU there is only the device's memory."""
        return self._total("host", "all")

    @property
    def disk(self) -> int:
        return self._total("disk", "all")

    def _total(self, where: str, phase: str) -> int:
        return sum(part.bytes for part in self.parts if part.where == where and part.phase in (phase, "all"))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"peak": self.peak, "host": self.host, "disk": self.disk}

    def text(self) -> str:
        """The plan as a table, for a terminal."""
        most = max(map(len, self.passes), default=1)
        passes = f"{most} passes" if most > 1 else "one pass"
        if "inputs" in self.flops:
            passes = "a part of a pass for each input"
        lines = [
            f"on {self.device}, budget {describe_bytes(self.budget)}: micro-batches of "
            f"{count(self.batch_size, 'sequence')}, {passes} over each block, hidden states on {self.states}, "
            f"{'the next block is' if self.prefetch else 'no block is'} read ahead",
            "",
        ]
        width = max(len(part.name) for part in self.parts)
        for where, phases in (("device", (*_PHASES, "all")), ("host", ("all",)), ("disk", ("all",))):
            for phase in phases:
                label = where if where != "device" else "throughout" if phase == "all" else phase
                for part in self.parts:
                    if (part.where, part.phase) == (where, phase):
                        lines.append(f"{label:<11} {part.name:<{width}}  {describe_bytes(part.bytes):>9}")
                        label = ""
        peak, host, disk = map(describe_bytes, (self.peak, self.host, self.disk))
        flops = ", ".join(f"{stage} {number:.2g}" for stage, number in self.flops.items())
        time = "not estimated: the device is not here" if self.seconds is None else about(self.seconds)
        lines += ["", f"peak        {peak}, host {host}, disk {disk}"]
        lines += [f"FLOPs       {flops}; {describe_bytes(self.read)} of weights to read", f"time        {time}"]
        return "\n".join(lines)


def make_plan(
    stream: StreamedModel,
    targets: Mapping[str, int],
    base: Base,
    solver: SolverConfig,
    *,
    samples: int,
    sequence_length: int,
    memory_budget: int | None,
    host_memory_budget: int | None,
    batch_size: int | None = None,
    held: int = 0,
    device: torch.device | None = None,
    timed: bool = False,
    refinement: RefinementConfig | None = None,
    quantized_inputs: bool = False,
) -> Plan:
    """The fastest plan whose peak is within the budget. No weight is read.

    targets: linears by name, with the rank of each.
    samples, sequence_length: the number of sequences, and the length of the longest.
    memory_budget: of the device; None is 90 % of what is free. On a CPU everything counts against it.
    host_memory_budget: how much host memory hidden states may take, for a GPU; None is 90 % of what is free.
    batch_size: the only one to consider; None considers several.
    held: bytes of the budget that the process already uses.
    device: where the run will be, if not the device of `stream`; it need not be present.
    timed: measure how fast this device multiplies, and estimate the time.
    refinement: how blocks are refined; the micro-batch is then at most a step of it, and half the data.
    quantized_inputs: whether linears are fitted on their inputs behind quantized layers.

    Raises BudgetError if no plan fits, naming the smallest budget that would do and what needs it.
    """
    place = device or stream.device
    planner = _Planner(stream, dict(targets), base, solver, samples, sequence_length, place, held, refinement)
    planner = replace(planner, quantized_inputs=quantized_inputs)
    if memory_budget is None and planner.device.type == "cuda" and not torch.cuda.is_available():
        raise QuailoraError(
            "there is no CUDA device here, so its free memory is not known: give memory_budget (--memory-budget)"
        )
    budget = int(OF_FREE * free_memory(planner.device)) + held if memory_budget is None else memory_budget
    most = samples if refinement is None else max(1, samples // 2)
    tokens = TOKENS_PER_BATCH if refinement is None else refinement.tokens
    batches = [min(batch_size, most)] if batch_size else _batches(most, sequence_length, tokens)
    smallest: tuple[Plan, dict[str, str]] | None = None
    for states, prefetch, batch, passes in planner.preferences(batches, host_memory_budget):
        plan, blocks = planner.plan(states, prefetch, batch, passes, budget)
        if plan.peak <= budget:
            return replace(plan, seconds=planner.seconds(plan)) if timed else plan
        if smallest is None or plan.peak < smallest[0].peak:
            smallest = plan, blocks
    assert smallest is not None
    raise BudgetError(_too_little(*smallest, batch_size))


def _batches(samples: int, length: int, tokens: int = TOKENS_PER_BATCH) -> list[int]:
    """Sizes to consider: about so many tokens, halved repeatedly down to one sequence."""
    sizes = [min(samples, max(1, tokens // length))]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    return sizes


def _too_little(plan: Plan, blocks: dict[str, str], batch_size: int | None) -> str:
    phase = max(_PHASES, key=lambda phase: plan._total("device", phase))
    parts = [part for part in plan.parts if part.where == "device" and part.phase in (phase, "all")]
    largest = sorted(parts, key=lambda part: part.bytes, reverse=True)[:3]
    smallest = ceil(plan.peak / 2**20)  # in whole MiB, rounded up so that this budget is enough
    what = ", ".join(f"{part.name} {describe_bytes(part.bytes)}" for part in largest)
    fixed = f" with batch_size (--batch-size) {batch_size}" if batch_size and batch_size > 1 else ""
    return (
        f"a memory_budget (--memory-budget) of {describe_bytes(plan.budget)} is too small{fixed}: the smallest that "
        f"would do is {smallest} MiB, which the {phase} phase of {blocks[phase]} needs ({what})"
    )


@dataclass(frozen=True)
class _Planner:
    stream: StreamedModel
    targets: dict[str, int]
    base: Base
    solver: SolverConfig
    samples: int
    length: int
    device: torch.device
    held: int
    refinement: RefinementConfig | None = None
    quantized_inputs: bool = False

    @cached_property
    def blocks(self) -> list[BlockSizes]:
        return block_sizes(self.stream, self.targets)

    @cached_property
    def on(self) -> Device:
        return Device.of(self.device, self.stream.dtype)

    def preferences(self, batches: Sequence[int], host_budget: int | None) -> Iterator[tuple[str, bool, int, int]]:
        """(states, prefetch, batch size, passes), the fastest first.

        Down to 2048 tokens a smaller batch costs next to nothing, so it is tried first. Next, no reading ahead: the
        device then waits for each block to be read, a few percent of the time with 4 M tokens. Hidden states on disk
        cost about as much on a CPU. Products of fewer than 2048 tokens cost more than that. Another pass is another
        forward pass, which almost doubles the time, so it is the last resort. A GPU keeps hidden states itself where
        there is room for them beside the fastest of all that: copying them may take as long as the forward pass.
        """
        places = ["host", "disk"]
        if self.device.type == "cuda":
            # They do not count against a GPU's budget, and a disk would be slower than the GPU.
            allowed = int(OF_FREE * free_memory(torch.device("cpu"))) if host_budget is None else host_budget
            places = ["host" if self.pinned_states(batches[0]) <= allowed else "disk"]
            yield "device", True, batches[0], 1
        large = [batch for batch in batches if batch == batches[0] or batch * self.length >= _FEWER_TOKENS]
        small = [batch for batch in batches if batch not in large]
        for passes in range(1, max(1, *(len(block.groups) for block in self.blocks)) + 1):
            for sizes in (large, small):
                for states in places:
                    for prefetch in (True, False):
                        for batch in sizes:
                            yield states, prefetch, batch, passes

    @cached_property
    def hidden(self) -> int:
        """Bytes of one token's hidden state in one stream."""
        config = self.stream.model.config.get_text_config(decoder=True)
        return config.hidden_size * self.stream.dtype.itemsize

    @property
    def streams(self) -> int:
        """How many sets of hidden states there are."""
        return 1 if self.refinement is None and not self.quantized_inputs else 2

    def pinned_states(self, batch: int) -> int:
        """Bytes of all hidden states in pinned memory: torch rounds each batch up to a power of two."""
        of_one = batch * self.length * self.hidden
        return self.streams * ceil(self.samples / batch) * (1 << (of_one - 1).bit_length())

    def plan(self, states: str, prefetch: bool, batch: int, passes: int, budget: int) -> tuple[Plan, dict[str, str]]:
        """The plan, and for each phase the block that needs most."""
        found: dict[str, tuple[int, str, list[Part]]] = {}

        def phase(name: str, block: str, *parts: tuple[str, int]) -> None:
            made = [Part(part, size, "device", name) for part, size in parts if size]
            if (total := sum(part.bytes for part in made)) > found.get(name, (-1,))[0]:
                found[name] = total, block, made

        on_gpu, tokens = self.device.type == "cuda", batch * self.length
        copied = states != ("device" if on_gpu else "host")  # hidden states, to where they are used
        around_blocks = self.stream.outside_blocks()
        around = ("embeddings and norm", self.stream.nbytes(*around_blocks))
        arguments = called_with(self.stream, batch, self.length)
        phase("embeddings", "the decoder", around, ("loading", self.stream.loading_nbytes(*around_blocks)))
        phase("embeddings", "the decoder", around, ("activations", outside(self.stream, batch, self.length)))
        # One block of each class is run on one token, to see whether it returns a tuple.
        once = max(block.weights + block.loading for block in self.blocks)
        phase("embeddings", "the decoder", around, ("a block, for one token", once))
        planned, seen = [], set()
        for index, block in enumerate(self.blocks):
            name, turns = self.stream.blocks[index].name, _turns(block, passes)
            planned.append(tuple(tuple(f"{name}.{w.name}" for i in turn for w in block.groups[i]) for turn in turns))
            follower = self.blocks[index + 1] if prefetch and index + 1 < len(self.blocks) else None
            if (kind := (id(block), id(follower))) in seen:
                continue
            seen.add(kind)
            resident = [("weights", block.weights), ("weights of the next block", follower.weights if follower else 0)]
            resident += [] if on_gpu else [("a tensor being cast", follower.cast if follower else 0)]
            inward = [
                ("masks and positions", arguments if on_gpu else 0),
                ("hidden states in", tokens * self.hidden if copied else 0),
            ]
            phase("load", name, ("weights", block.weights), ("loading", block.loading))
            active = activations(block, self.stream, batch, self.length, self.on)
            for turn in turns:
                groups = [block.groups[i] for i in turn]
                grams = [
                    ("H of " + ", ".join(w.name.rpartition(".")[2] for w in group), 4 * group[0].inputs ** 2)
                    for group in groups
                ]
                phase("forward", name, *resident, *grams, *inward, ("activations", active))
                for place, group in enumerate(groups):
                    codes, workspace = solving(group, self.base, self.solver, self.on, turn is turns[-1])
                    taken = [("quantized weights", codes), ("E and the solver", workspace)]
                    phase("solve", name, *resident, *grams[place:], *taken)
            if self.quantized_inputs:
                shapes = block, self.base
                size = self.stream.dtype.itemsize
                for group in block.groups:
                    compared = comparing(group, *shapes, self.on, size, tokens)
                    phase("forward", name, *resident, *inward, *compared, ("activations", active))
                    gram = ("H of the quantized model's inputs", 4 * group[0].inputs ** 2)
                    phase("solve", name, *resident, gram, *retargeting(group, *shapes, self.solver, self.on, size))
                whole = ("deployed linears", deployed(block.linears, self.base, self.on, size))
                phase("forward", name, *resident, *inward, whole, ("activations", active))
            if self.refinement is not None:
                phase(
                    "refine",
                    name,
                    *resident,
                    *inward,
                    *refining(block, self.stream, self.base, batch, self.length, self.on),
                )
        parts = [part for _, _, made in found.values() for part in made]
        parts += self._throughout(states, batch, arguments, max(total for total, _, _ in found.values()))
        plan = Plan(
            device=str(self.device),
            batch_size=batch,
            states=states,
            prefetch=prefetch,
            passes=tuple(planned),
            parts=tuple(parts),
            budget=budget,
            flops=self._flops(planned),
            read=around[1] + sum(block.weights for block in self.blocks),
        )
        return plan, {name: block for name, (_, block, _) in found.items()}

    def _throughout(self, states: str, batch: int, arguments: int, most: int) -> Iterator[Part]:
        """What is in memory throughout."""
        tokens, hidden = self.samples * self.length, self.streams * self.hidden
        on_gpu = self.device.type == "cuda"
        beside = "host" if on_gpu else "device"  # the host's memory
        if states == "disk":
            yield Part("hidden states", tokens * hidden, "disk", "all")
            if on_gpu:
                yield Part("hidden states of two batches", 2 * batch * self.length * self.hidden, "host", "all")
        elif on_gpu and states == "host":
            yield Part("hidden states", self.pinned_states(batch), "host", "all")
        else:
            yield Part("hidden states", tokens * hidden, "device", "all")
            most += tokens * hidden
        yield Part("tokens and their mask", 9 * tokens, beside, "all")
        yield Part("masks and positions", arguments, beside, "all")
        factors = [sum(4 * w.rank * (w.outputs + w.inputs) for w in block.linears) for block in self.blocks]
        yield Part("factors of a block", max(factors), beside, "all")
        yield Part("factors of all blocks", sum(factors), "disk", "all")
        if on_gpu:
            loading = max(block.loading for block in self.blocks)
            yield Part("weights being read", STAGING_BYTES + loading, "host", "all")
        if self.held:
            yield Part("held already", self.held, "device", "all")
        yield Part("allocator and libraries", overhead(most, self.device), "device", "all")

    def _flops(self, planned: Sequence[tuple[tuple[str, ...], ...]]) -> dict[str, int]:
        tokens = self.samples * self.length
        products = SOLVERS[self.solver.name].products(self.solver.steps)
        linears = [w for block in self.blocks for w in block.linears]
        # Two for each weight and token; in attention, four for each pair of tokens and channel.
        pairs = 4 * self.length * self.stream.model.config.get_text_config(decoder=True).hidden_size
        forward = [2 * block.multiplied + pairs for block in self.blocks]
        depth = {}
        if self.quantized_inputs:
            through = 0 if self.refinement is not None else sum(forward)  # the quantized blocks
            depth = {"inputs": tokens * (through + sum(work(block, pairs) for block in self.blocks))}
        if self.refinement is not None:
            # A step is a forward pass, one back to the inputs, and the factors' part of both. And each token passes
            # through the quantized block once.
            steps = 3 * self.refinement.steps * max(self.refinement.tokens, self.length)
            depth |= {"refine": (steps + tokens) * sum(forward)}
        return {
            "forward": tokens * sum(of * len(turns) for of, turns in zip(forward, planned, strict=True)),
            # One triangle: n² per token.
            "H": tokens * sum(group[0].inputs ** 2 for block in self.blocks for group in block.groups),
            # The initial objective, on one triangle of H; products with E, and half as many with H.
            "solve": sum(
                w.outputs * w.inputs**2 + products * w.rank * (2 * w.outputs * w.inputs + w.inputs**2) for w in linears
            ),
            **depth,
        }

    def seconds(self, plan: Plan) -> float | None:
        """From the measured speed of a matrix product and an assumed read rate; None if the device is not here."""
        if self.device.type == "cuda" and not torch.cuda.is_available():
            return None
        rate, exact_rate = (_rate(self.device, dtype) for dtype in (self.stream.dtype, torch.float32))
        # Plain PyTorch multiplies in fp32 for H, the extension in the dtype of the inputs.
        h_rate = rate if self.on.extension else exact_rate
        computing = plan.flops["forward"] / rate + plan.flops["H"] / h_rate + plan.flops["solve"] / exact_rate
        computing += (plan.flops.get("inputs", 0) + plan.flops.get("refine", 0)) / rate
        reading = plan.read / _READ_RATE
        moved = 0.0
        if plan.states == "disk":
            # Each is read and written once for each block, or read once more for each input.
            times = 2 * self.streams * len(self.blocks)
            times += sum(2 * len(block.groups) - 1 for block in self.blocks) if self.quantized_inputs else 0
            moved = times * self.samples * self.length * self.hidden / _READ_RATE
        return (max(computing, reading) if plan.prefetch else computing + reading) + moved


def _turns(block: BlockSizes, passes: int) -> list[list[int]]:
    """The groups of a block by pass, so that the H of each pass take about the same memory. The largest H is in the
    last pass, after which weights may be overwritten."""
    turns: list[list[int]] = [[] for _ in range(min(passes, max(1, len(block.groups))))]
    squares = [group[0].inputs ** 2 for group in block.groups]
    for i in sorted(range(len(squares)), key=lambda i: -squares[i]):
        min(turns, key=lambda turn: sum(squares[j] for j in turn)).append(i)
    return [sorted(turn) for turn in turns[::-1]]


def _rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of a matrix product."""
    side = 4096 if device.type == "cuda" else 1024
    a = torch.zeros(side, side, dtype=dtype, device=device)
    with ops.half_products(device, [dtype]):
        float((a @ a)[0, 0])  # warm-up
        times, start = 0, perf_counter()
        while (elapsed := perf_counter() - start) < 0.1:
            float((a @ a)[0, 0])  # waits for the result
            times += 1
    return 2 * side**3 * times / elapsed
