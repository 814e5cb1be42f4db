"""Shapes and a memory budget -> a plan: what is where, the size of a micro-batch, and in how many passes a block runs.

For each block a run has in memory, one after the other,

    load       its weights while they are read, and the next block's never: that one comes while this one is worked on
    forward    weights, those of the next block, one H (n x n, fp32) of each distinct input of the pass, activations
    solve      weights, those of the next block, the H not used yet, quantized weights, E in its form, the solver's thin
               matrices: one group of linears that share an input at a time

and before the first block the embeddings. The hidden states of all tokens are beside all this: in host memory, or in a
file. On a CPU, device and host are one memory and everything counts; on a GPU only what torch allocates there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

import psutil
import torch

from quailora import ops
from quailora.errors import BudgetError, QuailoraError
from quailora.memory import dry_run as rehearsal
from quailora.memory.dry_run import BlockRun, Input, ModelRun, Weight
from quailora.modeling.blocks import Block, linear_weight
from quailora.modeling.prefetch import STAGING_BYTES
from quailora.modeling.streamed_model import StreamedModel
from quailora.quantization.protocol import QuantizedBase
from quailora.solvers.config import SolverConfig
from quailora.solvers.registry import SOLVERS

TOKENS_PER_BATCH = 8192  # enough for matrix products to be efficient, little beside a block's weights
_FEWER_TOKENS = 2048  # still efficient; below, each halving of the batch costs time

# What no shapes tell: allocators round up and leave gaps, BLAS packs its operands, threads have stacks. A GPU's caching
# allocator keeps pieces of 2 MiB and up, and cuBLAS takes a workspace of 32 MiB (on Hopper; 8 elsewhere). A CPU
# with AVX-512 took 40 MiB, one with AVX2 20 MiB.
_SLACK = 0.03
_LIBRARIES = {
    "cpu": (40 if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else 30) * 2**20,
    "cuda": 64 * 2**20,
}

_READ_RATE = 2e9  # bytes per second of an NVMe disk, assumed

_UNITS = {"": 1, "B": 1} | {f"{letter}{binary}B": (1024 if binary else 1000) ** power
                            for power, letter in enumerate("KMGT", 1) for binary in ("i", "")}  # fmt: skip


# ---- bytes


def parse_bytes(text: str | int) -> int:
    """ "12GiB" -> 12 * 2**30. Units KiB to TiB and KB to TB, in any case; a plain number is bytes.

    Raises QuailoraError for anything else, and for what is no byte at all.
    """
    units = {unit.lower(): size for unit, size in _UNITS.items()}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(text).strip().lower())
    size = int(float(match[1]) * units[match[2]]) if match and match[2] in units else 0
    if size < 1:
        raise QuailoraError(f"'{text}' is no amount of memory: write it as 12GiB, 800MB or a number of bytes")
    return size


def describe_bytes(size: int) -> str:
    """Such as "12.5 GiB"."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size >= _UNITS[unit]:
            return (
                f"{size / _UNITS[unit]:.3g} {unit}" if size < 1000 * _UNITS[unit] else f"{size // _UNITS[unit]} {unit}"
            )
    return f"{size} B"


def free_memory(device: torch.device) -> int:
    """Bytes that could be allocated: of a GPU's memory, or of the host's within the process's control group."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([psutil.virtual_memory().available, *_left_in_groups(Path("/sys/fs/cgroup"))])


def _left_in_groups(root: Path) -> Iterator[int]:
    """Limit less usage, of every control group (version 2 or 1) that this process is in."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, limit, usage = (
            (root, "memory.max", "memory.current")
            if controllers == ""
            else (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes")
        )
        folder = top / path.lstrip("/")
        for group in (folder, *folder.parents):  # in a container the path may be that of the host; the top one exists
            try:
                allowed, used = (group / limit).read_text().strip(), int((group / usage).read_text())
                # Pages of files are given back when they are needed. Version 1 counts those of groups within apart.
                stat = (group / "memory.stat").read_text()
                reclaimable = re.findall(r"^(?:total_)?inactive_file (\d+)", stat, re.MULTILINE)[-1:]
                if allowed.isdigit():
                    yield max(0, int(allowed) - used + sum(map(int, reclaimable)))
            except (OSError, ValueError):
                pass  # no such group here
            if group == top:
                break


