"""A second quantized base, of the tests' own: int4 by rounding to nearest, with one fp32 scale for each row.

transformers loads it by an `Int4Config`, PEFT adapts it through a registered module, and no fused kernel reads it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from peft import LoraConfig
from peft.tuners import lora
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quailora.quantization import registry
from quailora.quantization.protocol import QuantizedBase


class Int4Linear(nn.Module):
    """x Qᵀ + bias with Q = codes · scales."""

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = in_features, out_features, bias
        self.register_buffer("codes", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.scales = nn.Parameter(torch.zeros(out_features, 1), requires_grad=False)  # PEFT asks for a parameter

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, Int4.read(self).dequantize().to(x.dtype), self.bias)


@dataclass(frozen=True, eq=False)
class Int4Weight:
    levels: Tensor  # (m, n) int8, -8 to 7
    scales: Tensor  # (m, 1) fp32

    @property
    def shape(self) -> tuple[int, int]:
        return self.levels.shape[0], self.levels.shape[1]

    @property
    def nbytes(self) -> int:
        return self.levels.nbytes + self.scales.nbytes

    def dequantize(self) -> Tensor:
        return self.levels.float() * self.scales

    def parts(self) -> tuple[list[Tensor], list[Tensor]]:
        return [self.levels], [self.scales]

    def to(self, device: torch.device) -> "Int4Weight":
        return replace(self, levels=self.levels.to(device), scales=self.scales.to(device))


@register_quantization_config("tests-int4")
class Int4Config(QuantizationConfigMixin):
    def __init__(self, **kwargs: Any) -> None:
        self.quant_method = "tests-int4"  # type: ignore[assignment]


@dataclass(frozen=True)
class Int4(QuantizedBase):
    library = "tests-int4"

    @classmethod
    def matches(cls, thing: object) -> bool:
        return isinstance(thing, Int4Config | Int4Linear)

    @classmethod
    def from_config(cls, config: object) -> Self:
        return cls()

    def to_config(self) -> Int4Config:
        return Int4Config()

    @classmethod
    def from_module(cls, module: nn.Module, config: object = None) -> Self:
        return cls()

    def to_dict(self) -> dict[str, Any]:
        return {"library": self.library}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        return cls()

    @property
    def name(self) -> str:
        return "int4"

    def describe(self) -> str:
        return "int4, one scale a row"

    def differences(self, other: QuantizedBase, *, layers: bool = True) -> list[str]:
        return [] if self == other else [f"method {self.name} against {other.name}"]

    @classmethod
    def read(cls, module: Any) -> Int4Weight:
        return Int4Weight(module.codes, module.scales.data)

    def quantize(self, weight: Tensor) -> Int4Weight:
        scales = weight.float().abs().amax(1, keepdim=True) / 7
        return Int4Weight((weight.float() / scales).round().to(torch.int8), scales)


@register_quantizer("tests-int4")
class Int4Quantizer(HfQuantizer):
    """Only for skeletons: `quantize_in_place` makes a loaded model."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        quantize_in_place(model)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None: ...

    def is_serializable(self, **kwargs: Any) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


class LoraInt4(lora.Linear):
    """PEFT's LoRA over an Int4Linear."""


def lora_config(**settings: Any) -> LoraConfig:
    config = LoraConfig(**settings)
    config._register_custom_module({Int4Linear: LoraInt4})
    return config


def quantize_in_place(model: nn.Module, base: Int4 = Int4()) -> None:
    """Every nn.Linear but the head becomes an Int4Linear."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and not name.endswith("lm_head"):
            linear = Int4Linear(module.in_features, module.out_features, module.bias)
            if module.weight.is_meta:
                linear.to("meta")
            else:
                q = base.quantize(module.weight.detach())
                linear.codes, linear.scales.data = q.levels, q.scales
            model.set_submodule(name, linear)


@contextmanager
def registered() -> Iterator[None]:
    """Within it quailora knows the base."""
    registry.register(Int4)
    try:
        yield
    finally:
        registry._registered.remove(Int4)
