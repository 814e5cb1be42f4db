"""Hooks that add up H for the inputs of a block's linears while the block runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from quailora.calibration.gram import Gram
from quailora.errors import CalibrationError


@dataclass
class _Input:
    """One distinct input of a block: the linear that adds it up for all that share it, and its H."""

    leader: str
    gram: Gram
    lasting: bool = False  # nothing edits it in place once the linears have had it


@dataclass
class Collector:
    """The H of each distinct input of a block's linears, filled while the block runs. See `collect`."""

    grams: dict[str, Gram] = field(default_factory=dict)
    _inputs: dict[str, _Input] = field(default_factory=dict)
    _seen: list[tuple[Tensor, int, _Input]] = field(default_factory=list)
    _keep: Tensor | None = None
    _side: torch.cuda.Stream | None = None
    _read: list[Tensor | None] = field(default_factory=list)  # by the side stream, since the batch began
    _behind: bool = False  # those are still of the batch before

    @contextmanager
    def batch(self, keep: Tensor | None) -> Iterator[None]:
        """One forward pass of the block, whose padding `keep` (b, t) leaves out of H."""
        self._keep = keep
        try:
            yield
        finally:
            for x, edits, entry in self._seen:
                entry.lasting = x._version == edits
            # The tensors are held only this long: identity means nothing once they are gone.
            self._seen.clear()
            self._behind = True

    def receive(self, name: str, x: Tensor) -> None:
        if x.numel() == 0:
            return  # an expert that no token chose; and all empty tensors are at one address
        if self._behind:
            self.join()
        shared = self._inputs.get(name)
        if shared is None:
            shared = next((entry for seen, edits, entry in self._seen if _same(seen, edits, x)), None)
            shared = shared or _Input(name, Gram(x.shape[-1], device=x.device))
            self._inputs[name], self.grams[name] = shared, shared.gram
            self._seen.append((x, x._version, shared))
        if shared.leader == name:
            mask = self._mask(x, name)
            with self._beside(x.device, x, mask) if shared.lasting and x.is_cuda else nullcontext():
                shared.gram.update(x, mask)

    @contextmanager
    def _beside(self, device: torch.device, *read: Tensor | None) -> Iterator[None]:
        """On a stream of its own, so that the block goes on meanwhile. What it reads must not be edited any more."""
        if self._side is None:
            self._side = _side_stream(device)
        self._side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._side):
            yield
        # Held until the current stream waits, so that by its order alone their memory is not given away before: at the
        # first input of the next batch, of which the hidden states are copied meanwhile.
        self._read += read

    def join(self) -> None:
        """Let the current stream wait for what is added up beside it."""
        if self._side is not None:
            torch.cuda.current_stream(self._side.device).wait_stream(self._side)
        self._read.clear()
        self._behind = False

    def _mask(self, x: Tensor, name: str) -> Tensor | None:
        if self._keep is None:
            return None
        if x.shape[:-1].numel() != self._keep.numel():
            raise CalibrationError(
                f"{name} receives {tuple(x.shape)} in a batch of {tuple(self._keep.shape)} tokens: which of its "
                "rows are padding cannot be told; use batch_size=1 (--batch-size 1)"
            )
        return self._keep.reshape(x.shape[:-1])


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all blocks: what the allocator and cuBLAS keep, they keep for each stream."""
    return torch.cuda.Stream(device)


@contextmanager
def collect(linears: dict[str, nn.Module]) -> Iterator[Collector]:
    """Hooks on the linears of a block that add up one H per distinct input; removed whatever happens.

    Linears share an H when they receive the same tensor (q, k and v; gate and up), found in the first batch by the
    tensor itself. A linear that no token reaches has no entry in `grams`. On CUDA, from the second batch on, H is
    added up on a stream of its own, while the block goes on and the next batch comes; the `grams` are complete, for the
    stream that is current, after the `with`.
    """
    collector = Collector()
    with ExitStack() as hooks:
        for name, module in linears.items():

            def receive(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
                collector.receive(name, args[0] if args else kwargs["input"])

            hooks.callback(module.register_forward_pre_hook(receive, with_kwargs=True).remove)
        hooks.callback(collector.join)
        yield collector


def _same(seen: Tensor, edits: int, x: Tensor) -> bool:
    """Whether `x` is, in memory, the numbers that `seen` was after so many in-place edits. Both tensors are alive."""
    same_view = seen.shape == x.shape and seen.stride() == x.stride() and seen.dtype == x.dtype
    return same_view and seen.data_ptr() == x.data_ptr() and x._version == edits
