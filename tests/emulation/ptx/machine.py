"""One block of threads executing a PTX program: a numpy lane per thread, all lanes at the lowest address together.

Semantics and lane layouts are those of NVIDIA's PTX ISA manual, chapter "Instruction Set".
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .memory import Bytes, EmulationError, GlobalMemory, Integers, Memory, agents
from .program import Address, Immediate, Instruction, Operand, Program, Register, Symbol, Vector

Lanes = NDArray[Any]  # one value per thread
Mask = NDArray[np.bool_]

WARP = 32
POISON = 0xFF  # of memory and registers never written: NaN as a float, bf16 or fp16
ENDED = np.iinfo(np.int64).max  # the address of a thread that has returned
PARAMETER_BYTES = 8  # of the space that a kernel's parameters stand in: none is larger


class Deadlock(EmulationError):
    pass


class Divergence(EmulationError):
    """An instruction for whole warps met by some of a warp's lanes."""


class Unsupported(EmulationError):
    pass


@dataclass
class Counters:
    """What a launch did. `instructions` counts by opcode, once per warp that executes it."""

    instructions: Counter[str] = field(default_factory=Counter)
    bytes_read: Counter[str] = field(default_factory=Counter)  # global memory, by argument
    bytes_written: Counter[str] = field(default_factory=Counter)
    bytes_touched: Counter[str] = field(default_factory=Counter)  # of those read: each byte of the argument once

    def count(self, prefix: str) -> int:
        """Warp instructions whose opcode starts with `prefix`; "" for all."""
        return sum(number for opcode, number in self.instructions.items() if opcode.startswith(prefix))


# ---- number formats


UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
FORMATS: dict[str, Any] = {
    **{f"{kind}{8 * size}": dtype for kind in "bu" for size, dtype in UNSIGNED.items()},
    **{f"s{8 * size}": dtype for size, dtype in SIGNED.items()},
    **{"f16": np.float16, "f32": np.float32, "f64": np.float64, "pred": np.bool_},
    **{"bf16": np.uint16, "tf32": np.float32, "f16x2": np.uint32, "bf16x2": np.uint32},  # the bits: see `decode`
}


