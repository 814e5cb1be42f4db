"""The decoder blocks of any transformers causal language model, of which only what is in use is in memory.

The model's skeleton stands on torch's meta device; weights come and go block by block, read through transformers' own
loading code, so that renamed prefixes, tied embeddings and merged expert weights are what `from_pretrained` would make
of them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.initialization import no_init_weights
from transformers.modeling_utils import LoadStateDictConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from quailora.checkpoint import BAD_CONFIG, FLOATING, Checkpoint
from quailora.errors import CheckpointError


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
            # A copy, for quantising the skeleton writes into the configuration.
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
        self._sources = self._map_checkpoint()
        self._verify()
        for module in self.decoder.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))

    @contextmanager
    def resident(self, *names: str) -> Iterator[None]:
        """Within it the modules of these names (or parameters, by their full names) have their weights, on `device`."""
        try:
            self._load([name for name in self._state() if name.startswith(tuple(names))])
            yield
        finally:
            for name, parameter in self._parameters().items():
                if parameter.device.type != "meta" and name.startswith(tuple(names)):
                    self._set(name, nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))

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
            for name in names:
                sources.setdefault(name, []).append(key)
        for target, source in self.model.all_tied_weights_keys.items():
            present = sources.get(source) or sources.get(target)
            if present:
                sources[source] = sources[target] = present
        return sources

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
        keys = sorted({key for name in names for key in self._sources.get(name, [])})
        config = LoadStateDictConfig(
            device_map={"": self.device},
            dtype=self.dtype,
            dtype_plan=self.model._get_dtype_plan(self.dtype),
            weight_mapping=self._transforms,  # type: ignore[arg-type]
        )
        with no_progress_bar():
            info, _ = convert_and_load_state_dict_in_model(self.model, self.checkpoint.slices(keys), config)
        self._move_tied(names)
        parameters = {name: p for name, p in self._parameters().items() if name in names}
        unloaded = [name for name, parameter in parameters.items() if parameter.device.type == "meta"]
        if unloaded or info.mismatched_keys or info.conversion_errors:
            first = unloaded or sorted(map(str, info.mismatched_keys)) or sorted(info.conversion_errors)
            raise CheckpointError(f"{self.checkpoint.name}: transformers could not load {first[0]}")
        for name, parameter in parameters.items():
            parameter.requires_grad_(False)
            if not all(extreme.isfinite() for extreme in parameter.aminmax()):  # NaN is both extremes
                raise CheckpointError(
                    f"{name} of {self.checkpoint.name} holds NaN or infinite values as {self.dtype}: the file is "
                    "damaged, or its values are too large for that dtype"
                )

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
