"""Saving the tensors of an adapter from a PEFT model, and loading them. PEFT itself writes the configuration."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn

from quailora.adapters.targets import Target, fill
from quailora.errors import AdapterError
from quailora.files import LazyTensor, write_tensors
from quailora.modeling.streamed_model import StreamedModel


@contextmanager
def loading_by_peft() -> Iterator[None]:
    """Within it, PEFT's calls of deprecated functions of transformers do not warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        yield


def check_can_be_saved(model: PeftModel, source: StreamedModel) -> None:
    """Check, before hours are spent, that every tensor PEFT will save is computed here or is in the checkpoint.

    Raises:
        AdapterError: naming the tensor.
    """
    for key in unfilled(model):
        if ".lora_" not in key and source.source(_base_name(key)) is None:
            raise AdapterError(
                f"PEFT would save {key}, which neither LoRA nor the checkpoint defines: load the model and use "
                "quailora.initialize"
            )


def take(model: PeftModel, targets: Iterable[Target]) -> dict[str, torch.Tensor]:
    """Move the factors of these targets out of the model: its parameters are on the meta device again. Returns them by
    the names that PEFT saves them under."""
    sides = [side[t.adapter] for t in targets for side in (t.layer.lora_A, t.layer.lora_B)]
    wanted = {id(parameter) for side in sides for parameter in side.parameters()}
    taken = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if id(parameter) in wanted:
            taken[_saved_name(name)] = parameter.detach()
            parent, _, leaf = name.rpartition(".")
            empty = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
            setattr(model.get_submodule(parent), leaf, empty)
    return taken


def factors_of(
    targets: Iterable[Target], tensors: Mapping[str, torch.Tensor]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B of the targets that have them among an adapter's tensors, given by the names that PEFT saves."""
    found = {}
    for target in targets:
        a, b = (tensors.get(f"{_PREFIX}{target.name}.lora_{side}.weight") for side in "AB")
        if a is not None and b is not None:
            found[target.name] = target.factors(a, b)
    return found


def rest(model: PeftModel, source: StreamedModel, seed: int, made: Collection[str]) -> dict[str, LazyTensor]:
    """What PEFT would save besides the tensors `made`: LoRA's default initialization for the modules without factors,
    and the checkpoint's tensors for `modules_to_save`."""
    names = {id(parameter): _saved_name(name) for name, parameter in model.named_parameters(remove_duplicate=False)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                for adapter in layer.r:
                    weights = [*layer.lora_A.values(), *layer.lora_B.values(), *layer.lora_embedding_A.values()]
                    if any(p.device.type == "meta" and names[id(p)] not in made for w in weights for p in _tensors(w)):
                        _allocate(layer, adapter)
                        layer.reset_lora_parameters(adapter, True)
    found = {}
    for key, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items():
        if key in made:
            continue
        stored = source.source(_base_name(key)) if tensor.device.type == "meta" else None
        read = partial(_read, source, stored, tensor.dtype) if stored else tensor.contiguous
        found[key] = LazyTensor(tuple(tensor.shape), tensor.dtype, read)
    return found


def save(model: PeftModel, folder: Path, tensors: dict[str, LazyTensor]) -> None:
    """Save the adapter as `model.save_pretrained` does. PEFT writes the configuration; the tensors are streamed."""
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert expected.keys() == tensors.keys(), sorted(expected.keys() ^ tensors.keys())[:3]
    nothing = {name: torch.empty(0) for name in model.state_dict()}
    model.save_pretrained(str(folder), state_dict=nothing, save_embedding_layers=False)
    write_tensors(folder / SAFETENSORS_WEIGHTS_NAME, tensors)


def put(model: PeftModel, tensors: dict[str, torch.Tensor]) -> None:
    """Set an adapter's parameters, given by the names that PEFT saves them under. They may be on the meta device.

    Raises:
        AdapterError: a tensor has no parameter in the model, or another shape.
    """
    parameters = model.named_parameters(remove_duplicate=False)
    places = {_saved_name(name): (name, parameter) for name, parameter in parameters}
    for saved, value in tensors.items():
        key = saved.replace(".modules_to_save.", ".")  # PEFT also saves resized embeddings under this name
        if key not in places:
            raise AdapterError(f"the adapter has {key}, which {type(model.get_base_model()).__name__} does not have")
        name, parameter = places[key]
        if parameter.shape != value.shape:
            raise AdapterError(f"{key} is {list(value.shape)} in the adapter and {list(parameter.shape)} in the model")
        parent, _, leaf = name.rpartition(".")
        fill(model.get_submodule(parent), leaf, value)


def unfilled(model: PeftModel) -> list[str]:
    """The names of tensors that PEFT would save and that have no values yet."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return [key for key, tensor in state.items() if tensor.device.type == "meta"]


def _read(source: StreamedModel, name: str, dtype: torch.dtype) -> torch.Tensor:
    return source.checkpoint.tensor(name).to(dtype)


def _tensors(weights: nn.Module | nn.Parameter) -> list[nn.Parameter]:
    return [weights] if isinstance(weights, nn.Parameter) else list(weights.parameters())


def _allocate(layer: LoraLayer, adapter: str) -> None:
    for group in (layer.lora_A, layer.lora_B):
        if adapter in group:
            group[adapter].to_empty(device="cpu")
    for embedding in (layer.lora_embedding_A, layer.lora_embedding_B):
        if adapter in embedding:
            embedding[adapter] = nn.Parameter(torch.empty_like(embedding[adapter], device="cpu"))


_PREFIX = "base_model.model."


def _saved_name(parameter: str) -> str:
    """The name that PEFT saves a parameter under."""
    return parameter.replace(".modules_to_save.default.", ".").replace(".default", "")


def _base_name(key: str) -> str:
    """The base model's name of a tensor that PEFT saves besides the LoRA weights."""
    return key.removeprefix(_PREFIX).replace(".base_layer.", ".")