# ---- the plan


@dataclass(frozen=True)
class Part:
    """Something that takes memory.

    where: "device", "host" or "disk". phase: when, see the module's first lines; "all" is throughout.
    """

    name: str
    bytes: int
    where: str
    phase: str


@dataclass(frozen=True)
class Plan:
    """How a run goes about it, and what it will take. For each phase `parts` are those of its most demanding block."""

    device: str
    batch_size: int
    states: str  # where hidden states are between blocks: "host" or "disk"
    prefetch: bool
    passes: tuple[tuple[tuple[str, ...], ...], ...]  # by block: the linears whose inputs each pass takes
    parts: tuple[Part, ...]
    budget: int
    flops: dict[str, int]  # "forward", "H", "solve"
    read: int  # bytes of weights
    seconds: float | None = None  # None: not estimated, the device is not here
    exact: bool = True  # False: activations of some block are an upper bound, it does not run on shapes alone

    @property
    def peak(self) -> int:
        """Bytes on the device at their most."""
        return max(self._total("device", phase) for phase in ("embeddings", "load", "forward", "solve"))

    @property
    def host(self) -> int:
        """Bytes of host memory beside a GPU; on a CPU there is no other memory than the device's."""
        return self._total("host", "all")

    @property
    def disk(self) -> int:
        return self._total("disk", "all")

    def _total(self, where: str, phase: str) -> int:
        return sum(part.bytes for part in self.parts if part.where == where and part.phase in (phase, "all"))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self) | {"peak": self.peak, "host": self.host, "disk": self.disk}

    def text(self) -> str:
        """What a person wants to know of it."""
        most = max(map(len, self.passes), default=1)
        lines = [
            f"on {self.device}, budget {describe_bytes(self.budget)}: micro-batches of {self.batch_size} sequences, "
            f"{f'{most} passes' if most > 1 else 'one pass'} over a block's inputs, hidden states on {self.states}, "
            f"{'the next block is' if self.prefetch else 'no block is'} read ahead",
            "",
        ]
        width = max(len(part.name) for part in self.parts)
        for where, phases in (
            ("device", ("embeddings", "load", "forward", "solve", "all")),
            ("host", ("all",)),
            ("disk", ("all",)),
        ):
            for phase in phases:
                parts = [part for part in self.parts if (part.where, part.phase) == (where, phase)]
                label = {"device": f"{phase} " if phase != "all" else "throughout "}.get(where, f"{where} ")
                for part in parts:
                    lines.append(f"{label:<11} {part.name:<{width}}  {describe_bytes(part.bytes):>9}")
                    label = ""
        lines += ["", f"peak        {describe_bytes(self.peak)}, host {describe_bytes(self.host)}, "
                      f"disk {describe_bytes(self.disk)}"]  # fmt: skip
        counts = ", ".join(f"{stage} {count:.2g}" for stage, count in self.flops.items())
        lines.append(f"FLOPs       {counts}; {describe_bytes(self.read)} of weights to read")
        time = "not estimated: the device is not here" if self.seconds is None else _duration(self.seconds)
        lines.append(f"time        {time}")
        if not self.exact:
            lines.append("activations of some blocks are upper bounds: they do not run on shapes alone")
        return "\n".join(lines)


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours:
        return f"about {hours} h {minutes:02} min"
    return f"about {minutes} min" if seconds > 90 else f"about {max(1, round(seconds))} s"


