"""The arguments that a model calls each of its blocks with, recorded so that blocks can be run one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quailora.calibration.data import Batch
from quailora.errors import CheckpointError
from quailora.modeling.blocks import Block
from quailora.modeling.streamed_model import StreamedModel


@dataclass(frozen=True, eq=False)
class Call:
    """What a model passes to a block besides the hidden states (masks, position embeddings, ALiBi), which can differ
    from block to block."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output for these hidden states, both (b, t, d)."""
        args, kwargs = (
            _map_tensors(part, lambda x: x.to(hidden.device, non_blocking=True)) for part in (self.args, self.kwargs)
        )
        out = block(hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out


class Calls:
    """Records the calls that a model makes to its blocks, without running the blocks.

    The model's own forward pass runs with every block replaced by one that passes the hidden states through, so the
    model itself makes masks and position embeddings, and no model family needs code of its own. Equal tensors are kept
    once, on the host: batches of one length share theirs, and the device holds those of one batch only.
    """

    def __init__(self, model: StreamedModel) -> None:
        self._model = model
        self._pool: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}
        self._known: dict[torch.Size, list[list[Call]]] = {}
        self.tuples: dict[type[nn.Module], bool] = {}  # by class of block: whether it returns a tuple

    @torch.no_grad()
    def record(self, batch: Batch) -> tuple[Tensor, list[Call]]:
        """The hidden states (b, t, d) that enter the first block, and one call per block.

        The weights outside the blocks must be resident. Raises CheckpointError if the decoder is not a plain chain of
        its blocks.
        """
        self._learn_outputs(batch)
        calls: list[Call] = []
        first: list[Tensor] = []

        def bypass(block: Block, *args: Any, **kwargs: Any) -> Any:
            hidden, call = split_call(args, kwargs)
            first.append(hidden)
            if hidden is not first[0] or block is not self._model.blocks[len(calls) % len(self._model.blocks)]:
                raise CheckpointError(NOT_A_CHAIN)
            calls.append(Call(_map_tensors(call.args, self._shared), _map_tensors(call.kwargs, self._shared)))
            return (hidden, None) if self.tuples[type(block.module)] else hidden

        with replaced_forward(self._model.blocks, bypass):
            self._run(batch.input_ids)
        if len(calls) != len(self._model.blocks):
            raise CheckpointError(NOT_A_CHAIN)
        # Batches with equal calls share one list, or memory would grow with the number of batches times the depth.
        known = self._known.setdefault(batch.input_ids.shape, [])
        alike = next((each for each in known if _alike(each, calls)), None)
        if alike is None:
            known.append(calls)
        return first[0], alike or calls

    def _learn_outputs(self, batch: Batch) -> None:
        """Run one block of each class on a single token, to see whether it returns a tensor or a tuple."""
        for index, block in enumerate(self._model.blocks):
            kind = type(block.module)
            if kind in self.tuples:
                continue

            def probe(
                at: Block, *args: Any, index: int = index, forward: Any = block.module.forward, **kwargs: Any
            ) -> Any:
                if at is not self._model.blocks[index]:
                    hidden, _ = split_call(args, kwargs)
                    return (hidden, None) if self.tuples[type(at.module)] else hidden
                raise _Seen(isinstance(forward(*args, **kwargs), tuple))

            with self._model.resident(f"{block.name}."), replaced_forward(self._model.blocks, probe):
                try:
                    self._run(batch.input_ids[:1, :1])
                except _Seen as seen:
                    self.tuples[kind] = seen.is_tuple

    def _run(self, input_ids: Tensor) -> None:
        # No attention mask: padding is on the right, where causal attention never looks.
        self._model.decoder(input_ids=input_ids.to(self._model.device), use_cache=False)

    def _shared(self, value: Tensor) -> Tensor:
        value = value.cpu()
        known = self._pool.setdefault((value.shape, value.dtype), [])
        for tensor in known:
            if torch.equal(tensor, value):
                return tensor
        if self._model.device.type == "cuda":
            value = value.pin_memory()  # or the host would wait for the copy at every call
        known.append(value)
        return value


NOT_A_CHAIN = (
    "this model's decoder does more than pass the hidden states from each block to the next once, so its blocks cannot "
    "be run one at a time"
)


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure of tuples, lists and dicts with every tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(_map_tensors(item, change) for item in value)
    if type(value) is dict:
        return {key: _map_tensors(item, change) for key, item in value.items()}
    return value


def _alike(one: Any, other: Any) -> bool:
    """Whether two structures are equal and hold the same tensor objects."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return one is other
    if isinstance(one, Call) and isinstance(other, Call):
        return _alike((one.args, one.kwargs), (other.args, other.kwargs))
    if type(one) is not type(other):
        return False
    if type(one) in (tuple, list):
        return len(one) == len(other) and all(map(_alike, one, other))
    if type(one) is dict:
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    return bool(one is other or one == other)


class _Seen(Exception):
    """Ends a forward pass as soon as `_learn_outputs` knows what a block returns."""

    def __init__(self, is_tuple: bool) -> None:
        self.is_tuple = is_tuple


def split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """The arguments of a block, as its hidden states (b, t, d) and the rest."""
    if args:
        return args[0], Call(args[1:], kwargs)
    return kwargs["hidden_states"], Call((), {key: value for key, value in kwargs.items() if key != "hidden_states"})


@contextmanager
def replaced_forward(blocks: list[Block], forward: Callable[..., Any]) -> Iterator[None]:
    """Within it, `forward(block, *args, **kwargs)` replaces the forward method of every block."""
    try:
        for block in blocks:
            block.module.forward = lambda *args, block=block, **kwargs: forward(block, *args, **kwargs)
        yield
    finally:
        for block in blocks:
            block.module.__dict__.pop("forward", None)
