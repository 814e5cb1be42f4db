"""Memory that watches every access: bounds, alignment, and races between warps."""

from collections import Counter

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Integers = NDArray[np.int64]


class EmulationError(Exception):
    """What is wrong with the kernel; a note tells the instruction."""


class OutOfBounds(EmulationError):
    pass


class Misaligned(EmulationError):
    pass


class Race(EmulationError):
    pass


# Who touched a byte, as one integer: block, barriers passed, warp. Two special values, and two special warps.
NOBODY, IN_FLIGHT = -1, -2  # IN_FLIGHT: the target of a cp.async that nobody has waited for
SEVERAL_WARPS, SEVERAL_BLOCKS = 255, 254
BLOCK_SHIFT, BARRIER_SHIFT = 40, 8


def agents(block: int, barriers: int, warps: Integers) -> Integers:
    """The ids of warps of a block that has passed so many barriers."""
    return (block << BLOCK_SHIFT) + (barriers << BARRIER_SHIFT) + warps


def _concurrent(earlier: Integers, now: Integers) -> NDArray[np.bool_]:
    """Where nothing orders two touches: another warp since the last barrier, or another block at any time."""
    same_interval = (earlier >> BARRIER_SHIFT) == (now >> BARRIER_SHIFT)
    other_block = (earlier >> BLOCK_SHIFT) != (now >> BLOCK_SHIFT)
    unordered = same_interval | other_block | ((earlier & 0xFF) == SEVERAL_BLOCKS)
    return (earlier == IN_FLIGHT) | ((earlier >= 0) & (earlier != now) & unordered)


class Memory:
    """Bytes with a record, per byte, of who wrote it last and who has read it.

    A race is two accesses to a byte, at least one a write, with nothing that orders them; but several warps may write
    the same value in one instruction: where a tile is small, threads hold copies of it, and Triton stores them all.
    What lanes of one warp do to each other goes unseen.
    """

    def __init__(self, name: str, data: Bytes, start: int = 0) -> None:
        self.name, self.data, self.start = name, data, start  # `start`: the address of the first byte
        self.writer = np.full(data.size, NOBODY, np.int64)
        self.reader = np.full(data.size, NOBODY, np.int64)

    def read(self, addresses: Integers, size: int, agents: Integers) -> Bytes:
        """`size` bytes from each address: (accesses, size)."""
        index, now = self._index(addresses, size), agents[:, None]
        self._forbid(_concurrent(self.writer[index], now), "read", addresses, self.writer[index])
        earlier = self.reader[index]
        same_interval = (earlier >> BARRIER_SHIFT) == (now >> BARRIER_SHIFT)
        joined = np.where(same_interval & (earlier != now), now | SEVERAL_WARPS, now)
        other_block = (earlier >= 0) & ((earlier >> BLOCK_SHIFT) != (now >> BLOCK_SHIFT))
        several = other_block | ((earlier >= 0) & ((earlier & 0xFF) == SEVERAL_BLOCKS))
        joined = np.where(several, (now & ~0xFF) | SEVERAL_BLOCKS, joined)
        self.reader[index] = joined
        together = self.reader[index] != joined  # two warps read the byte in this very step
        self.reader[index[together]] |= SEVERAL_WARPS
        return self.data[index]

    def write(self, addresses: Integers, values: Bytes, agents: Integers) -> None:
        index, now = self._claim(addresses, values.shape[1], agents), agents[:, None]
        self.data[index] = values
        together = self.writer[index] != now  # another warp has written the byte in this very step
        self._forbid(together & (self.data[index] != values), "write", addresses, self.writer[index])
        self.writer[index[together]] |= SEVERAL_WARPS

    def begin_copy(self, addresses: Integers, size: int, agents: Integers) -> None:
        """A cp.async is issued: from now on nobody may touch the bytes until it has landed."""
        index = self._claim(addresses, size, agents)
        self._forbid(self.writer[index] != agents[:, None], "write", addresses, self.writer[index])  # in this very step
        self.writer[index] = IN_FLIGHT

    def land_copy(self, addresses: Integers, values: Bytes, agents: Integers) -> None:
        index = self._index(addresses, values.shape[1])
        self.data[index] = values
        self.writer[index] = agents[:, None]

    def _claim(self, addresses: Integers, size: int, agents: Integers) -> Integers:
        index, now = self._index(addresses, size), agents[:, None]
        self._forbid(_concurrent(self.writer[index], now), "write", addresses, self.writer[index])
        self._forbid(_concurrent(self.reader[index], now), "write", addresses, self.reader[index])
        self.writer[index] = now
        return index

    def _index(self, addresses: Integers, size: int) -> Integers:
        first = addresses - self.start
        outside = (first < 0) | (first + size > self.data.size)
        if outside.any():
            raise OutOfBounds(
                f"{self.name}: {size} bytes at offset {first[outside][0]}, where {self.data.size} bytes exist"
                f" ({outside.sum()} lanes)"
            )
        if (addresses % size).any():
            raise Misaligned(f"{self.name}: {size} bytes at offset {first[addresses % size != 0][0]}")
        return first[:, None] + np.arange(size)

    def _forbid(self, conflict: NDArray[np.bool_], access: str, addresses: Integers, earlier: Integers) -> None:
        if not conflict.any():
            return
        access_number, byte = np.argwhere(conflict)[0]
        other = earlier[access_number, byte]
        by = {SEVERAL_WARPS: "several warps", SEVERAL_BLOCKS: "several blocks"}.get(
            other & 0xFF, f"warp {other & 0xFF}"
        )
        raise Race(
            f"{self.name}: {access} at offset {addresses[access_number] - self.start + byte}, "
            + ("where a cp.async is in flight" if other == IN_FLIGHT else f"unordered with {by}")
        )