def make_plan(
    stream: StreamedModel,
    targets: Mapping[str, int],
    form: QuantizedBase,
    settings: SolverConfig,
    *,
    samples: int,
    sequence_length: int,
    memory_budget: int | None,
    host_memory_budget: int | None,
    batch_size: int | None = None,
    held: int = 0,
    device: torch.device | None = None,
    timed: bool = False,
) -> Plan:
    """The fastest plan whose peak is within the budget. No weight is read.

    targets: linears by name, with the rank of each.
    samples, sequence_length: so many sequences, none longer.
    memory_budget: of the device; None is nine tenths of what is free. On a CPU everything counts against it.
    host_memory_budget: what hidden states may take of the host's memory beside a GPU; None is nine tenths of what is
        free.
    batch_size: the only one to consider; None chooses.
    held: bytes that the process holds of the budget already.
    device: where the run will be, if not the device of `stream`: it need not be here.
    timed: measure how fast this device multiplies, and estimate the time.

    Raises BudgetError if no plan fits, naming the smallest budget that one would fit and what needs it.
    """
    facts = _Facts(stream, dict(targets), form, settings, samples, sequence_length, device or stream.device, held)
    if memory_budget is None and facts.device.type == "cuda" and not torch.cuda.is_available():
        raise QuailoraError("there is no CUDA device here to ask what is free: give a memory budget (--memory-budget)")
    budget = int(0.9 * free_memory(facts.device)) + held if memory_budget is None else memory_budget
    batches = [min(batch_size, samples)] if batch_size else _batches(samples, sequence_length)
    least: tuple[Plan, dict[str, str]] | None = None
    for states, prefetch, batch, passes in _preferences(facts, batches, host_memory_budget):
        plan, culprits = facts.plan(states, prefetch, batch, passes, budget)
        if plan.peak <= budget:
            return replace(plan, seconds=facts.seconds(plan)) if timed else plan
        if least is None or plan.peak < least[0].peak:
            least = plan, culprits
    assert least is not None
    raise BudgetError(_too_little(*least, batch_size))


