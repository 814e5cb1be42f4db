"""The bytes that torch operations allocate, live and at their peak, to check the planner's arithmetic.

It works on real tensors and on those of FakeTensorMode, where shapes of any size are measured without memory.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten: Any = torch.ops.aten


class Footprint(TorchDispatchMode):
    """Within it, `live` counts the bytes of tensors that were made there, and `peak` the most of them.

    Scratch memory of operations counts too, where it is known and not small.
    device: the type of the device that the operations are taken to run on.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.live = self.peak = 0
        self._device = device
        self._counted: set[int] = set()  # addresses of storages

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                self._count(value, 0)  # it was there before, or is counted already
        out = function(*args, **kwargs)
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._count(value, value.untyped_storage().nbytes())
        self.peak = max(self.peak, self.live + _scratch(function, args, self._device))
        return out

    def _count(self, tensor: Tensor, nbytes: int) -> None:
        storage = tensor.untyped_storage()
        if (address := storage._cdata) in self._counted:
            return
        self._counted.add(address)
        self.live += nbytes
        weakref.finalize(storage, self._freed, address, nbytes)

    def _freed(self, address: int, nbytes: int) -> None:
        self._counted.discard(address)
        self.live -= nbytes


def _scratch(function: Any, args: tuple[Any, ...], device: str) -> int:
    """Bytes that an operation allocates besides its results."""
    if function is _aten._linalg_eigh.default:
        n = args[0].shape[-1]
        return (2 * n * n + 6 * n + 1) * args[0].element_size()  # the workspace of LAPACK's syevd
    name = function.name()
    if name == "quailora::gram_":  # the extension packs 1024 tokens on a CPU; a GPU's partial sums take about as much
        x = args[1]
        return 4 * min(1024, x.shape[:-1].numel()) * x.shape[-1]
    if device != "cpu" or not name.startswith("bitsandbytes::"):
        return 0  # bitsandbytes' kernels for GPUs only write their results
    # For CPUs, bitsandbytes 0.50 has kernels that read codes, but makes codes by torch operations.
    elements = args[0].numel()
    if name == "bitsandbytes::quantize_4bit":
        # The scaled W in fp32, and W if it is not, codes in int32 and in uint8, half of them shifted; FP4's are mapped.
        widened, mapped = args[0].dtype != torch.float32, args[2] != "nf4"
        return (9 + 4 * widened + 14 * mapped) * elements + elements // 2
    if name == "bitsandbytes::int8_vectorwise_quant":
        return 7 * elements  # scaled and rounded, in fp32; one of them besides the result
    if name == "bitsandbytes::int8_vectorwise_dequant":
        return 4 * elements  # before the division by 127
    return 0
