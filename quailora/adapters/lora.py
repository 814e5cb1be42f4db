"""Factors -> an ordinary PEFT adapter. PEFT itself resolves targets, ranks and scaling, and writes the files."""

from __future__ import annotations

import difflib
import math
import re
import warnings
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from quailora.errors import AdapterError
from quailora.files import LazyTensor, write_tensors
from quailora.modeling.checkpoint import Checkpoint
from quailora.modeling.streamed_model import StreamedModel, skeleton
from quailora.modeling.transformers_internals import quantize_skeleton
from quailora.quantization.registry import is_quantized
from quailora.solvers.solve import LoraFactors


@dataclass(frozen=True)
class Target:
    """A linear of the base model that LoRA adapts and the base holds quantized.

    scaling: what PEFT multiplies `lora_B.weight @ lora_A.weight` with: alpha / r, or alpha / sqrt(r) with rsLoRA.
    """

    name: str
    layer: LoraLayer
    adapter: str
    rank: int
    scaling: float

    @property
    def base(self) -> Any:
        """The quantized linear itself."""
        return self.layer.get_base_layer()

    def assign(self, factors: LoraFactors, seed: int = 0) -> None:
        """Put the factors in place: scaling * lora_B.weight @ lora_A.weight = A Bᵀ, whatever alpha is, with both sides
        balanced."""
        root = self.scaling**0.5
        lora_a, lora_b = self.layer.lora_A[self.adapter], self.layer.lora_B[self.adapter]
        down = factors.B.T / root
        if factors.effective_rank < self.rank:
            # If both factors are zero, neither has a gradient. Such a pair gets LoRA's default initialization, so that
            # it can learn.
            bound = down.shape[1] ** -0.5
            start = torch.empty(down[factors.effective_rank :].shape)
            start.uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))
            down[factors.effective_rank :] = start.to(down.device)
        _fill(lora_a, "weight", down)
        _fill(lora_b, "weight", factors.A / root)
        if getattr(lora_b, "bias", None) is not None:
            _fill(lora_b, "bias", torch.zeros(self.base.out_features))


