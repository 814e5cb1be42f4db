"""The quantized base with its adapter on the meta device. transformers and PEFT themselves decide what is quantized and
adapted, and with which rank and scaling."""

from __future__ import annotations

import difflib
import math
import re
import warnings
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils.quantization_config import QuantizationConfigMixin

from quailora.adapters.targets import is_router
from quailora.errors import AdapterError
from quailora.modeling.blocks import find_blocks
from quailora.modeling.checkpoint import Checkpoint
from quailora.modeling.streamed_model import skeleton
from quailora.modeling.transformers_internals import quantize_skeleton
from quailora.quantization.protocol import QuantizedBase
from quailora.quantization.registry import from_config, is_quantized


def quantized_skeleton(checkpoint: Checkpoint, config: QuantizationConfigMixin, dtype: torch.dtype) -> PreTrainedModel:
    """The base model as transformers would quantize it, without weights: which linears are quantized, and how.

    Raises:
        AdapterError: transformers quantizes no linear of this model.
    """
    model = skeleton(checkpoint, dtype)
    linears = {type(m).__name__ for m in model.get_decoder().modules() if isinstance(m, nn.Linear | Conv1D)}
    base = from_config(config)
    if base.planned is None:
        quantize_skeleton(model, config, dtype)
    else:
        _plan_linears(model, base)
    if not any(is_quantized(module) for module in model.modules()):
        raise AdapterError(
            f"no linear of {type(model).__name__} can be quantized so (they are {', '.join(sorted(linears))}): "
            "loading it with this quantization gives the full-precision model, and there is nothing to initialize"
        )
    return model


def _plan_linears(model: PreTrainedModel, base: QuantizedBase) -> None:
    """Put `base.planned` where a base that transformers cannot quantize will have quantized linears: those of the
    blocks."""
    kind: Any = base.planned
    for block in find_blocks(model, model.get_decoder()):
        for name, linear in block.linears().items():
            if not isinstance(linear, nn.Linear) or is_router(linear):
                continue
            try:
                if base.obstacle(linear.out_features, linear.in_features) is not None:
                    continue
            except AdapterError as error:
                raise AdapterError(f"{name}: {error}") from error
            bias = linear.bias is not None
            planned = kind(linear.in_features, linear.out_features, bias, device="meta", dtype=linear.weight.dtype)
            model.set_submodule(name, planned)


def adapted_skeleton(base: PreTrainedModel, config: LoraConfig, checkpoint: Checkpoint) -> PeftModel:
    """`get_peft_model` for a base on the meta device: no LoRA weight has memory yet.

    Raises:
        AdapterError: a target module that is not in the model (with the closest names), or a setting that PEFT refuses.
    """
    _check_names(base, config)
    if config.target_modules == "all-linear":
        _exclude(config, [name for name, module in base.named_modules() if is_router(module)])
    base.name_or_path = checkpoint.name
    config.base_model_name_or_path, config.revision = checkpoint.name, checkpoint.revision
    try:
        with warnings.catch_warnings():
            # PEFT 0.21 asks transformers for a property that is about to be renamed.
            warnings.filterwarnings("ignore", category=FutureWarning, message=".*is_gradient_checkpointing")
            model = get_peft_model(base, config, low_cpu_mem_usage=True)
    except (ValueError, TypeError) as error:
        raise AdapterError(f"PEFT refuses this LoRA configuration: {error}") from error
    if isinstance(config.target_modules, set):  # the order of a set would change from run to run
        config.target_modules = sorted(config.target_modules)
    return model


def targeted_skeleton(
    checkpoint: Checkpoint, quantization: QuantizationConfigMixin, dtype: torch.dtype, config: LoraConfig
) -> tuple[PeftModel, list[str]]:
    """The base as transformers would quantize it, wrapped by PEFT, on the meta device; and the linears narrower than r,
    such as the 1 x n gate of a mixture of experts. In `config`, each of those gets the rank of its smaller side.

    Raises:
        AdapterError: as for `quantized_skeleton` and `adapted_skeleton`; or every targeted linear is narrower than r.
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
        # The scaling stays the same: a larger one would train these linears at a higher rate. PEFT accepts floats too.
        alphas[name] = float(layer.scaling["default"]) * (math.sqrt(rank) if config.use_rslora else rank)  # type: ignore[assignment]
    # PEFT takes the first pattern that matches.
    config.rank_pattern = ranks | (config.rank_pattern or {})
    config.alpha_pattern = alphas | (config.alpha_pattern or {})
    model = adapted_skeleton(quantized_skeleton(checkpoint, quantization, dtype), config, checkpoint)
    return model, list(narrow)


def _check_names(base: PreTrainedModel, config: LoraConfig) -> None:
    """Check that each target name, or the regular expression, matches a module, as PEFT matches them."""
    targets = config.target_modules
    if not targets or targets == "all-linear":
        return
    modules = dict(base.named_modules())
    option = "target_modules (--target-modules)"
    for wanted in [targets] if isinstance(targets, str) else targets:
        pattern = wanted if isinstance(targets, str) else rf"(.*\.)?{re.escape(wanted)}"
        try:
            found = any(re.fullmatch(pattern, name) for name in modules)
        except re.error as error:
            raise AdapterError(f"{option}: '{wanted}' is not a regular expression: {error}") from error
        if not found:
            linears = {name.rpartition(".")[2] for name, m in modules.items() if isinstance(m, nn.Linear | Conv1D)}
            near = difflib.get_close_matches(wanted.rpartition(".")[2], linears, cutoff=0.4) or sorted(linears)
            raise AdapterError(f"{option}: '{wanted}' is not in {type(base).__name__}; nearest: {', '.join(near)}")


def _exclude(config: LoraConfig, names: list[str]) -> None:
    if names and isinstance(config.exclude_modules, str):
        config.exclude_modules = "|".join([f"({config.exclude_modules})", *map(re.escape, names)])
    elif names:
        config.exclude_modules = sorted({*(config.exclude_modules or ()), *names})


def _smaller_side(layer: LoraLayer) -> int:
    base: Any = layer.get_base_layer()
    return min(base.in_features, base.out_features)
