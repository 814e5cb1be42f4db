"""The decoder blocks of any transformers causal language model, with only what is in use in memory.

The model is on torch's meta device, and weights are loaded and released block by block. They are read with
transformers' own loading code, so renamed prefixes, tied embeddings and merged expert weights come out as with
`from_pretrained`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quailora.errors import CheckpointError
from quailora.modeling.blocks import find_blocks
from quailora.modeling.checkpoint import BAD_CONFIG, FLOATING, Checkpoint, UnreadTensor
from quailora.modeling.model_class import CAUSAL_LM, auto_model
from quailora.modeling.prefetch import Prefetch
from quailora.modeling.transformers_internals import Loader, on_meta_device, tied_weights


def skeleton(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a checkpoint with its parameters on the meta device. Buffers, such as rotary frequencies, have
    values."""
    kind = "causal language model" if checkpoint.auto_class == CAUSAL_LM else "vision-language model"
    with on_meta_device():
        try:
            # A copy, because quantizing the skeleton changes the configuration.
            model: PreTrainedModel = auto_model(checkpoint.auto_class).from_config(
                copy.deepcopy(checkpoint.config), dtype=dtype, trust_remote_code=checkpoint.trust_remote_code
            )
        except BAD_CONFIG as error:
            reason = " ".join(str(error).partition("Model type should be one of")[0].split())  # it lists 200 classes
            raise CheckpointError(
                f"transformers has no {kind} for the configuration of {checkpoint.name}: "
                f"{type(error).__name__}: {reason}"
            ) from error
    return model.eval()