def _batches(samples: int, length: int) -> list[int]:
    """Sizes to consider: about 8192 tokens, and halves of that down to one sequence."""
    sizes = [min(samples, max(1, TOKENS_PER_BATCH // length))]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    return sizes


def _preferences(
    facts: _Facts, batches: Sequence[int], host_budget: int | None
) -> Iterator[tuple[str, bool, int, int]]:
    """(states, prefetch, batch size, passes), the fastest first.

    Down to 2048 tokens a smaller batch costs next to nothing, so it is given up first. Then reading ahead: without it
    the device waits for a block to be read, some hundredths of the time that a block takes with 4 M tokens. Hidden
    states on disk are read and written once for each block: on a CPU that, too, is some hundredths of its forward
    pass. Matrix products of less than 2048 tokens are slow by more than that. A pass more is one more forward pass,
    which almost doubles the time: the last resort.
    """
    if facts.device.type == "cuda":
        # Beside a GPU they take nothing of its budget; a disk would be slower than the GPU.
        allowed = int(0.9 * free_memory(torch.device("cpu"))) if host_budget is None else host_budget
        places = ["host" if facts.pinned_states(batches[0]) <= allowed else "disk"]
    else:
        places = ["host", "disk"]
    large = [batch for batch in batches if batch == batches[0] or batch * facts.length >= _FEWER_TOKENS]
    small = [batch for batch in batches if batch not in large]
    for passes in range(1, facts.most_passes(batches[0]) + 1):
        for sizes in (large, small):
            for states in places:
                for prefetch in (True, False):
                    for batch in sizes:
                        yield states, prefetch, batch, passes


def _too_little(plan: Plan, culprits: dict[str, str], batch_size: int | None) -> str:
    phase = max(("embeddings", "load", "forward", "solve"), key=lambda phase: plan._total("device", phase))
    parts = [part for part in plan.parts if part.where == "device" and part.phase in (phase, "all")]
    largest = sorted(parts, key=lambda part: part.bytes, reverse=True)[:3]
    # In whole MiB, so that what is named really will do.
    smallest = -(-plan.peak // 2**20)
    what = ", ".join(f"{part.name} {describe_bytes(part.bytes)}" for part in largest)
    fixed = f" with batch_size {batch_size}" if batch_size and batch_size > 1 else ""
    return (
        f"a memory budget of {describe_bytes(plan.budget)} is too small{fixed}: the smallest that would do is "
        f"{smallest} MiB, which the {phase} phase of {culprits[phase]} needs ({what})"
    )


# ---- the arithmetic


@dataclass(frozen=True)
class _Facts:
    """What plans are made of; each is found once, when it is needed first."""

    stream: StreamedModel
    targets: dict[str, int]
    form: QuantizedBase
    settings: SolverConfig
    samples: int
    length: int
    device: torch.device
    held: int

    @cached_property
    def _memory(self) -> dict[Any, Any]:
        """Rehearsals, by what was rehearsed."""
        return {}

    def run(self, batch: int) -> ModelRun:
        if batch not in self._memory:
            self._memory[batch] = rehearsal.forward(
                self.stream,
                self.targets.keys(),
                batch,
                self.length,
                device=self.device.type,
                gram=self._backend("gram_", "reference"),
            )
        return self._memory[batch]

    def solve(self, weights: tuple[Weight, ...], overwrite: bool) -> tuple[int, int]:
        """Bytes of the quantized weights, and what the solver takes beside them."""
        key = (weights, overwrite)
        if key not in self._memory:
            codes, most = rehearsal.solve(
                weights,
                self.form,
                self.settings.name,
                self.settings.iterations,
                overwrite=overwrite,
                device=self.device.type,
                products=self._backend("grouped_error_product", "triton"),
            )
            self._memory[key] = codes, most - codes
        return self._memory[key]

    def _backend(self, operation: str, elsewhere: str) -> str:
        """Which serves an operation on the device; `elsewhere` if the device is not here to be asked."""
        if self.device.type == "cuda" and not torch.cuda.is_available():
            return elsewhere
        return ops.backends(self.device)[operation].backend

    def most_passes(self, batch: int) -> int:
        return max(1, *(len(run.inputs) for run in self.run(batch).blocks))

    @cached_property
    def _linears(self) -> dict[str, Weight]:
        found = {}
        for block in self.stream.blocks:
            for name, linear in block.linears().items():
                if name in self.targets:
                    weight = linear_weight(linear)
                    transposed = not isinstance(linear, torch.nn.Linear)
                    found[name] = Weight(weight.shape[0], weight.shape[1], self.targets[name], weight.dtype, transposed)
        return found

    @cached_property
    def _hidden(self) -> int:
        """Bytes of the hidden states of one token."""
        config = self.stream.model.config.get_text_config(decoder=True)
        return config.hidden_size * self.stream.dtype.itemsize

    def _weights(self, block: Block) -> tuple[int, int, int]:
        """Bytes of a block's weights, what loading takes beside them, and the largest tensor that is cast."""
        prefix = f"{block.name}."
        sources = [(name, self.stream.source(f"{prefix}{name}"), p) for name, p in block.module.named_parameters()]
        entries = [(name, self.stream.checkpoint.tensors[key] if key else None, p) for name, key, p in sources]
        # Blocks of one kind are asked for once: it takes a walk over the whole model.
        kind = tuple((name, entry and entry.torch_dtype, p.shape, p.dtype) for name, entry, p in entries)
        if kind not in self._memory:
            cast = [entry.nbytes for _, entry, p in entries if entry and entry.torch_dtype != p.dtype]
            nbytes, loading = self.stream.nbytes(prefix), self.stream.loading_nbytes(prefix)
            self._memory[kind] = nbytes, loading, max(cast, default=0)
        return self._memory[kind]

    def pinned_states(self, batch: int) -> int:
        """Bytes of all hidden states in page-locked memory, which torch rounds up to a power of two for each batch."""
        of_one = batch * self.length * self._hidden
        return -(-self.samples // batch) * (1 << (of_one - 1).bit_length())

    def plan(self, states: str, prefetch: bool, batch: int, passes: int, budget: int) -> tuple[Plan, dict[str, str]]:
        """The plan, and the block that each phase is most demanding for."""
        run = self.run(batch)
        found: dict[str, tuple[int, str, list[Part]]] = {}

        def phase(name: str, culprit: str, *parts: tuple[str, int]) -> None:
            made = [Part(part, size, "device", name) for part, size in parts if size]
            if (total := sum(part.bytes for part in made)) > found.get(name, (-1,))[0]:
                found[name] = total, culprit, made

        blocks, outside = self.stream.blocks, self.stream.outside_blocks()
        on_gpu = self.device.type == "cuda"
        around = ("embeddings and norm", self.stream.nbytes(*outside))
        phase("embeddings", "the decoder", around, ("loading", self.stream.loading_nbytes(*outside)))
        phase("embeddings", "the decoder", around, ("activations", run.outside))
        # What a block returns is learned by running one of each class on one token.
        once = max(sum(self._weights(block)[:2]) for block in {type(b.module): b for b in blocks[::-1]}.values())
        phase("embeddings", "the decoder", around, ("a block, for one token", once))
        planned = []
        done = set()
        for index, (block, of_block) in enumerate(zip(blocks, run.blocks, strict=True)):
            turns = _turns(of_block, passes)
            planned.append(tuple(tuple(name for i in turn for name in of_block.inputs[i].linears) for turn in turns))
            own, loading, _ = self._weights(block)
            ahead, _, cast = self._weights(blocks[index + 1]) if prefetch and index + 1 < len(blocks) else (0, 0, 0)
            groups = [tuple(self._linears[name] for name in one.linears) for one in of_block.inputs]
            # Deep models are made of few kinds of blocks.
            alike = (
                own,
                loading,
                ahead,
                cast,
                of_block.peak,
                of_block.peak_in_turn,
                of_block.arguments,
                tuple(groups),
                tuple(map(tuple, turns)),
            )
            if alike in done:
                continue
            done.add(alike)
            resident = [("weights", own), ("weights of the next block", ahead)]
            resident += [] if on_gpu else [("a tensor being cast", cast)]
            inward = [
                ("masks and positions", of_block.arguments if on_gpu else 0),
                ("hidden states in", batch * self.length * self._hidden if on_gpu or states == "disk" else 0),
            ]
            phase("load", block.name, ("weights", own), ("loading", loading))
            for turn in turns:
                grams = [(_described(of_block.inputs[i]), 4 * of_block.inputs[i].features ** 2) for i in turn]
                active = of_block.peak if on_gpu or len(turns) > 1 else of_block.peak_in_turn
                phase("forward", block.name, *resident, *grams, *inward, ("activations", active))
                for place, i in enumerate(turn):
                    codes, workspace = self.solve(groups[i], overwrite=turn is turns[-1])
                    solving = [("quantized weights", codes), ("E and the solver", workspace)]
                    phase("solve", block.name, *resident, *grams[place:], *solving)
        parts = [part for _, _, made in found.values() for part in made]
        parts += self._throughout(states, batch, max(total for total, _, _ in found.values()))
        plan = Plan(
            device=str(self.device),
            batch_size=batch,
            states=states,
            prefetch=prefetch,
            passes=tuple(planned),
            parts=tuple(parts),
            budget=budget,
            flops=self._flops(run, planned, batch),
            read=self.stream.nbytes(*outside) + sum(self._weights(block)[0] for block in blocks),
            exact=all(of_block.exact for of_block in run.blocks),
        )
        return plan, {name: culprit for name, (_, culprit, _) in found.items()}

    def _throughout(self, states: str, batch: int, most: int) -> Iterator[Part]:
        """What is there all the time."""
        tokens = self.samples * self.length
        on_gpu = self.device.type == "cuda"
        beside = "host" if on_gpu else "device"  # the host's memory
        if states == "disk":
            yield Part("hidden states", tokens * self._hidden, "disk", "all")
            if on_gpu:
                yield Part("hidden states of two batches", 2 * batch * self.length * self._hidden, "host", "all")
        else:
            size = self.pinned_states(batch) if on_gpu else tokens * self._hidden
            yield Part("hidden states", size, beside, "all")
            most += 0 if on_gpu else size
        yield Part("tokens and their mask", 9 * tokens, beside, "all")
        arguments = max(run.arguments for run in self.run(batch).blocks)
        yield Part("masks and positions", arguments, beside, "all")
        factors = {name: 4 * w.rank * (w.outputs + w.inputs) for name, w in self._linears.items()}
        of_blocks = [sum(factors.get(name, 0) for name in block.linears()) for block in self.stream.blocks]
        yield Part("factors of a block", max(of_blocks), beside, "all")
        yield Part("factors of all blocks", sum(of_blocks), "disk", "all")
        if on_gpu:
            loading = max(self._weights(block)[1] for block in self.stream.blocks)
            yield Part("weights being read", STAGING_BYTES + loading, "host", "all")
        if self.held:
            yield Part("held already", self.held, "device", "all")
        yield Part("allocator and libraries", int(_SLACK * most) + _LIBRARIES.get(self.device.type, 0), "device", "all")

    def _flops(self, run: ModelRun, planned: Sequence[tuple[tuple[str, ...], ...]], batch: int) -> dict[str, int]:
        tokens = self.samples * self.length
        batches = self.samples / batch
        method, iterations = SOLVERS[self.settings.name], self.settings.iterations
        products = method.products((method.iterations or 0) if iterations is None else iterations)
        return {
            "forward": int(batches * sum(of.flops * len(turns) for of, turns in zip(run.blocks, planned, strict=True))),
            # One triangle: n² a token.
            "H": tokens * sum(one.features**2 for of_block in run.blocks for one in of_block.inputs),
            # The objective it starts at, on one triangle of H; products with E, and half as many with H.
            "solve": sum(
                w.outputs * w.inputs**2 + products * w.rank * (2 * w.outputs * w.inputs + w.inputs**2)
                for w in self._linears.values()
            ),
        }

    def seconds(self, plan: Plan) -> float | None:
        """At the rate of a matrix product here, and an assumed rate of reading; None if the device is not here."""
        if self.device.type == "cuda" and not torch.cuda.is_available():
            return None
        rate, exact_rate = (_rate(self.device, dtype) for dtype in (self.stream.dtype, torch.float32))
        # Plain PyTorch adds up H in fp32, the extension from the inputs as they are.
        h_rate = exact_rate if self._backend("gram_", "reference") == "reference" else rate
        computing = plan.flops["forward"] / rate + plan.flops["H"] / h_rate + plan.flops["solve"] / exact_rate
        reading = plan.read / _READ_RATE
        moved = 0.0
        if plan.states == "disk":
            moved = 2 * len(self.stream.blocks) * self.samples * self.length * self._hidden / _READ_RATE
        return (max(computing, reading) if plan.prefetch else computing + reading) + moved


def _turns(run: BlockRun, passes: int) -> list[list[int]]:
    """The inputs of a block by passes, so that the H of each take about the same memory; the largest H in the last
    pass, after which weights may be overwritten."""
    turns: list[list[int]] = [[] for _ in range(min(passes, max(1, len(run.inputs))))]
    for i in sorted(range(len(run.inputs)), key=lambda i: -run.inputs[i].features):
        min(turns, key=lambda turn: sum(run.inputs[j].features ** 2 for j in turn)).append(i)
    return [sorted(turn) for turn in turns[::-1]]


def _described(one: Input) -> str:
    """By the last part of names, which others may share."""
    return "H of " + ", ".join(name.rpartition(".")[2] for name in one.linears)


def _rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of a matrix product."""
    side = 4096 if device.type == "cuda" else 1024
    a = torch.zeros(side, side, dtype=dtype, device=device)
    with ops.half_products(device, [dtype]):
        float((a @ a)[0, 0])  # the first prepares
        count, start = 0, perf_counter()
        while (elapsed := perf_counter() - start) < 0.1:
            float((a @ a)[0, 0])  # waits
            count += 1
    del a
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the allocator keeps counts against the budget
    return 2 * side**3 * count / elapsed
