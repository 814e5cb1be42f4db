"""The decoder blocks of any transformers causal language model, of which only what is in use is in memory.

The model's skeleton stands on torch's meta device; weights come and go block by block, read through transformers' own
loading code, so that renamed prefixes, tied embeddings and merged expert weights are what `from_pretrained` would make
of them.
"""

from __future__ import annotations

import copy
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from threading import Event, Thread, current_thread

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.initialization import no_init_weights
from transformers.modeling_utils import LoadStateDictConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from quailora.errors import CheckpointError
from quailora.memory.allocator import return_freed_memory
from quailora.modeling.checkpoint import BAD_CONFIG, FLOATING, Checkpoint, TensorEntry, UnreadTensor

STAGING_BYTES = 32 * 2**20  # page-locked host memory through which a prefetch reaches a GPU


@dataclass(frozen=True)
class Block:
    """One decoder block: its name in the model and its module, whose parameters are on the meta device while not
    resident."""

    name: str
    module: nn.Module

    def linears(self) -> dict[str, nn.Module]:
        """Every linear of the block by its full name. GPT-2's Conv1D is one too, with its weight the other way
        round."""
        return {
            f"{self.name}.{name}": module
            for name, module in self.module.named_modules()
            if isinstance(module, nn.Linear | Conv1D)
        }


def linear_weight(linear: nn.Module) -> Tensor:
    """The weight of a linear as (outputs m, inputs n); Conv1D keeps its own as (n, m)."""
    weight = linear.get_parameter("weight").detach()
    return weight.T.contiguous() if isinstance(linear, Conv1D) else weight


