"""The linears to initialize: the quantized ones that an adapter adapts, if its configuration allows it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from quailora.errors import AdapterError
from quailora.quantization.registry import is_quantized
from quailora.solvers.solve import LoraFactors


@dataclass(frozen=True)
class Target:
    """A quantized linear of the base model that LoRA adapts.

    scaling: PEFT's factor of `lora_B.weight @ lora_A.weight`: alpha / r, or alpha / sqrt(r) with rsLoRA.
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

    def parameters(self) -> list[nn.Parameter]:
        """lora_A.weight (r, n) and lora_B.weight (m, r)."""
        sides = (self.layer.lora_A, self.layer.lora_B)
        return [side[self.adapter].get_parameter("weight") for side in sides]

    def assign(self, factors: LoraFactors, seed: int = 0) -> None:
        """Set lora_A and lora_B so that scaling * lora_B.weight @ lora_A.weight = A Bᵀ for any alpha, with the two
        balanced."""
        lora_a, lora_b = self.layer.lora_A[self.adapter], self.layer.lora_B[self.adapter]
        down, up = self.weights(factors.A, factors.B)
        if factors.effective_rank < self.rank:
            # If both factors are zero, neither has a gradient. Such a pair gets LoRA's default initialization, so that
            # it can learn.
            bound = down.shape[1] ** -0.5
            start = torch.empty(down[factors.effective_rank :].shape)
            start.uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))
            down[factors.effective_rank :] = start.to(down.device)
        fill(lora_a, "weight", down)
        fill(lora_b, "weight", up)
        if getattr(lora_b, "bias", None) is not None:
            fill(lora_b, "bias", torch.zeros(self.base.out_features))

    def weights(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """lora_A.weight (r, n) and lora_B.weight (m, r), from A (m, r) and B (n, r)."""
        root = self.scaling**0.5
        return b.T / root, a / root

    def factors(self, lora_a: torch.Tensor, lora_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The inverse, in the dtype that the weights are saved in."""
        root, dtype = self.scaling**0.5, self.layer.lora_A[self.adapter].get_parameter("weight").dtype
        return lora_b.to(dtype).float() * root, (lora_a.to(dtype).float() * root).T.contiguous()


def check_config(config: Any) -> LoraConfig:
    """Return `config` if factors with A Bᵀ ≈ W - Q are a valid initialization for it.

    Raises:
        AdapterError: otherwise; says which setting, why, and what to use instead.
    """
    if not isinstance(config, LoraConfig):
        raise AdapterError(f"{type(config).__name__} is not a LoRA configuration: use peft.LoraConfig")
    if config.use_dora:
        raise AdapterError(
            "use_dora=True: DoRA rescales every row of the adapted weight by its own norm, so factors that correct "
            "the quantization error are wrong for it; use plain LoRA"
        )
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise AdapterError(
            f"init_lora_weights={config.init_lora_weights!r} is another initialization, and some change the "
            "base weights: leave it at True"
        )
    if config.layer_replication:
        raise AdapterError(
            "layer_replication adds blocks that the checkpoint does not have: their inputs are not known"
        )
    return config


def find_targets(model: PeftModel, adapter: str = "default") -> tuple[list[Target], dict[str, str]]:
    """The quantized linears that `adapter` adapts; and the other modules that it adapts, which keep LoRA's default
    initialization, with the reason for each.

    Raises:
        AdapterError: a scaling that is not positive, a router that PEFT cannot run, or a variant of LoRA whose update
            is not B A.
    """
    targets, left = [], {}
    config: Any = model.peft_config[adapter]
    excluded = config.exclude_modules
    for name, layer in model.get_base_model().named_modules():
        if is_router(layer) and isinstance(excluded, Collection) and name in excluded:
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
                f"{name} uses {type(layer.lora_variant[adapter]).__name__}, whose update is not that of plain LoRA"
            )
        elif is_router(base):
            raise AdapterError(
                f"{name} is a {type(base).__name__}, which returns more than one tensor, and PEFT cannot run it: leave "
                "it out of target_modules (--target-modules), or add it to exclude_modules (--exclude-modules)"
            )
        elif not is_quantized(base):
            left[name] = f"the base keeps this {type(base).__name__} in full precision: there is no error to correct"
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


def is_router(module: nn.Module) -> bool:
    """Whether a module subclasses nn.Linear but does not return a single tensor, like the routers of Llama 4 and
    PhiMoE: PEFT wraps it and then cannot run it."""
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward or is_quantized(module):
        return False
    x = torch.zeros(2, module.in_features, dtype=module.weight.dtype, device=module.weight.device)
    with torch.no_grad():
        return not isinstance(module(x), torch.Tensor)


def fill(module: nn.Module | Any, leaf: str, value: torch.Tensor) -> None:
    """Set a parameter, which may be on the meta device."""
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
