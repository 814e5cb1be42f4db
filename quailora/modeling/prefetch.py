"""Weights that a thread reads ahead while the previous block computes."""

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

STAGING_BYTES = 32 * 2**20  # pinned host memory through which a prefetch goes to a GPU


class Prefetch:
    """Reads tensors of a checkpoint to a device, one after the other, in the dtype they will be used in."""

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
            # Work that is already queued may still read the destinations' memory, as tensors freed since.
            stream.wait_stream(torch.cuda.current_stream(device))
        thread = Thread(target=_fetch, args=(queue, stop, stream), name="quailora-prefetch", daemon=True)
        # It also runs when this object is collected and when Python exits: no daemon thread may be inside torch then.
        self.drop = weakref.finalize(self, _end, stop, thread)
        thread.start()

    def tensors(self) -> dict[str, UnreadTensor]:
        """Each can be taken once, and is not kept here after that."""
        return {key: UnreadTensor(partial(self._take, key)) for key in self._futures}

    def _take(self, key: str) -> Tensor:
        return self._futures.pop(key).result()


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all prefetches: torch has 32 streams for a device and hands them out in turn, so a new one might be one
    that is in use elsewhere."""
    return torch.cuda.Stream(device)


@dataclass
class _Fetch:
    """One tensor to be read: where from, in which dtype, the future that gets it, and on a GPU its destination."""

    entry: TensorEntry
    dtype: torch.dtype
    future: Future[Tensor]
    place: Tensor | None


def _destination(entry: TensorEntry, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """On a GPU, memory allocated on the stream that will use it: what another stream allocates, only that stream can
    reuse."""
    if device.type != "cuda":
        return None
    with torch.inference_mode(False):  # or the thread could not write to it
        return torch.empty(entry.shape, dtype=dtype, device=device)


def _fetch(queue: deque[_Fetch], stop: Event, stream: torch.cuda.Stream | None) -> None:
    """The thread's function. It completes, fails or cancels every future. It must not refer to the Prefetch itself,
    which could then never be collected."""
    try:
        while queue and not stop.is_set():
            _fetch_one(queue[0], stream)
            queue.popleft()
    except BaseException as error:  # raised again when a missing tensor is asked for
        for fetch in queue:
            fetch.future.set_exception(error)
        queue.clear()
    for fetch in queue:
        fetch.future.cancel()


def _fetch_one(fetch: _Fetch, stream: torch.cuda.Stream | None) -> None:
    """A function of its own, so that a tensor that was handed over is not kept alive until the next one is read."""
    if stream is None or fetch.place is None:
        fetch.future.set_result(fetch.entry.read(fetch.dtype))
        return
    # torch never frees pinned memory, and rounds it up to a power of two: so tensors go through it in pieces.
    flat = fetch.place.view(-1)
    with torch.cuda.stream(stream):
        staging = torch.empty(STAGING_BYTES, dtype=torch.uint8, device="cpu", pin_memory=True)
        for first, piece in fetch.entry.pieces(staging):
            flat[first : first + len(piece)].copy_(piece, non_blocking=True)
            stream.synchronize()  # only this thread waits, not the block that is computing
    fetch.future.set_result(fetch.place)


def _end(stop: Event, thread: Thread) -> None:
    stop.set()
    if thread.is_alive() and thread is not current_thread():
        thread.join()
