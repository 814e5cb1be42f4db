"""The hidden states of every micro-batch between two blocks, in memory or in a file."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from quailora.files import as_bytes, writing


class HiddenStates:
    """Batch number -> hidden states (b, t, d), replaced block after block.

    Args:
        device: where the hidden states are used.
        folder: where to put the file; None keeps them in memory, of the host and pinned if the device is a GPU.
        on_device: on a GPU, keep them in its memory.

    The file has no name, so nothing is left of it however the process ends. It is read and written, not mapped: mapped
    pages would count as the process's memory, and a full disk would kill it instead of raising an error.
    Raises QuailoraError if the disk is full.
    """

    def __init__(self, device: torch.device, folder: Path | None = None, on_device: bool = False) -> None:
        self._device, self._folder = device, folder
        self._pinned = device.type == "cuda" and not on_device
        self._memory: dict[int, Tensor] = {}
        self._places: dict[int, tuple[int, torch.Size, torch.dtype]] = {}
        self._size = 0
        self.edits = 0  # how many batches were set
        self._file = None
        if folder is not None:
            with writing(folder / "hidden states"):
                self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  (closed by __exit__)

    def __enter__(self) -> HiddenStates:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._memory and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the last copies
        self._memory.clear()
        if self._device.type == "cuda" and hasattr(torch.accelerator, "empty_host_cache"):
            torch.accelerator.empty_host_cache()  # or torch would keep the pinned memory
        if self._file is not None:
            self._file.close()

    def __getitem__(self, number: int) -> Tensor:
        """The hidden states of a batch, on the device."""
        if self._file is None:
            return self._memory[number].to(self._device, non_blocking=True)
        start, shape, dtype = self._places[number]
        hidden = torch.empty(shape, dtype=dtype, pin_memory=self._device.type == "cuda")
        rest = as_bytes(hidden)
        while rest:
            read = os.preadv(self._file.fileno(), [rest], start)
            assert read, "the file is shorter than what was written to it"
            rest, start = rest[read:], start + read
        return hidden.to(self._device)

    def __setitem__(self, number: int, hidden: Tensor) -> None:
        self.edits += 1
        if self._file is None:
            self._remember(number, hidden)
            return
        hidden = hidden.contiguous().cpu()
        start, shape, dtype = self._places.setdefault(number, (self._size, hidden.shape, hidden.dtype))
        assert (shape, dtype) == (hidden.shape, hidden.dtype), "a block changes no shape"
        self._size = max(self._size, start + hidden.nbytes)
        rest = as_bytes(hidden)
        with writing(self._folder / "hidden states", "give it room, or --host-memory-budget more memory"):  # type: ignore[operator]
            while rest:
                written = os.pwrite(self._file.fileno(), rest, start)
                rest, start = rest[written:], start + written

    def _remember(self, number: int, hidden: Tensor) -> None:
        if not self._pinned:
            self._memory[number] = hidden
            return
        # With pinned memory the host does not wait for copies: the stream keeps their order.
        if number not in self._memory:
            self._memory[number] = torch.empty_like(hidden, device="cpu", pin_memory=True)
        self._memory[number].copy_(hidden, non_blocking=True)

    def halve(self) -> None:
        """Split each batch of more than one sequence in two, as `Batch.halves` does, and number them anew. No data
        moves."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # copies that are under way
        halves = [half for number in sorted(self._memory) for half in _halves(self._memory[number])]
        self._memory = dict(enumerate(halves))
        places = []
        for number in sorted(self._places):
            start, shape, dtype = self._places[number]
            for half in _halves(torch.empty(shape, dtype=dtype, device="meta")):
                places.append((start, half.shape, half.dtype))
                start += half.nbytes
        self._places = dict(enumerate(places))


def _halves(rows: Tensor) -> list[Tensor]:
    return list(rows.split(-(-len(rows) // 2)))