def skeleton(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a checkpoint with its parameters on the meta device. Buffers, such as rotary frequencies, are
    real."""
    with no_init_weights(), init_empty_weights(include_buffers=False):
        try:
            # A copy, for quantizing the skeleton writes into the configuration.
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(checkpoint.config), dtype=dtype, trust_remote_code=checkpoint.trust_remote_code
            )
        except BAD_CONFIG as error:
            raise CheckpointError(
                f"transformers makes no causal language model of the configuration of {checkpoint.name}: "
                f"{type(error).__name__}: {error}"
            ) from error
    return model.eval()


class StreamedModel:
    """A causal language model whose blocks are brought into memory one at a time.

    Args:
        checkpoint: where the weights are.
        device: where blocks are brought to.
        dtype: what the weights are loaded as, and the forward pass computes in.

    Raises:
        CheckpointError: a tensor that the decoder needs is missing, of another shape, or not floating point.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype
        self.model = skeleton(checkpoint, dtype)
        self.decoder: nn.Module = self.model.get_decoder()
        self.blocks = _find_blocks(self.model, self.decoder)
        self._transforms = get_model_conversion_mapping(self.model)
        self._converted: set[str] = set()
        self._landings: dict[str, str] = {}
        self._sources = self._map_checkpoint()
        self._dtypes = self._plan_dtypes()
        self._ahead: _Prefetch | None = None
        self._verify()
        for module in self.decoder.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))

    @contextmanager
    def resident(self, *names: str) -> Iterator[None]:
        """Within it the modules of these names (or parameters, by their full names) have their weights, on `device`.

        What was prefetched for the same names is taken over, and waited for; all else is read here.

        Raises:
            CheckpointError: the file cannot be read any more, transformers cannot load it, or weights are not finite.
        """
        try:
            self._load(self._matching(names))
            return_freed_memory()  # the parts of what was made of several
            yield
        finally:
            self._release(names)
            return_freed_memory()

    def prefetch(self, *names: str) -> None:
        """Begin to bring what `resident(*names)` will need to `device`, by a thread of its own.

        It takes `nbytes` there, on a GPU at once. A prefetch of other names that nobody took is forgotten. What goes
        wrong in the thread is raised by `resident`.
        """
        matching = self._matching(names)
        if self._ahead is not None and self._ahead.names == matching:
            return
        self.forget_prefetched()
        wanted = {key: (self.checkpoint.tensors[key], self._dtypes[key]) for key in self._keys(matching)}
        self._ahead = _Prefetch(matching, wanted, self.device)

    def forget_prefetched(self) -> None:
        """Drop what was prefetched and not taken; waits for the tensor that is being read."""
        if self._ahead is not None:
            self._ahead.drop()
            self._ahead = None

    def nbytes(self, *names: str) -> int:
        """Bytes on `device` of what `resident(*names)` brings there, and of what `prefetch(*names)` does; nothing is
        read."""
        state = self._state()
        return sum(self._size(name, state[name]) for name in self._matching(names) if name in self._sources)

    def loading_nbytes(self, *names: str) -> int:
        """Bytes that `resident(*names)` needs beyond `nbytes` for as long as it loads, at most.

        A parameter that is made of several tensors is alive together with them, one such parameter at a time. Casting
        takes a few MiB more on the host.
        """
        state = self._state()
        made: dict[str, int] = {}  # several parameters may be made of the same tensors, all at once
        for name in self._matching(names):
            if name in self._converted and self._sources.get(name):
                made[self._sources[name][0]] = made.get(self._sources[name][0], 0) + self._size(name, state[name])
        return max(made.values(), default=0)

    def outside_blocks(self) -> list[str]:
        """What of the decoder's state belongs to no block: embeddings, final norm, projections between them."""
        prefixes = tuple(f"{block.name}." for block in self.blocks)
        inside = {id(tensor) for tensor in self.decoder.state_dict(keep_vars=True).values()}
        return [n for n, tensor in self._state().items() if id(tensor) in inside and not n.startswith(prefixes)]

    def source(self, parameter: str) -> str | None:
        """The checkpoint's name for a parameter of the model that is stored as it is; None where it is made of
        several."""
        keys = self._sources.get(parameter, [])
        return keys[0] if len(keys) == 1 and parameter not in self._converted else None

    def _matching(self, names: tuple[str, ...]) -> list[str]:
        return [name for name in self._state() if name.startswith(names)]

    def _keys(self, names: list[str]) -> list[str]:
        """The checkpoint's tensors that the state of these names is made of."""
        return sorted({key for name in names for key in self._sources.get(name, [])})

    def _size(self, name: str, tensor: Tensor) -> int:
        return tensor.numel() * self._dtypes[self._sources[name][0]].itemsize

    def _parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters(remove_duplicate=False))

    def _state(self) -> dict[str, Tensor]:
        """All that a checkpoint may store: parameters, and buffers such as the biases of a router. Buffers are small:
        once loaded they stay."""
        return self.model.state_dict(keep_vars=True)

    def _map_checkpoint(self) -> dict[str, list[str]]:
        """Parameter of the model -> tensors of the checkpoint that it is made of, by transformers' own renaming
        rules."""
        renamings = [t for t in self._transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in self._transforms if isinstance(t, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        known, prefix = self.model.state_dict(), self.model.base_model_prefix
        sources: dict[str, list[str]] = {}
        for key in self.checkpoint.tensors:
            name, pattern = rename_source_key(key, renamings, converters, prefix, known)
            if name not in known and key in known:
                name, pattern = rename_source_key(key, [], [], prefix, known)
            names = [name]
            if pattern is not None:
                targets = by_pattern[pattern].target_patterns
                names = [name.replace(targets[0], target) for target in targets]
                self._converted.update(names)
            self._landings[key] = names[0]
            for name in names:
                sources.setdefault(name, []).append(key)
        for target, source in self.model.all_tied_weights_keys.items():
            present = sources.get(source) or sources.get(target)
            if present:
                sources[source] = sources[target] = present
        return sources

    def _plan_dtypes(self) -> dict[str, torch.dtype]:
        """Tensor of the checkpoint -> what transformers' loader casts it to: what the model's class wants kept in fp32,
        else the dtype that the skeleton has where the tensor lands."""
        plan, state = self.model._get_dtype_plan(self.dtype), self._state()
        pattern, globs, _ = build_glob_alternation(list(plan))
        dtypes = {}
        for key, landing in self._landings.items():
            planned = pattern.search(landing) if plan else None
            if planned:
                dtypes[key] = plan[globs[planned.lastgroup or ""]]
            else:
                dtypes[key] = state[landing].dtype if landing in state else self.dtype
        return dtypes

    def _verify(self) -> None:
        parameters = self._parameters()
        used = [*self.outside_blocks(), *(n for n in parameters for b in self.blocks if n.startswith(f"{b.name}."))]
        needed = [name for name in used if name in parameters]
        missing = [name for name in needed if name not in self._sources]
        if missing:
            raise CheckpointError(
                f"{self.checkpoint.name} does not fit {type(self.model).__name__}: {len(missing)} of {len(needed)} "
                f"tensors are missing, the first is {missing[0]}"
            )
        for name in needed:
            entries = [self.checkpoint.tensors[key] for key in self._sources[name]]
            odd = next((entry for entry in entries if entry.dtype not in FLOATING), None)
            if odd is not None:
                raise CheckpointError(
                    f"{name} is stored as {odd.dtype} in {odd.file.name}: a full-precision checkpoint holds "
                    f"{', '.join(FLOATING)}"
                )
            if self.source(name) and entries[0].shape != tuple(parameters[name].shape):
                raise CheckpointError(
                    f"{name} is {list(entries[0].shape)} in {entries[0].file.name}, and the configuration says "
                    f"{list(parameters[name].shape)}: the checkpoint and its config.json do not fit each other"
                )

    def _load(self, names: list[str]) -> None:
        tensors = self.checkpoint.slices(self._keys(names), self._dtypes)
        config = LoadStateDictConfig(
            device_map={"": self.device},
            dtype=self.dtype,
            dtype_plan=self.model._get_dtype_plan(self.dtype),
            weight_mapping=self._transforms,  # type: ignore[arg-type]
        )
        with no_progress_bar(), self._taken_over(names) as fetched:
            tensors |= fetched
            info, _ = convert_and_load_state_dict_in_model(self.model, tensors, config)
        self._move_tied(names)
        parameters = {name: p for name, p in self._parameters().items() if name in names}
        unloaded = [name for name, parameter in parameters.items() if parameter.device.type == "meta"]
        if unloaded or info.mismatched_keys or info.conversion_errors:
            first = unloaded or sorted(map(str, info.mismatched_keys)) or sorted(info.conversion_errors)
            raise CheckpointError(f"{self.checkpoint.name}: transformers could not load {first[0]}")
        for name, parameter in parameters.items():
            if parameter.dtype != (planned := self._dtypes[self._sources[name][0]]):
                raise CheckpointError(f"{name}: this transformers loads it as {parameter.dtype}, expected {planned}")
            if parameter.is_cuda:  # transformers' threads allocate on the default stream, whatever is the caller's
                parameter.record_stream(torch.cuda.current_stream(parameter.device))
            parameter.requires_grad_(False)
            if not all(extreme.isfinite() for extreme in parameter.aminmax()):  # NaN is both extremes
                raise CheckpointError(
                    f"{name} of {self.checkpoint.name} holds NaN or infinite values as {self.dtype}: the file is "
                    "damaged, or its values are too large for that dtype"
                )

    @contextmanager
    def _taken_over(self, names: list[str]) -> Iterator[dict[str, UnreadTensor]]:
        """What was prefetched for exactly these names; each tensor can be had once, and what is left goes at the
        end."""
        ahead = self._ahead
        if ahead is None or ahead.names != names:
            yield {}
            return
        try:
            yield ahead.tensors()
        finally:
            self.forget_prefetched()

    def _release(self, names: tuple[str, ...]) -> None:
        for name, parameter in self._parameters().items():
            if parameter.device.type != "meta" and name.startswith(names):
                self._set(name, nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))

    def _move_tied(self, names: list[str]) -> None:
        """A tied weight may be stored under its partner's name (the head's for the embedding): give it to the one that
        was asked for."""
        parameters = self._parameters()
        for pair in self.model.all_tied_weights_keys.items():
            for wanted, partner in (pair, pair[::-1]):
                if wanted in names and parameters[wanted].device.type == "meta" != parameters[partner].device.type:
                    self._set(wanted, parameters[partner])
                    self._set(partner, parameters[wanted])

    def _set(self, name: str, parameter: nn.Parameter) -> None:
        parent, _, leaf = name.rpartition(".")
        setattr(self.model.get_submodule(parent), leaf, parameter)


class _Prefetch:
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


def _find_blocks(model: PreTrainedModel, decoder: nn.Module) -> list[Block]:
    """The decoder's blocks: the outermost list of modules as long as the configuration says, wherever it is and
    whatever its name."""
    depth = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    blocks = next((m for m in lists if len(m) == depth), None)
    if blocks is None:
        raise CheckpointError(
            f"{type(model).__name__} has no list of {depth} decoder blocks, found lists of "
            f"{sorted({len(m) for m in lists})}: this architecture is not supported"
        )
    names = {id(module): name for name, module in model.named_modules()}
    return [Block(names[id(module)], module) for module in blocks]


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """transformers draws a bar for each call of its loader; ours is the only one a person should see."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
