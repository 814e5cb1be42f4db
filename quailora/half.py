"""bf16 and fp16 products on CPUs without instructions for them, where torch's own are slow: as products in fp32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten

# What forward and backward passes multiply by -> how many of its results, the first ones, have the factors' dtype.
_PRODUCTS = {
    _aten.mm.default: 1,
    _aten.addmm.default: 1,
    _aten.bmm.default: 1,
    _aten.baddbmm.default: 1,
    _aten._scaled_dot_product_flash_attention_for_cpu.default: 1,  # and log-sum-exps, in fp32
    _aten._scaled_dot_product_flash_attention_for_cpu_backward.default: 3,
}


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
        count = _PRODUCTS.get(func)
        if count is None or args[0].dtype not in self.dtypes or args[0].device.type != "cpu":
            return func(*args, **kwargs)
        dtype = args[0].dtype
        wide = [each.float() if isinstance(each, Tensor) and each.dtype is dtype else each for each in args]
        results = func(*wide, **kwargs)
        if isinstance(results, Tensor):
            return results.to(dtype)
        return *(result.to(dtype) for result in results[:count]), *results[count:]