def quantized_skeleton(checkpoint: Checkpoint, config: BitsAndBytesConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The base model as transformers would quantize it, with no weights: which linears are quantized, and how.

    Raises:
        AdapterError: transformers quantizes no linear of this model.
    """
    model = skeleton(checkpoint, dtype)
    linears = {type(m).__name__ for m in model.get_decoder().modules() if isinstance(m, nn.Linear | Conv1D)}
    quantize_skeleton(model, config, dtype)
    if not any(is_quantized(module) for module in model.modules()):
        raise AdapterError(
            f"transformers quantizes no linear of {type(model).__name__} (they are {', '.join(sorted(linears))}), "
            "so loading it with this quantization gives the full-precision model and there is nothing to initialize"
        )
    return model


def adapted_skeleton(base: PreTrainedModel, config: LoraConfig, checkpoint: Checkpoint) -> PeftModel:
    """`get_peft_model` over a base on the meta device: no LoRA weight has memory yet.

    Raises:
        AdapterError: a target module that the model does not have (with the nearest names), or a setting PEFT refuses.
    """
    _check_names(base, config)
    if config.target_modules == "all-linear":
        _exclude(config, [name for name, module in base.named_modules() if _is_router(module)])
    base.name_or_path = checkpoint.name
    config.base_model_name_or_path, config.revision = checkpoint.name, checkpoint.revision
    try:
        with warnings.catch_warnings():
            # PEFT 0.21 asks transformers for a property that is about to be renamed.
            warnings.filterwarnings("ignore", category=FutureWarning, message=".*is_gradient_checkpointing")
            model = get_peft_model(base, config, low_cpu_mem_usage=True)
    except (ValueError, TypeError) as error:
        raise AdapterError(f"PEFT refuses this LoRA configuration: {error}") from error
    if isinstance(config.target_modules, set):  # written as it comes, a set would change the file from run to run
        config.target_modules = sorted(config.target_modules)
    return model


def targeted_skeleton(
    checkpoint: Checkpoint, quantization: BitsAndBytesConfig, dtype: torch.dtype, config: LoraConfig
) -> tuple[PeftModel, list[str]]:
    """The base as transformers would quantize it, wrapped by PEFT, on the meta device; and the linears narrower than r,
    such as a mixture's 1 x n gate. `config` gets a rank for each of those: its smaller side.

    Raises:
        AdapterError: as `quantized_skeleton` and `adapted_skeleton`; or every targeted linear is narrower than r.
    """
    model = adapted_skeleton(quantized_skeleton(checkpoint, quantization, dtype), config, checkpoint)
    adapted = {
        name: layer
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, LoraLayer) and is_quantized(layer.get_base_layer())
    }
    narrow = {name: layer for name, layer in adapted.items() if layer.r["default"] > _smaller_side(layer)}
    if not narrow:
        return model, []
    if len(narrow) == len(adapted):
        name, layer = next(iter(narrow.items()))
        raise AdapterError(
            f"rank {layer.r['default']} exceeds the smaller side of every targeted linear ({name} is "
            f"{layer.out_features} x {layer.in_features}): lower r (--rank)"
        )
    ranks: dict[str, int] = {}
    alphas: dict[str, int] = {}
    for name, layer in narrow.items():
        rank = _smaller_side(layer)
        ranks[name] = rank
        # The scaling stays as it was; a larger one would train these linears at a higher rate. PEFT takes floats too.
        alphas[name] = float(layer.scaling["default"]) * (math.sqrt(rank) if config.use_rslora else rank)  # type: ignore[assignment]
    # PEFT takes the first pattern that matches.
    config.rank_pattern = ranks | (config.rank_pattern or {})
    config.alpha_pattern = alphas | (config.alpha_pattern or {})
    model = adapted_skeleton(quantized_skeleton(checkpoint, quantization, dtype), config, checkpoint)
    return model, list(narrow)


def _smaller_side(layer: LoraLayer) -> int:
    base: Any = layer.get_base_layer()
    return min(base.in_features, base.out_features)


def _exclude(config: LoraConfig, names: list[str]) -> None:
    if names and isinstance(config.exclude_modules, str):
        config.exclude_modules = "|".join([f"({config.exclude_modules})", *map(re.escape, names)])
    elif names:
        config.exclude_modules = sorted({*(config.exclude_modules or ()), *names})


def _is_router(module: nn.Module) -> bool:
    """Whether a module subclasses nn.Linear but gives no single tensor, as the routers of Llama 4 and PhiMoE do: PEFT
    wraps it and then cannot run it."""
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward or is_quantized(module):
        return False
    x = torch.zeros(2, module.in_features, dtype=module.weight.dtype, device=module.weight.device)
    with torch.no_grad():
        return not isinstance(module(x), torch.Tensor)


def check_config(config: Any) -> LoraConfig:
    """Return `config` if factors with A Bᵀ ≈ W - Q are a valid initialization for it.

    Raises:
        AdapterError: otherwise; with the setting, why, and what to use instead.
    """
    if not isinstance(config, LoraConfig):
        raise AdapterError(f"{type(config).__name__} is not a LoRA configuration: use peft.LoraConfig")
    if config.use_dora:
        raise AdapterError(
            "use_dora=True: DoRA rescales every row of the adapted weight by its own norm, so factors that undo the "
            "quantization error are not what its forward pass needs; use plain LoRA"
        )
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise AdapterError(
            f"init_lora_weights={config.init_lora_weights!r} is another initialization, and some change the "
            "base weights: leave it at True"
        )
    if config.layer_replication:
        raise AdapterError(
            "layer_replication makes blocks that the checkpoint does not have: their inputs are not defined"
        )
    return config


def find_targets(model: PeftModel, adapter: str = "default") -> tuple[list[Target], dict[str, str]]:
    """The quantized linears that `adapter` adapts; and the other adapted modules, which keep LoRA's default
    initialization, each with the reason.

    Raises:
        AdapterError: a scaling that is not positive, a router that PEFT cannot run, or a variant of LoRA whose product
            is not B A.
    """
    targets, left = [], {}
    config: Any = model.peft_config[adapter]
    excluded = config.exclude_modules
    for name, layer in model.get_base_model().named_modules():
        if _is_router(layer) and isinstance(excluded, Collection) and name in excluded:
            left[name] = f"this {type(layer).__name__} returns more than one tensor, and PEFT could not run it"
        if not isinstance(layer, BaseTunerLayer) or not isinstance(layer, LoraLayer) or adapter not in layer.r:
            continue
        base: Any = layer.get_base_layer()
        if isinstance(layer, ParamWrapper):
            left[f"{name.replace('.base_layer', '')}.{layer.parameter_name}"] = (
                "fused expert weights (3-D): the base keeps them in full precision"
                if base.get_parameter(layer.parameter_name).dim() == 3
                else f"a parameter of {type(base).__name__}, which the base keeps in full precision"
            )
        elif adapter in layer.lora_variant:
            raise AdapterError(
                f"{name} uses {type(layer.lora_variant[adapter]).__name__}, whose product is not that of plain LoRA"
            )
        elif _is_router(base):
            raise AdapterError(
                f"{name} is a {type(base).__name__}, which returns more than one tensor, and PEFT cannot run it: leave "
                "it out of target_modules, or add it to exclude_modules"
            )
        elif not is_quantized(base):
            left[name] = f"the base keeps this {type(base).__name__} in full precision: there is no error to undo"
        else:
            rank, scaling = layer.r[adapter], float(layer.scaling[adapter])
            if rank > min(base.in_features, base.out_features):
                left[name] = (
                    f"rank {rank} exceeds the smaller side of its {layer.out_features} x {layer.in_features} weight"
                )
                continue
            if scaling <= 0:
                raise AdapterError(
                    f"{name} has scaling {scaling} (alpha {layer.lora_alpha[adapter]}, r {rank}): it must be positive"
                )
            targets.append(Target(name, layer, adapter, rank, scaling))
    return targets, left


def check_can_be_saved(model: PeftModel, source: StreamedModel) -> None:
    """Check, before hours are spent, that every tensor PEFT will save is made here or is in the checkpoint.

    Raises:
        AdapterError: naming the tensor and the setting it comes from.
    """
    for key in unfilled(model):
        if ".lora_" not in key and source.source(_base_name(key)) is None:
            raise AdapterError(
                f"PEFT would save {key}, which neither LoRA nor the checkpoint defines: load the model and use "
                "quailora.initialize"
            )


def take(model: PeftModel, targets: Iterable[Target]) -> dict[str, torch.Tensor]:
    """The tensors of targets that have their factors, by the names PEFT saves them under; the model's own are on the
    meta device again."""
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


def rest(model: PeftModel, source: StreamedModel, seed: int, made: Collection[str]) -> dict[str, LazyTensor]:
    """What PEFT would save besides the tensors `made`: LoRA's own start where it was left alone, the checkpoint's
    tensors for `modules_to_save`."""
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


def _read(source: StreamedModel, name: str, dtype: torch.dtype) -> torch.Tensor:
    return source.checkpoint.tensor(name).to(dtype)


def save(model: PeftModel, folder: Path, tensors: dict[str, LazyTensor]) -> None:
    """The adapter, as `model.save_pretrained` writes it: PEFT writes the configuration, the tensors are streamed."""
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert expected.keys() == tensors.keys(), sorted(expected.keys() ^ tensors.keys())[:3]
    nothing = {name: torch.empty(0) for name in model.state_dict()}
    model.save_pretrained(str(folder), state_dict=nothing, save_embedding_layers=False)
    write_tensors(folder / SAFETENSORS_WEIGHTS_NAME, tensors)


def put(model: PeftModel, tensors: dict[str, torch.Tensor]) -> None:
    """Give an adapter's parameters their values, by the names PEFT saves them under; they may be on the meta device.

    Raises:
        AdapterError: a tensor that the model has no place for, or of another shape.
    """
    parameters = model.named_parameters(remove_duplicate=False)
    places = {_saved_name(name): (name, parameter) for name, parameter in parameters}
    for saved, value in tensors.items():
        key = saved.replace(".modules_to_save.", ".")  # PEFT saves resized embeddings under this name as well
        if key not in places:
            raise AdapterError(f"the adapter has {key}, for which {type(model.get_base_model()).__name__} has no place")
        name, parameter = places[key]
        if parameter.shape != value.shape:
            raise AdapterError(f"{key} is {list(value.shape)} in the adapter and {list(parameter.shape)} in the model")
        parent, _, leaf = name.rpartition(".")
        _fill(model.get_submodule(parent), leaf, value)


def _check_names(base: PreTrainedModel, config: LoraConfig) -> None:
    """Every entry of a list of names matches a module, and a regular expression at least one, as PEFT matches them."""
    targets = config.target_modules
    if not targets or targets == "all-linear":
        return
    modules = dict(base.named_modules())
    for wanted in [targets] if isinstance(targets, str) else targets:
        pattern = wanted if isinstance(targets, str) else rf"(.*\.)?{re.escape(wanted)}"
        try:
            found = any(re.fullmatch(pattern, name) for name in modules)
        except re.error as error:
            raise AdapterError(f"target_modules '{wanted}' is no regular expression: {error}") from error
        if not found:
            linears = {name.rpartition(".")[2] for name, m in modules.items() if isinstance(m, nn.Linear | Conv1D)}
            near = difflib.get_close_matches(wanted.rpartition(".")[2], linears, cutoff=0.4) or sorted(linears)
            raise AdapterError(f"target module '{wanted}' is not in {type(base).__name__}; nearest: {', '.join(near)}")


def _fill(module: nn.Module | Any, leaf: str, value: torch.Tensor) -> None:
    old = getattr(module, leaf)
    if old.device.type == "meta":
        value = nn.Parameter(value.to(dtype=old.dtype, device="cpu").contiguous(), requires_grad=old.requires_grad)
        if isinstance(module, nn.ParameterDict):
            module[leaf] = value
        else:
            setattr(module, leaf, value)
    else:
        with torch.no_grad():
            old.copy_(value)


def _tensors(weights: nn.Module | nn.Parameter) -> list[nn.Parameter]:
    return [weights] if isinstance(weights, nn.Parameter) else list(weights.parameters())


def _allocate(layer: LoraLayer, adapter: str) -> None:
    for group in (layer.lora_A, layer.lora_B):
        if adapter in group:
            group[adapter].to_empty(device="cpu")
    for embedding in (layer.lora_embedding_A, layer.lora_embedding_B):
        if adapter in embedding:
            embedding[adapter] = nn.Parameter(torch.empty_like(embedding[adapter], device="cpu"))


def unfilled(model: PeftModel) -> list[str]:
    """What PEFT would save of the model, and has no values yet: the names."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return [key for key, tensor in state.items() if tensor.device.type == "meta"]


def _saved_name(parameter: str) -> str:
    """What PEFT saves a parameter of its model as."""
    return parameter.replace(".modules_to_save.default.", ".").replace(".default", "")


def _base_name(key: str) -> str:
    """The base model's name of a tensor that PEFT saves beside the LoRA weights."""
    return key.removeprefix("base_model.model.").replace(".base_layer.", ".")
