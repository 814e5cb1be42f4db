"""Hidden states between blocks, the arguments each block is called with, and the inputs of a block's linears."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from quailora.calibration.data import Batch
from quailora.calibration.gram import Gram
from quailora.errors import CalibrationError, CheckpointError
from quailora.modeling.streamed_model import Block, StreamedModel


@dataclass(frozen=True, eq=False)
class Call:
    """What a model passes to a block beside the hidden states: masks, position embeddings, ALiBi; they can differ per
    block."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's hidden states out, for its hidden states in, both (b, t, d)."""
        args, kwargs = (
            _map_tensors(part, lambda x: x.to(hidden.device, non_blocking=True)) for part in (self.args, self.kwargs)
        )
        out = block(hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out


class Calls:
    """Records the calls that a model makes to its blocks, without running the blocks.

    The model's own forward pass runs over its embeddings with every block replaced by one that hands the hidden states
    on, so masks and position embeddings are made by the model itself and no model family needs code of its own. Equal
    tensors are kept once, on the host: batches of one length share theirs, and the device holds those of one batch.

    Raises:
        CheckpointError: the decoder is no plain chain of its blocks.
    """

    def __init__(self, model: StreamedModel) -> None:
        self._model = model
        self._pool: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}
        self._known: dict[torch.Size, list[list[Call]]] = {}
        self._tuples: dict[type[nn.Module], bool] = {}

    @torch.no_grad()
    def record(self, batch: Batch) -> tuple[Tensor, list[Call]]:
        """The hidden states (b, t, d) that enter the first block, and one call per block. The embeddings must be
        resident."""
        self._learn_outputs(batch)
        calls: list[Call] = []
        first: list[Tensor] = []

        def bypass(block: Block, *args: Any, **kwargs: Any) -> Any:
            hidden, call = split_call(args, kwargs)
            first.append(hidden)
            if hidden is not first[0] or block is not self._model.blocks[len(calls) % len(self._model.blocks)]:
                raise CheckpointError(NOT_A_CHAIN)
            calls.append(Call(_map_tensors(call.args, self._shared), _map_tensors(call.kwargs, self._shared)))
            return (hidden, None) if self._tuples[type(block.module)] else hidden

        with replaced_forward(self._model.blocks, bypass):
            self._run(batch.input_ids)
        if len(calls) != len(self._model.blocks):
            raise CheckpointError(NOT_A_CHAIN)
        # One list for all batches that are called alike: else memory would grow with their number times the depth.
        known = self._known.setdefault(batch.input_ids.shape, [])
        alike = next((each for each in known if _alike(each, calls)), None)
        if alike is None:
            known.append(calls)
        return first[0], alike or calls

    def _learn_outputs(self, batch: Batch) -> None:
        """Whether a block returns a tensor or a tuple is seen by running one of each class on a single token."""
        for index, block in enumerate(self._model.blocks):
            kind = type(block.module)
            if kind in self._tuples:
                continue

            def probe(
                at: Block, *args: Any, index: int = index, forward: Any = block.module.forward, **kwargs: Any
            ) -> Any:
                if at is not self._model.blocks[index]:
                    hidden, _ = split_call(args, kwargs)
                    return (hidden, None) if self._tuples[type(at.module)] else hidden
                raise _Seen(isinstance(forward(*args, **kwargs), tuple))

            with self._model.resident(f"{block.name}."), replaced_forward(self._model.blocks, probe):
                try:
                    self._run(batch.input_ids[:1, :1])
                except _Seen as seen:
                    self._tuples[kind] = seen.is_tuple

    def _run(self, input_ids: Tensor) -> None:
        # No attention mask: batches are padded on the right, where causal attention never looks.
        self._model.decoder(input_ids=input_ids.to(self._model.device), use_cache=False)

    def _shared(self, value: Tensor) -> Tensor:
        value = value.cpu()
        known = self._pool.setdefault((value.shape, value.dtype), [])
        for tensor in known:
            if torch.equal(tensor, value):
                return tensor
        if self._model.device.type == "cuda":
            value = value.pin_memory()  # or the host would wait for its copy at every call
        known.append(value)
        return value


NOT_A_CHAIN = (
    "this model's decoder does more than hand the hidden states from each block to the next, once: its blocks cannot "
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
    """Whether two structures are equal, their tensors being the very same."""
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
    """Carries what `_learn_outputs` wanted to know out of a forward pass that need not go on."""

    def __init__(self, is_tuple: bool) -> None:
        self.is_tuple = is_tuple


def split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    if args:
        return args[0], Call(args[1:], kwargs)
    return kwargs["hidden_states"], Call((), {key: value for key, value in kwargs.items() if key != "hidden_states"})


@contextmanager
def replaced_forward(blocks: list[Block], forward: Callable[..., Any]) -> Iterator[None]:
    """Within it `forward(block, *args, **kwargs)` answers in place of every block's own forward."""
    try:
        for block in blocks:
            block.module.forward = lambda *args, block=block, **kwargs: forward(block, *args, **kwargs)
        yield
    finally:
        for block in blocks:
            block.module.__dict__.pop("forward", None)


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
