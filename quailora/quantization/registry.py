"""The quantized bases there are, and which one a config, a module or a record belongs to.

It imports no library before it is asked: the command line reads its constants.
"""

from __future__ import annotations

from contextlib import ExitStack
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from quailora.errors import AdapterError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from quailora.quantization.protocol import QuantizedBase, QuantizedWeight

LIBRARIES = ("bitsandbytes",)  # always installed; records say in which version


class Format(StrEnum):
    """The formats that have a name of their own on the command line; the first is the default."""

    nf4 = "nf4"
    fp4 = "fp4"
    int8 = "int8"


_registered: list[type[QuantizedBase]] = []


def register(base: type[QuantizedBase]) -> type[QuantizedBase]:
    """Make a base of one's own known; usable as a decorator."""
    _registered.append(base)
    return base


def bases() -> list[type[QuantizedBase]]:
    """All of them, ours first."""
    from quailora.quantization.bitsandbytes import BitsAndBytes
    from quailora.quantization.gptq import GPTQ

    return [BitsAndBytes, GPTQ, *_registered]


def base_for(thing: object) -> type[QuantizedBase]:
    """The base that a quantization config of transformers, or a module, belongs to. Raises AdapterError for none."""
    found = next((base for base in bases() if base.matches(thing)), None)
    if found is None:
        known = ", ".join(base.library for base in bases())
        raise AdapterError(
            f"{type(thing).__name__} is neither a quantized linear nor a quantization config that is supported (of "
            f"{known}); a PEFT layer has its quantized linear in base_layer"
        )
    return found


def is_quantized(module: object) -> bool:
    """Whether a module is a quantized linear, its weight loaded or not."""
    return any(base.matches(module) for base in bases())


def from_config(config: object) -> QuantizedBase:
    """How a quantization config of transformers quantizes. Raises AdapterError for one that is not supported."""
    return base_for(config).from_config(config)


def from_module(module: nn.Module, config: object = None) -> QuantizedBase:
    """How a loaded linear is quantized; see `QuantizedBase.from_module`."""
    return base_for(module).from_module(module, config)


def from_dict(values: dict[str, Any]) -> QuantizedBase:
    """The inverse of `QuantizedBase.to_dict`. Raises AdapterError for a library that is not known, or a bad record."""
    library = values.get("library", LIBRARIES[0])  # records had no such key while there was one library
    found = next((base for base in bases() if base.library == library), None)
    if found is None:
        known = ", ".join(base.library for base in bases())
        raise AdapterError(f"the base was quantized by {library!r}, which is not supported here; known: {known}")
    return found.from_dict(values)


def read(module: nn.Module) -> QuantizedWeight:
    """The quantized weight of a loaded linear; see `QuantizedBase.read`."""
    return base_for(module).read(module)


def config_for(name: str, dtype: torch.dtype, *, double: bool = True, compute: torch.dtype | None = None) -> Any:
    """The transformers config for a `Format`.

    dtype: what the weights are loaded as. compute: what the linears compute in; None is `dtype`, or bf16 for fp32.
    """
    for base in bases():
        if name in base.formats:
            return base.config_for(name, dtype, double=double, compute=compute)
    raise AdapterError(f"quantization {name!r} is not known; choose one of {', '.join(Format)}")


def evaluating(modules: list[nn.Module]) -> ExitStack:
    """`QuantizedBase.evaluating` of every base."""
    stack = ExitStack()
    for base in bases():
        stack.enter_context(base.evaluating(modules))
    return stack
