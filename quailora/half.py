"""bf16 and fp16 products on CPUs without instructions for them, where torch's own are slow: as products in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import bitsandbytes  # noqa: F401  its operations
import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

_aten = torch.ops.aten

# What forward and backward passes multiply by -> how many of its results, the first ones, have the factors' dtype.
_PRODUCTS = {
    # Whole only in inference mode, or within another operation; otherwise torch has taken them apart before.
    _aten.linear.default: 1,
    _aten.matmul.default: 1,
    _aten.scaled_dot_product_attention.default: 1,
    _aten.mm.default: 1,
    _aten.addmm.default: 1,
    _aten.bmm.default: 1,
    _aten.baddbmm.default: 1,
    _aten._scaled_dot_product_flash_attention_for_cpu.default: 1,  # and log-sum-exps, in fp32
    _aten._scaled_dot_product_flash_attention_for_cpu_backward.default: 3,
}

_GEMM_4BIT = torch.ops.bitsandbytes.gemm_4bit.default


def slow_dtypes() -> tuple[torch.dtype, ...]:
    """Those in which torch has no fast products on this CPU: what oneDNN, which makes them, does not support."""
    if not torch.backends.mkldnn.is_available():
        return torch.bfloat16, torch.float16
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    return tuple(dtype for dtype, fast in supported.items() if not fast)


def obstacle(device: torch.device) -> str | None:
    """Why torch's own products are not taken on `device`; None where they are."""
    if device.type != "cpu" or not (slow := slow_dtypes()):
        return None
    names = " and ".join(str(dtype).removeprefix("torch.") for dtype in slow)
    return f"torch multiplies {names} without instructions for it on this CPU, several times slower than fp32"


class Float32Products(TorchDispatchMode):
    """Within it, products and attention in the `dtypes` are made in fp32 on a CPU, and their results rounded.

    bf16 and fp16 are exact in fp32, so this is what the instructions do that are missing: exact products, sums in fp32,
    one rounding; but for attention, whose inner results stay in fp32. It takes an fp32 copy of the factors of each
    product for as long as that takes.
    """

    def __init__(self, dtypes: tuple[torch.dtype, ...] | None = None) -> None:
        super().__init__()
        self.dtypes = slow_dtypes() if dtypes is None else dtypes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = func in _PRODUCTS or func is _GEMM_4BIT
        if not known or args[0].dtype not in self.dtypes or args[0].device.type != "cpu":
            return func(*args, **kwargs)
        if func is _GEMM_4BIT:
            with self:
                return _gemm_4bit(*args, **kwargs)
        dtype = args[0].dtype
        args, kwargs = tree_map_only(Tensor, lambda each: each.float() if each.dtype is dtype else each, (args, kwargs))
        results = func(*args, **kwargs)
        if isinstance(results, Tensor):
            return results.to(dtype)
        count = _PRODUCTS[func]
        return *(result.to(dtype) for result in results[:count]), *results[count:]


def _gemm_4bit(
    x: Tensor,
    codes: Tensor,
    shape: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    kind: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    """What bitsandbytes' operation of that name does, in operations that can be looked into. Nested, `absmax` is the
    scale of each 256 of `absmax_8bit`."""
    operations = torch.ops.bitsandbytes
    if absmax_8bit is not None:
        absmax = operations.dequantize_blockwise(absmax_8bit, absmax, absmax_code, 256, torch.float32) + absmax_offset
    return linear(x, operations.dequantize_4bit(codes, absmax, blocksize, kind, shape, x.dtype), bias)