class GlobalMemory:
    """The kernel's arguments, each in an address range of its own, so that no overrun can hit a neighbor.

    `bytes_read` and `bytes_written` count by argument what the warps request; lanes of a warp that ask for the same
    bytes in one instruction share one request, as on the device.
    """

    RANGE = 40  # bits: no wrong offset below half a terabyte reaches another argument

    def __init__(self) -> None:
        self.memories: dict[int, Memory] = {}
        self.bytes_read: Counter[str] = Counter()
        self.bytes_written: Counter[str] = Counter()

    def add(self, name: str, data: Bytes) -> int:
        """Map an argument's bytes; returns its address, aligned as the bytes are. The same bytes share one record."""
        for memory in self.memories.values():
            if memory.data.ctypes.data == data.ctypes.data and memory.data.size == data.size:
                return memory.start
            if np.may_share_memory(memory.data, data):
                raise ValueError(f"{name} overlaps {memory.name}: races between them would go unseen")
        number = len(self.memories) + 1
        middle = (number << self.RANGE) + (1 << self.RANGE - 1)  # room on either side
        start = middle + data.ctypes.data % 256
        self.memories[number] = Memory(name, data, start)
        return start

    def read(self, addresses: Integers, size: int, agents: Integers) -> Bytes:
        values = np.empty((addresses.size, size), np.uint8)
        for memory, chosen in self._split(addresses):
            values[chosen] = memory.read(addresses[chosen], size, agents[chosen])
            self.bytes_read[memory.name] += _requests(addresses[chosen], agents[chosen]) * size
        return values

    def write(self, addresses: Integers, values: Bytes, agents: Integers) -> None:
        for memory, chosen in self._split(addresses):
            memory.write(addresses[chosen], values[chosen], agents[chosen])
            self.bytes_written[memory.name] += _requests(addresses[chosen], agents[chosen]) * values.shape[1]

    def bytes_touched(self) -> Counter[str]:
        """How many different bytes of each argument have been read."""
        return Counter({each.name: int((each.reader != NOBODY).sum()) for each in self.memories.values()})

    def _split(self, addresses: Integers) -> list[tuple[Memory, NDArray[np.bool_]]]:
        numbers = addresses >> self.RANGE
        unknown = [number for number in np.unique(numbers) if number not in self.memories]
        if unknown:
            address = addresses[numbers == unknown[0]][0]
            raise OutOfBounds(f"global address {address:#x} belongs to no argument")
        return [(self.memories[number], numbers == number) for number in np.unique(numbers)]


def _requests(addresses: Integers, agents: Integers) -> int:
    return np.unique(np.stack([addresses, agents]), axis=1).shape[1]