class StreamedModel:
    """A causal language model whose blocks are loaded one at a time.

    Args:
        checkpoint: where the weights are.
        device: where blocks are loaded to.
        dtype: of the loaded weights, and of the forward pass.

    Raises:
        CheckpointError: a tensor that the decoder needs is missing, has another shape, or is not floating point.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype
        self.model = skeleton(checkpoint, dtype)
        self.decoder: nn.Module = self.model.get_decoder()
        self.blocks = find_blocks(self.model, self.decoder)
        self._loader = Loader(self.model, dtype)
        self._sources, self._converted, landings = self._loader.map_names(checkpoint.tensors)
        self._dtypes = self._loader.plan_dtypes(landings)
        self._ahead: Prefetch | None = None
        self._verify()
        for module in self.decoder.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))

    @contextmanager
    def resident(self, *names: str) -> Iterator[None]:
        """Within it the modules of these names (or parameters, by their full names) have their weights, on `device`.

        What is being prefetched for the same names is used, and waited for; everything else is read here.

        Raises:
            CheckpointError: the file can no longer be read, transformers cannot load it, or weights are not finite.
        """
        try:
            self._load(self._matching(names))
            yield
        finally:
            self._release(names)

    def prefetch(self, *names: str) -> None:
        """Start reading what `resident(*names)` will need to `device`, in a thread.

        It takes `nbytes` there; on a GPU they are allocated at once. An unused prefetch of other names is dropped.
        Errors in the thread are raised by `resident`.
        """
        matching = self._matching(names)
        if self._ahead is not None and self._ahead.names == matching:
            return
        self.forget_prefetched()
        wanted = {key: (self.checkpoint.tensors[key], self._dtypes[key]) for key in self._keys(matching)}
        self._ahead = Prefetch(matching, wanted, self.device)

    def forget_prefetched(self) -> None:
        """Drop what was prefetched and not used; waits for the tensor that is being read."""
        if self._ahead is not None:
            self._ahead.drop()
            self._ahead = None

    def nbytes(self, *names: str) -> int:
        """Bytes on `device` that `resident(*names)` loads, or `prefetch(*names)` reads ahead. Nothing is read."""
        state = self._state()
        return sum(self._size(name, state[name]) for name in self._matching(names) if name in self._sources)

    def loading_nbytes(self, *names: str) -> int:
        """Bytes that `resident(*names)` needs beyond `nbytes` while it loads, at most.

        A parameter made from several tensors is in memory together with them, one such parameter at a time. Casting
        takes a few MiB more on the host.
        """
        state = self._state()
        made: dict[str, int] = {}  # several parameters may be made from the same tensors, all at once
        for name in self._matching(names):
            if name in self._converted and self._sources.get(name):
                made[self._sources[name][0]] = made.get(self._sources[name][0], 0) + self._size(name, state[name])
        return max(made.values(), default=0)

    def outside_blocks(self) -> list[str]:
        """The decoder's state outside its blocks: embeddings, final norm, projections between them."""
        prefixes = tuple(f"{block.name}." for block in self.blocks)
        inside = {id(tensor) for tensor in self.decoder.state_dict(keep_vars=True).values()}
        return [n for n, tensor in self._state().items() if id(tensor) in inside and not n.startswith(prefixes)]

    def source(self, parameter: str) -> str | None:
        """The checkpoint's name for a parameter of the model; None if it is not stored as one tensor of its own."""
        keys = self._sources.get(parameter, [])
        return keys[0] if len(keys) == 1 and parameter not in self._converted else None

    def keys(self, *names: str) -> list[str]:
        """The checkpoint's names for what `resident(*names)` brings."""
        return self._keys(self._matching(names))

    def _matching(self, names: tuple[str, ...]) -> list[str]:
        return [name for name in self._state() if name.startswith(names)]

    def _keys(self, names: list[str]) -> list[str]:
        """The checkpoint's tensors that these entries of the state are made from."""
        return sorted({key for name in names for key in self._sources.get(name, [])})

    def _size(self, name: str, tensor: Tensor) -> int:
        return tensor.numel() * self._dtypes[self._sources[name][0]].itemsize

    def _parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters(remove_duplicate=False))

    def _state(self) -> dict[str, Tensor]:
        """Everything that a checkpoint may store: parameters, and buffers such as the biases of a router. Buffers are
        small and stay in memory once loaded."""
        return self.model.state_dict(keep_vars=True)

    def _verify(self) -> None:
        parameters = self._parameters()
        used = [*self.outside_blocks(), *(n for n in parameters for b in self.blocks if n.startswith(f"{b.name}."))]
        needed = [name for name in used if name in parameters]
        missing = [name for name in needed if name not in self._sources]
        if missing:
            raise CheckpointError(
                f"{self.checkpoint.name} does not match {type(self.model).__name__}: {len(missing)} of {len(needed)} "
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
                    f"{list(parameters[name].shape)}: the checkpoint and its config.json do not match"
                )

    def _load(self, names: list[str]) -> None:
        tensors = self.checkpoint.slices(self._keys(names), self._dtypes)
        with self._taken_over(names) as fetched:
            failed = self._loader.load(tensors | fetched, self.device)
        self._move_tied(names)
        parameters = {name: p for name, p in self._parameters().items() if name in names}
        unloaded = [name for name, parameter in parameters.items() if parameter.device.type == "meta"]
        if unloaded or failed:
            raise CheckpointError(f"{self.checkpoint.name}: transformers could not load {(unloaded or failed)[0]}")
        for name, parameter in parameters.items():
            if parameter.dtype != (planned := self._dtypes[self._sources[name][0]]):
                raise CheckpointError(
                    f"{name}: this version of transformers loads it as {parameter.dtype}, expected {planned}"
                )
            if parameter.is_cuda:  # transformers' threads allocate on the default stream, whatever the caller's is
                parameter.record_stream(torch.cuda.current_stream(parameter.device))
            parameter.requires_grad_(False)
            if not all(extreme.isfinite() for extreme in parameter.aminmax()):  # if there is a NaN, both are NaN
                raise CheckpointError(
                    f"{name} of {self.checkpoint.name} holds NaN or infinite values as {self.dtype}: the file is "
                    "damaged, or its values are too large for that dtype"
                )

    @contextmanager
    def _taken_over(self, names: list[str]) -> Iterator[dict[str, UnreadTensor]]:
        """What was prefetched for exactly these names. Each tensor can be taken once; what is left is dropped
        at the end."""
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
        """A tied weight may be stored under its partner's name (the head's instead of the embedding's): move it to the
        parameter that was asked for."""
        parameters = self._parameters()
        for pair in tied_weights(self.model).items():
            for wanted, partner in (pair, pair[::-1]):
                if wanted in names and parameters[wanted].device.type == "meta" != parameters[partner].device.type:
                    self._set(wanted, parameters[partner])
                    self._set(partner, parameters[wanted])

    def _set(self, name: str, parameter: nn.Parameter) -> None:
        parent, _, leaf = name.rpartition(".")
        setattr(self.model.get_submodule(parent), leaf, parameter)
