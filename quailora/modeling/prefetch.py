"""Weights that are read ahead by a thread, while the block before them computes."""

from __future__ import annotations

import weakref
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache, partial
from threading import Event, Thread, current_thread

import torch
from torch import Tensor

from quailora.modeling.checkpoint import TensorEntry, UnreadTensor

STAGING_BYTES = 32 * 2**20  # page-locked host memory through which a prefetch reaches a GPU


class Prefetch:
    """Tensors of a checkpoint on their way to a device, one after the other, as the dtype they will be used in."""

    def __init__(
        self, names: list[str], wanted: dict[str, tuple[TensorEntry, torch.dtype]], device: torch.device
    ) -> None:
        self.names = names
        self._futures: dict[str, Future[Tensor]] = {key: Future() for key in wanted}
        queue = deque(
            _Fetch(entry, dtype, self._futures[key], _destination(entry, dtype, device))
            for key, (entry, dtype) in wanted.items()
        )
        stop, stream = Event(), None
        if device.type == "cuda":
            stream = _copy_stream(device)
            # The memory of the destinations may still be read, as something freed, by what is queued until now.
            stream.wait_stream(torch.cuda.current_stream(device))
        thread = Thread(target=_fetch, args=(queue, stop, stream), name="quailora-prefetch", daemon=True)
        # Also when this is dropped without a word, and when Python ends: no daemon may then be in the midst of torch.
        self.drop = weakref.finalize(self, _end, stop, thread)
        thread.start()

    def tensors(self) -> dict[str, UnreadTensor]:
        """Each can be had once, and is then no longer held here."""
        return {key: UnreadTensor(partial(self._take, key)) for key in self._futures}

    def _take(self, key: str) -> Tensor:
        return self._futures.pop(key).result()


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all prefetches: torch has 32 to a device and goes round them, so that one may be another's too."""
    return torch.cuda.Stream(device)


@dataclass
class _Fetch:
    """One tensor to be fetched: where from, as what dtype, whom to give it to, and on a GPU its place there."""

    entry: TensorEntry
    dtype: torch.dtype
    future: Future[Tensor]
    place: Tensor | None


def _destination(entry: TensorEntry, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """On a GPU, memory from the pool of the stream that will use it: what another stream had allocated, that stream
    alone could use again."""
    if device.type != "cuda":
        return None
    with torch.inference_mode(False):  # or the thread could not write to it
        return torch.empty(entry.shape, dtype=dtype, device=device)


def _fetch(queue: deque[_Fetch], stop: Event, stream: torch.cuda.Stream | None) -> None:
    """Work of the thread. It knows the futures alone, not who waits for them, and leaves none open."""
    try:
        while queue and not stop.is_set():
            _fetch_one(queue[0], stream)
            queue.popleft()
    except BaseException as error:  # raised again by whoever asks for what is missing
        for fetch in queue:
            fetch.future.set_exception(error)
        queue.clear()
    for fetch in queue:
        fetch.future.cancel()


def _fetch_one(fetch: _Fetch, stream: torch.cuda.Stream | None) -> None:
    """In a function of its own: a tensor that was handed over must not be held until the next one is there."""
    if stream is None or fetch.place is None:
        fetch.future.set_result(fetch.entry.read(fetch.dtype))
        return
    # torch keeps page-locked memory for ever, and rounds it up to a power of two: so tensors go through it in pieces.
    flat = fetch.place.view(-1)
    with torch.cuda.stream(stream):
        staging = torch.empty(STAGING_BYTES, dtype=torch.uint8, device="cpu", pin_memory=True)
        for first, piece in fetch.entry.pieces(staging):
            flat[first : first + len(piece)].copy_(piece, non_blocking=True)
            stream.synchronize()  # this thread waits; the block that computes meanwhile does not
    fetch.future.set_result(fetch.place)


def _end(stop: Event, thread: Thread) -> None:
    stop.set()
    if thread.is_alive() and thread is not current_thread():
        thread.join()