def bfloat16_to_float32(bits: Lanes) -> Lanes:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float32_to_bfloat16(values: Lanes) -> Lanes:
    """The bits, rounded to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)


def decode(bits: Lanes, kind: str) -> Lanes:
    """Values of a format that numpy lacks, as float32 or float16; a packed pair becomes the last dimension."""
    if kind.endswith("x2"):
        return decode(bits.view(np.uint16).reshape(*bits.shape, 2), kind[:-2])
    if kind == "bf16":
        return bfloat16_to_float32(bits)
    return bits.view(FORMATS[kind])


def encode(values: Lanes, kind: str) -> Lanes:
    if kind.endswith("x2"):
        return np.ascontiguousarray(encode(values, kind[:-2])).view(np.uint16).view(np.uint32)[..., 0]
    if kind == "bf16":
        return float32_to_bfloat16(values)
    return values.astype(FORMATS[kind])


# ---- operations on values


def _multiply_add(a: Lanes, b: Lanes, c: Lanes) -> Lanes:
    """Rounded once, but for a last bit in rare cases: the sum is rounded in float64 first."""
    wide = np.float64 if a.dtype.kind == "f" else a.dtype
    return (a.astype(wide) * b.astype(wide) + c.astype(wide)).astype(a.dtype)


def _divide(a: Lanes, b: Lanes) -> Lanes:
    if a.dtype.kind == "f":
        return a / b
    magnitude = np.abs(a.astype(object)) // np.abs(np.where(b == 0, 1, b).astype(object))
    return np.where((a < 0) != (b < 0), -magnitude, magnitude).astype(a.dtype)


def _shift(a: Lanes, distance: Lanes, left: bool) -> Lanes:
    """Distances of the width and more give what shifting one by one would."""
    bits = 8 * a.dtype.itemsize
    small = np.minimum(distance, bits - 1).astype(a.dtype)
    shifted = a << small if left else a >> small
    return np.where(distance < bits, shifted, a >> small if a.dtype.kind == "i" and not left else 0).astype(a.dtype)


VALUES: dict[str, Callable[..., Lanes]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "mad": _multiply_add,
    "fma": _multiply_add,
    "div": _divide,
    "rem": lambda a, b: a - _divide(a, b) * b,
    "min": np.fmin,
    "max": np.fmax,
    "neg": np.negative,
    "abs": np.abs,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: 1 / np.sqrt(a),
    "rcp": lambda a: 1 / a,
    "ex2": np.exp2,
    "lg2": np.log2,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
}

COMPARISONS: dict[str, Callable[[Lanes, Lanes], Mask]] = {
    **{"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater},
    **{"ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal},
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
}


# ---- which elements of a matrix each lane holds (ISA: "Matrix Fragments for mma.m16n8k16", "... for mma.m16n8k8")

LANE = np.arange(WARP)[:, None]
GROUP, IN_GROUP = LANE // 4, LANE % 4
E2, E4, E8 = np.arange(2), np.arange(4), np.arange(8)  # elements a lane holds
# operand -> row and column, each (lane, element)
FRAGMENTS_16_BIT = {
    "a": (GROUP + 8 * (E8 // 2 % 2), 2 * IN_GROUP + E8 % 2 + 8 * (E8 // 4)),  # 16 × 16
    "b": (2 * IN_GROUP + E4 % 2 + 8 * (E4 // 2), GROUP + 0 * E4),  # 16 × 8
}
FRAGMENTS_TF32 = {
    "a": (GROUP + 8 * (E4 % 2), IN_GROUP + 4 * (E4 // 2)),  # 16 × 8
    "b": (IN_GROUP + 4 * E2, GROUP + 0 * E2),  # 8 × 8
}
FRAGMENT_ACCUMULATOR = (GROUP + 8 * (E4 // 2), 2 * IN_GROUP + E4 % 2)  # 16 × 8


def _matrix(fragment: Lanes, layout: tuple[Integers, Integers]) -> Lanes:
    """(warps, 32, elements) as the lanes hold them -> (warps, rows, columns)."""
    rows, columns = layout
    matrix = np.empty((len(fragment), rows.max() + 1, columns.max() + 1), fragment.dtype)
    matrix[:, rows, columns] = fragment
    return matrix


@dataclass
class Copy:
    """A cp.async that has not landed."""

    lanes: Integers
    targets: Integers
    values: Bytes
    groups: Integers  # by lane: the number of the commit group


class Block:
    """A block of threads with its registers and shared memory. `index` and `grid` are three numbers each."""

    def __init__(
        self,
        program: Program,
        parameters: dict[str, Any],
        memory: GlobalMemory,
        shared_bytes: int,
        index: tuple[int, int, int],
        grid: tuple[int, int, int],
        counters: Counters,
    ) -> None:
        self.program, self.parameters, self.memory, self.counters = program, parameters, memory, counters
        self.threads = program.threads
        if self.threads % WARP:
            raise Unsupported(f"{self.threads} threads are no whole number of warps")
        self.shared = Memory("shared memory", np.full(shared_bytes, POISON, np.uint8))
        self.lane = np.arange(self.threads)
        self.number = index[0] + grid[0] * (index[1] + grid[1] * index[2])
        self.registers: dict[str, Lanes] = {"%tid.x": self.lane.astype(np.uint32)}
        self.registers["%laneid"] = self.registers["%tid.x"] % np.uint32(WARP)
        constants = {"%ntid": (self.threads, 1, 1), "%ctaid": index, "%nctaid": grid, "%tid": (None, 0, 0)}
        for name, values in constants.items():
            for axis, value in zip("xyz", values, strict=True):
                if value is not None:
                    self.registers[f"{name}.{axis}"] = np.full(self.threads, value, np.uint32)
        self.address = np.zeros(self.threads, np.int64)  # of each thread's next instruction
        self.waiting = np.zeros(self.threads, np.bool_)  # at a barrier
        self.barriers = 0  # passed
        self.copies: list[Copy] = []
        self.committed = np.zeros(self.threads, np.int64)  # commit groups, by thread
        self.mask = np.ones(self.threads, np.bool_)  # the lanes that execute the current instruction

    def run(self, step_limit: int) -> None:
        with np.errstate(all="ignore"):  # overflow, division by zero and NaN are the program's business
            for _ in range(step_limit):
                if (self.address == ENDED).all():
                    return
                self._step()
        raise Deadlock(f"the block still runs after {step_limit} instructions")

    def _step(self) -> None:
        runnable = ~self.waiting & (self.address != ENDED)
        if not runnable.any():
            if not self.waiting.all():
                raise Deadlock(
                    f"{self.waiting.sum()} threads wait at a barrier, the other {(~self.waiting).sum()} ended"
                )
            self.waiting[:] = False
            self.barriers += 1
            return
        current = self.address[runnable].min()
        instruction = self.program.instructions[current]
        here = runnable & (self.address == current)
        self.address[here] = current + 1 if current + 1 < len(self.program.instructions) else ENDED
        try:
            self.mask = here
            if instruction.predicate:
                self.mask = here & (self.read(instruction.predicate, "pred") ^ instruction.negated)
            self.counters.instructions[instruction.opcode] += int(here.reshape(-1, WARP).any(1).sum())
            if self.mask.any():
                self._execute(instruction)
        except EmulationError as error:
            error.add_note(f"block {self.number}, {instruction.where}")
            raise

    def _execute(self, instruction: Instruction) -> None:
        method = getattr(self, f"op_{instruction.root}", None)
        if method:
            method(instruction, *instruction.operands)
        elif instruction.root in VALUES and instruction.type in FORMATS:
            self._compute(instruction)
        else:
            raise Unsupported(f"no {instruction.opcode}")

    # ---- registers

    def read(self, operand: Operand, kind: str) -> Lanes:
        """The operand in every thread, as numpy's type for `kind`; the bits where it has none: see `decode`."""
        dtype = np.dtype(FORMATS[kind])
        match operand:
            case Register(name):
                if name not in self.registers:
                    self.registers[name] = self._poison(name)
                bits = self.registers[name]
            case Immediate(value):
                size = 8 * dtype.itemsize
                bits = np.full(self.threads, value & (2**size - 1), UNSIGNED[dtype.itemsize])
                if kind == "pred":
                    return bits != 0
            case Symbol("global_smem"):
                bits = np.zeros(self.threads, np.uint64)
            case Symbol(name) if name in self.parameters:
                bits = np.full(self.threads, PARAMETER_BYTES * list(self.parameters).index(name), np.uint64)
            case _:
                raise Unsupported(f"no operand {operand}")
        if bits.dtype.itemsize != dtype.itemsize:
            bits = bits.astype(UNSIGNED[dtype.itemsize])
        return bits.view(dtype)

    def write(self, operand: Operand, values: Lanes) -> None:
        """Values of any type into the active threads' register; a signed one is extended by its sign."""
        match operand:
            case Register("_"):
                return
            case Register(name):
                pass
            case _:
                raise Unsupported(f"no result into {operand}")
        dtype = np.dtype(FORMATS[self.program.register_type(name)])
        if values.dtype != dtype:
            size = values.dtype.itemsize
            signed = values.dtype.kind == "i"
            bits = np.ascontiguousarray(values).view((SIGNED if signed else UNSIGNED)[size])
            values = bits.astype((SIGNED if signed else UNSIGNED)[dtype.itemsize]).view(dtype)
        earlier = self.registers.get(name)
        if earlier is None:
            earlier = self._poison(name)
        self.registers[name] = np.where(self.mask, values, earlier)  # always a new array: `mov` may share it

    def _poison(self, name: str) -> Lanes:
        dtype = np.dtype(FORMATS[self.program.register_type(name)])
        return np.full(self.threads * dtype.itemsize, POISON if dtype != np.bool_ else 0, np.uint8).view(dtype)

    def _addresses(self, operand: Operand) -> Integers:
        match operand:
            case Address(base, offset):
                return self.read(base, "u64").view(np.int64) + offset
            case _:
                raise Unsupported(f"no address {operand}")

    def _elements(self, operand: Operand) -> tuple[Operand, ...]:
        return operand.elements if isinstance(operand, Vector) else (operand,)

    @property
    def _agents(self) -> Integers:
        return agents(self.number, self.barriers, self.lane // WARP)

    def _whole_warps(self, what: str) -> Mask:
        """Which warps are active; each must be so in all its lanes."""
        active = self.mask.reshape(-1, WARP)
        partial = active.any(1) & ~active.all(1)
        if partial.any():
            warp = int(partial.argmax())
            raise Divergence(f"{active[warp].sum()} of {WARP} lanes of warp {warp} meet {what}")
        return np.asarray(active.all(1))

    # ---- arithmetic

    def _compute(self, instruction: Instruction) -> None:
        target, *sources = instruction.operands
        kind, operation = instruction.type, VALUES[instruction.root]
        if "NaN" in instruction.parts:
            operation = {"min": np.minimum, "max": np.maximum}[instruction.root]
        values = [decode(self.read(source, kind), kind) for source in sources]
        if "wide" in instruction.parts or "hi" in instruction.parts:
            size = values[0].dtype.itemsize
            double = (SIGNED if kind[0] == "s" else UNSIGNED)[2 * size]
            product = values[0].astype(double) * values[1].astype(double)
            if "hi" in instruction.parts:
                product = (product >> double(8 * size)).astype(values[0].dtype)
            if instruction.root == "mad":
                product += self.read(sources[2], f"{kind[0]}{8 * product.dtype.itemsize}")
            self.write(target, product)
            return
        if "ftz" in instruction.parts:
            tiny = np.finfo(np.float32).tiny
            values = [np.where(np.abs(value) < tiny, np.float32(0), value) for value in values]
        self.write(target, encode(operation(*values), kind))

    def op_shl(self, instruction: Instruction, target: Operand, a: Operand, distance: Operand) -> None:
        self.write(target, _shift(self.read(a, instruction.type), self.read(distance, "u32"), left=True))

    def op_shr(self, instruction: Instruction, target: Operand, a: Operand, distance: Operand) -> None:
        self.write(target, _shift(self.read(a, instruction.type), self.read(distance, "u32"), left=False))

    def op_bfe(self, instruction: Instruction, target: Operand, a: Operand, start: Operand, length: Operand) -> None:
        """`length` bits from `start`, extended to the full width."""
        value, bits = self.read(a, instruction.type), 8 * np.dtype(FORMATS[instruction.type]).itemsize
        first, count = self.read(start, "u32").astype(np.int64), self.read(length, "u32").astype(np.int64)
        if (first + count > bits).any() or not count.all():
            raise Unsupported("a bit field that is empty or reaches beyond its register")
        self.write(target, _shift(_shift(value, bits - first - count, left=True), bits - count, left=False))

    def op_prmt(self, instruction: Instruction, target: Operand, a: Operand, b: Operand, selector: Operand) -> None:
        """Four bytes chosen from the eight of b and a; bit 3 of a choice replicates the byte's sign."""
        if instruction.parts != ("prmt", "b32"):
            raise Unsupported(f"no {instruction.opcode}")
        pool = np.stack([self.read(a, "b32"), self.read(b, "b32")], axis=1).view(np.uint8)
        choices = self.read(selector, "b32")[:, None] >> np.arange(0, 16, 4, dtype=np.uint32) & np.uint32(15)
        chosen = np.take_along_axis(pool, (choices & 7).astype(np.int64), axis=1)
        signs = np.where(chosen & 0x80, 0xFF, 0).astype(np.uint8)
        self.write(target, np.where(choices & 8, signs, chosen).view(np.uint32)[:, 0])

    def op_lop3(
        self, instruction: Instruction, target: Operand, a: Operand, b: Operand, c: Operand, table: Operand
    ) -> None:
        """Any function of three bits, by its truth table."""
        bits = [self.read(operand, "b32") for operand in (a, b, c)]
        result = np.zeros(self.threads, np.uint32)
        for row in range(8):
            terms = [value if row >> (2 - i) & 1 else ~value for i, value in enumerate(bits)]
            chosen = (self.read(table, "b32") >> np.uint32(row)) & np.uint32(1)
            result |= np.where(chosen, terms[0] & terms[1] & terms[2], np.uint32(0))
        self.write(target, result)

    def op_setp(self, instruction: Instruction, target: Operand, a: Operand, b: Operand) -> None:
        if len(instruction.parts) != 3:
            raise Unsupported(f"no {instruction.opcode}")
        comparison, kind = instruction.parts[1:]
        x, y = decode(self.read(a, kind), kind), decode(self.read(b, kind), kind)
        if comparison in COMPARISONS:
            result = COMPARISONS[comparison](x, y)
            if comparison == "ne":  # ordered, unlike numpy's
                result &= ~(np.isnan(x) | np.isnan(y)) if x.dtype.kind == "f" else True
        else:  # equ, ltu, ...: true as well where an operand is NaN
            result = COMPARISONS[comparison.removesuffix("u")](x, y) | np.isnan(x) | np.isnan(y)
        self.write(target, result)

    def op_selp(self, instruction: Instruction, target: Operand, a: Operand, b: Operand, which: Operand) -> None:
        kind = instruction.type
        self.write(target, np.where(self.read(which, "pred"), self.read(a, kind), self.read(b, kind)))

    def op_mov(self, instruction: Instruction, target: Operand, source: Operand) -> None:
        """A copy; with a vector on either side, packing or unpacking, lowest bits first."""
        kind = instruction.type
        if isinstance(source, Vector):
            part = f"b{int(kind[1:]) // len(source.elements)}"
            columns = [self.read(element, part) for element in source.elements]
            self.write(target, np.stack(columns, axis=1).view(FORMATS[f"b{kind[1:]}"])[:, 0])
        elif isinstance(target, Vector):
            part = f"b{int(kind[1:]) // len(target.elements)}"
            columns = np.ascontiguousarray(self.read(source, kind))[:, None].view(FORMATS[part])
            for element, column in zip(target.elements, columns.T, strict=True):
                self.write(element, column)
        else:
            self.write(target, self.read(source, kind))

    def op_cvt(self, instruction: Instruction, target: Operand, *sources: Operand) -> None:
        to, kind = instruction.parts[-2:]
        if "sat" in instruction.parts:
            raise Unsupported(f"no {instruction.opcode}")
        values = [decode(self.read(source, kind), kind) for source in sources]
        if to.endswith("x2"):  # the first source goes into the upper half
            self.write(target, encode(np.stack(values[::-1], axis=1), to))
        elif to == "tf32":  # round half away from zero at 10 bits of mantissa
            self.write(target, (values[0].view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000))
        elif values[0].dtype.kind == "f" and to[0] in "su":
            rounding = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[instruction.parts[1]]
            limits = np.iinfo(FORMATS[to])
            whole = np.clip(np.nan_to_num(rounding(values[0].astype(np.float64))), limits.min, limits.max)
            self.write(target, whole.astype(FORMATS[to]))
        else:
            self.write(target, encode(values[0], to))

    # ---- control

    def op_bra(self, instruction: Instruction, label: Symbol) -> None:
        self.address[self.mask] = self.program.labels[label.name]

    def op_ret(self, instruction: Instruction) -> None:
        self.address[self.mask] = ENDED

    def op_bar(self, instruction: Instruction, *operands: Operand) -> None:
        self._whole_warps(instruction.opcode)
        if instruction.parts[1] == "warp":
            return  # lanes of a warp step together here
        if operands != (Immediate(0),):
            raise Unsupported("a barrier for some of the warps")
        self.waiting |= self.mask

    # ---- memory

    def op_ld(self, instruction: Instruction, target: Operand, address: Address, *policy: Operand) -> None:
        kind, space = instruction.type, instruction.parts[1]
        if space == "param":
            numbers = self._addresses(address)[self.mask] // PARAMETER_BYTES
            values = np.zeros(self.threads, FORMATS[kind])
            values[self.mask] = [list(self.parameters.values())[number].view(FORMATS[kind]) for number in numbers]
            self.write(target, values)
            return
        elements, size = self._elements(target), np.dtype(FORMATS[kind]).itemsize
        active = self.mask
        values = np.empty((self.threads, size * len(elements)), np.uint8)
        memory = self._memory(space)
        values[active] = memory.read(self._addresses(address)[active], size * len(elements), self._agents[active])
        for element, column in zip(elements, values.view(FORMATS[kind]).T, strict=True):
            self.write(element, column)

    def op_st(self, instruction: Instruction, address: Operand, source: Operand, *policy: Operand) -> None:
        columns = [self.read(element, instruction.type) for element in self._elements(source)]
        values = np.stack(columns, axis=1).view(np.uint8)
        active = self.mask
        memory = self._memory(instruction.parts[1])
        memory.write(self._addresses(address)[active], values[active], self._agents[active])

    def op_createpolicy(self, instruction: Instruction, target: Operand, *operands: Operand) -> None:
        """A hint to the cache, which there is none of."""
        self.write(target, np.zeros(self.threads, np.uint64))

    def _memory(self, space: str) -> Memory | GlobalMemory:
        match space:
            case "shared":
                return self.shared
            case "global":
                return self.memory
            case _:
                raise Unsupported(f"no memory space {space!r}")

    def op_cp(self, instruction: Instruction, *operands: Any) -> None:
        match instruction.parts[:3]:
            case ("cp", "async", "commit_group"):
                self.committed[self.mask] += 1
            case ("cp", "async", "wait_group"):
                self._land(*operands)
            case ("cp", "async", "ca" | "cg"):
                self._begin_copy(*operands)
            case _:
                raise Unsupported(f"no {instruction.opcode}")

    def _begin_copy(
        self, target: Operand, source: Operand, size: Immediate, source_size: Operand | None = None
    ) -> None:
        """`size` bytes to shared memory, of which `source_size` are read and the rest are zero."""
        lanes = np.flatnonzero(self.mask)
        values = np.zeros((lanes.size, size.bits), np.uint8)
        read = self.read(source_size or size, "u32")[lanes]
        if not np.isin(read, (0, size.bits)).all():
            raise Unsupported("a cp.async that reads a part of its bytes")
        whole = read > 0
        values[whole] = self.memory.read(self._addresses(source)[lanes][whole], size.bits, self._agents[lanes][whole])
        targets = self._addresses(target)[lanes]
        self.shared.begin_copy(targets, size.bits, self._agents[lanes])
        self.copies.append(Copy(lanes, targets, values, self.committed[lanes]))

    def _land(self, pending: Immediate) -> None:
        """The active threads' copies land, but for those of their last `pending` groups."""
        remaining = []
        for copy in self.copies:
            done = self.mask[copy.lanes] & (copy.groups < self.committed[copy.lanes] - pending.bits)
            self.shared.land_copy(copy.targets[done], copy.values[done], self._agents[copy.lanes[done]])
            if not done.all():
                left = ~done
                remaining.append(Copy(copy.lanes[left], copy.targets[left], copy.values[left], copy.groups[left]))
        self.copies = remaining

    # ---- instructions of whole warps

    def op_shfl(
        self, instruction: Instruction, target: Operand, a: Operand, b: Operand, c: Operand, members: Operand
    ) -> None:
        """Each lane reads another lane's value, or its own where that lane is out of its segment."""
        if (self.read(members, "u32") != 0xFFFFFFFF).any():
            raise Unsupported("a shuffle of some of the lanes")
        self._whole_warps(instruction.opcode)
        lane, value = self.lane % WARP, self.read(a, "b32")
        distance, control = self.read(b, "u32").astype(np.int64) % WARP, self.read(c, "u32").astype(np.int64)
        clamp, segment = control % WARP, control >> 8 & 31
        last, first = (lane & segment) | (clamp & ~segment), lane & segment
        match instruction.parts[2]:
            case "up":
                source = lane - distance
                valid = source >= last
            case "down":
                source = lane + distance
                valid = source <= last
            case "bfly":
                source = lane ^ distance
                valid = source <= last
            case "idx":
                source = first | (distance & ~segment)
                valid = source <= last
        source = np.where(valid, source, lane)
        results = (value[self.lane - lane + source], valid)
        for element, result in zip(self._elements(target), results, strict=False):
            self.write(element, result)

    def op_ldmatrix(self, instruction: Instruction, target: Operand, address: Operand) -> None:
        """8 × 8 matrices of 16 bits: lanes 8 i to 8 i + 7 give the addresses of the rows of matrix i; lane l gets, of
        row l / 4, the elements 2 (l % 4) and the next, after transposition if asked for."""
        warps = np.flatnonzero(self._whole_warps(instruction.opcode))
        rows = self._addresses(address).reshape(-1, WARP)[warps]
        who = self._agents.reshape(-1, WARP)[warps]
        for i, element in enumerate(self._elements(target)):
            lanes = slice(8 * i, 8 * i + 8)
            data = self.shared.read(rows[:, lanes].ravel(), 16, who[:, lanes].ravel())
            matrices = data.view(np.uint16).reshape(-1, 8, 8)
            if "trans" in instruction.parts:
                matrices = matrices.swapaxes(1, 2)
            result = np.zeros((self.threads // WARP, WARP), np.uint32)
            result[warps] = np.ascontiguousarray(matrices).reshape(-1, WARP, 2).view(np.uint32)[..., 0]
            self.write(element, result.ravel())

    def op_mma(self, instruction: Instruction, d: Operand, a: Operand, b: Operand, c: Operand) -> None:
        """D = A B + C per warp, summed in float64 and rounded once; the hardware rounds more often."""
        self._whole_warps(instruction.opcode)
        match instruction.parts[3:]:
            case ("m16n8k16", "row", "col", "f32", ("bf16" | "f16") as kind, _, "f32"):
                layout, packed = FRAGMENTS_16_BIT, f"{kind}x2"
            case ("m16n8k8", "row", "col", "f32", "tf32", "tf32", "f32"):
                layout, packed = FRAGMENTS_TF32, "tf32"
            case _:
                raise Unsupported(f"no {instruction.opcode}")

        def fragment(operand: Operand, kind: str) -> Lanes:
            columns = [decode(self.read(element, kind), kind) for element in self._elements(operand)]
            if kind == "tf32":  # the hardware does not see the 13 low bits
                columns = [(column.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32) for column in columns]
            return np.stack(columns, axis=1).reshape(self.threads // WARP, WARP, -1).astype(np.float64)

        product = _matrix(fragment(a, packed), layout["a"]) @ _matrix(fragment(b, packed), layout["b"])
        total = (product + _matrix(fragment(c, "f32"), FRAGMENT_ACCUMULATOR)).astype(np.float32)
        rows, columns = FRAGMENT_ACCUMULATOR
        for element, column in zip(self._elements(d), total[:, rows, columns].transpose(2, 0, 1), strict=True):
            self.write(element, column.ravel())
