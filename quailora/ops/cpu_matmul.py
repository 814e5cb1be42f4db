"""bf16 and fp16 matrix products on CPUs where oneDNN has none and torch's own are slow: computed in fp32 instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

_aten = torch.ops.aten
_BACKWARD = _aten._scaled_dot_product_flash_attention_for_cpu_backward.default  # takes log-sum-exps, in fp32

# The operations by which forward and backward passes multiply -> how many of their first results have the operands'
# dtype.
_PRODUCTS = {
    # These arrive whole only in inference mode or within another operation; otherwise torch has decomposed them.
    _aten.linear.default: 1,
    _aten.matmul.default: 1,
    _aten.scaled_dot_product_attention.default: 1,
    _aten.mm.default: 1,
    _aten.addmm.default: 1,
    _aten.bmm.default: 1,
    _aten.baddbmm.default: 1,
    _aten._scaled_dot_product_flash_attention_for_cpu.default: 1,  # the log-sum-exps stay in fp32
    _BACKWARD: 3,
}
# Operations that multiply within themselves, such as a library's quantized linear -> the same in torch's operations.
# Whoever knows the library adds them; the input is their first argument.
DECOMPOSED: dict[Any, Callable[..., Tensor]] = {}

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def slow_dtypes() -> tuple[torch.dtype, ...]:
    """Those of NAMES for which oneDNN has no products on this CPU."""
    if not torch.backends.mkldnn.is_available():
        return tuple(NAMES)
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return tuple(dtype for dtype in NAMES if not supported[dtype]())


def obstacle(dtype: torch.dtype) -> Callable[[torch.device], str | None]:
    """A function of a device: why torch's own products in `dtype` are not used there; None if they are."""

    def on(device: torch.device) -> str | None:
        if device.type != "cpu" or dtype not in slow_dtypes():
            return None
        return f"oneDNN has no products in {str(dtype).removeprefix('torch.')} for this CPU, and torch's own are slow"

    return on


class Float32Products(TorchDispatchMode):
    """Within it, matrix products and attention in `dtype` run in fp32 on a CPU, and their results are rounded.

    bf16 and fp16 values are exact in fp32, so this computes what bf16 instructions do: exact products, fp32 sums, one
    rounding at the end. In attention the intermediate results stay in fp32, too. Each product needs fp32 copies of its
    operands and result while it runs. Products inside other fused operations, such as `_grouped_mm` of fused experts,
    are left as they are; those in `DECOMPOSED` are not.
    """

    supports_higher_order_operators = True  # they pass through

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        decomposed = DECOMPOSED.get(getattr(func, "overloadpacket", None))
        if not (decomposed or func in _PRODUCTS) or args[0].dtype is not self.dtype or args[0].device.type != "cpu":
            return func(*args, **kwargs)
        if decomposed:
            with self:
                return decomposed(*args, **kwargs)
        if func is not _BACKWARD and any(map(self._is_other, tree_leaves((args, kwargs)))):
            return func(*args, **kwargs)  # mixed dtypes: torch's own error
        wide_args, wide_kwargs = tree_map_only(Tensor, self._widened, (args, kwargs))
        results = func(*wide_args, **wide_kwargs)
        if isinstance(results, Tensor):
            return results.to(self.dtype)
        count = _PRODUCTS[func]
        return *(result.to(self.dtype) for result in results[:count]), *results[count:]

    def _widened(self, tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.dtype is self.dtype else tensor

    def _is_other(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.is_floating_point() and value.dtype is not self.dtype
