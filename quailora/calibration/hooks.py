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
    """A distinct input of a block: its H, and the one linear that adds to it for all that share it."""

    leader: str
    gram: Gram
    edited: bool = True  # in place, after the linears received it; assumed until a batch has shown otherwise


@dataclass
class _Held:
    """An input of the current batch, kept alive so that no other tensor can be taken for it."""

    tensor: Tensor
    version: int  # torch's count of in-place edits when the input was received
    input: _Input

    @property
    def edited(self) -> bool:
        return self.tensor._version != self.version


@dataclass
class Collector:
    """The H of each distinct input of a block's linears, filled while the block runs. See `collect`.

    grams: by the name of the linear; linears that share an input have the same object.
    """

    grams: dict[str, Gram] = field(default_factory=dict)
    _inputs: dict[str, _Input] = field(default_factory=dict)  # by the name of the linear
    _held: list[_Held] = field(default_factory=list)  # the inputs first seen in the current batch
    _keep: Tensor | None = None
    _side: torch.cuda.Stream | None = None
    _in_use: list[Tensor | None] = field(default_factory=list)  # by the side stream: must stay alive
    _new_batch: bool = False  # nothing was received since the last batch ended

    @contextmanager
    def batch(self, keep: Tensor | None) -> Iterator[None]:
        """One forward pass of the block. keep: (b, t) bool, False for padding, which H leaves out; None keeps all."""
        self._keep = keep
        try:
            yield
        finally:
            for held in self._held:
                held.input.edited = held.edited
            self._held.clear()
            self._new_batch = True

    def receive(self, name: str, x: Tensor) -> None:
        """Add the input (..., n) of a linear to its H, unless another linear does so for the same tensor.

        Raises CalibrationError if some tokens are padding and x has other rows than one for each token.
        """
        if x.numel() == 0:
            return  # an expert that no token chose
        if self._new_batch:
            self.join()
        if name not in self._inputs:
            self._inputs[name] = self._find(x) or self._add(name, x)
            self.grams[name] = self._inputs[name].gram
        its = self._inputs[name]
        if its.leader == name:
            mask = self._mask(x, name)
            with self._beside(x.device, x, mask) if x.is_cuda and not its.edited else nullcontext():
                its.gram.update(x, mask)

    def _find(self, x: Tensor) -> _Input | None:
        """The input that another linear has received as this very tensor, with the same values."""
        return next((held.input for held in self._held if held.tensor is x and not held.edited), None)

    def _add(self, name: str, x: Tensor) -> _Input:
        new = _Input(name, Gram(x.shape[-1], device=x.device))
        self._held.append(_Held(x, x._version, new))
        return new

    @contextmanager
    def _beside(self, device: torch.device, *reads: Tensor | None) -> Iterator[None]:
        """On a stream of its own, while the block goes on. What it reads must not be edited in place meanwhile."""
        if self._side is None:
            self._side = _side_stream(device)
        self._side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._side):
            yield
        # Kept alive until the current stream waits, or their memory could be reused too early. That is at the first
        # input of the next batch, so that copying its hidden states overlaps too.
        self._in_use += reads

    def join(self) -> None:
        """Make the current stream wait for the side stream."""
        if self._side is not None:
            torch.cuda.current_stream(self._side.device).wait_stream(self._side)
        self._in_use.clear()
        self._new_batch = False

    def _mask(self, x: Tensor, name: str) -> Tensor | None:
        if self._keep is None:
            return None
        if x.shape[:-1].numel() != self._keep.numel():
            raise CalibrationError(
                f"{name} receives {tuple(x.shape)} in a batch of {tuple(self._keep.shape)} tokens, so which of its "
                "rows are padding is unknown; use batch_size=1 (--batch-size 1)"
            )
        return self._keep.reshape(x.shape[:-1])


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all blocks: the allocator and cuBLAS keep memory for each stream."""
    return torch.cuda.Stream(device)


@contextmanager
def collect(linears: dict[str, nn.Module]) -> Iterator[Collector]:
    """Add hooks to the linears of a block that add up one H per distinct input, and remove them in any case.

    Linears share an H if they receive the same tensor object in the first batch (q, k and v; gate and up). Views of one
    tensor are distinct inputs, which is correct, only slower. A linear that no token reaches has no entry in `grams`.

    On CUDA, from the second batch on, H is added up on a side stream while the block and the next batch go on, except
    for inputs that the block edits in place later. After the `with`, the current stream sees the `grams` complete.
    """
    collector = Collector()
    with ExitStack() as hooks:
        for name, module in linears.items():

            def receive(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
                collector.receive(name, args[0] if args else kwargs["input"])

            hooks.callback(module.register_forward_pre_hook(receive, with_kwargs=True).remove)
        hooks.callback(collector.join)
        yield collector
