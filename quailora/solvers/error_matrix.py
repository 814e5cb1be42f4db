"""E = W - Q of the layers that share an input, as a solver sees them: operators that multiply thin matrices.

The *form* in which an E is held decides how many bytes a product reads:

    dense     fp32, in memory of its own                 4 bytes per element
    cached    in the dtype of W, overwriting W           2, from NF4 with W and Q both bf16 or both fp16;
                                                         4, the same E as "dense", if W is fp32
    fused     not stored: each product dequantizes Q     2.56, from bf16 and 4-bit codes in blocks of 64 (GPTQ's of 2
                                                         and 3 bits too: `quantization.steps`)
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from quailora import ops
from quailora.ops import reference
from quailora.ops.reference import Dequantizable, Error

# How much of E is in fp32 at a time, in forms that do not hold all of it so: 256 MiB.
_PANEL_ELEMENTS = 2**26

_HALVES = (torch.bfloat16, torch.float16)
_KERNEL_DTYPES = (*_HALVES, torch.float32)  # of W


def choose_form(weight: Tensor, quantized: Tensor | Dequantizable, products: int, overwrite: bool) -> str:
    """The form that moves the fewest bytes in this many products. `overwrite`: W is not needed any more.

    Without kernels for the device, or without codes for them to read, it is "dense", or "cached" if W is fp32 and may
    be overwritten, which takes no memory for the same values.
    """
    overwrite = overwrite and weight.is_contiguous()  # kernels write E to contiguous memory only
    packed = _packed(weight, quantized)
    if packed is None:
        return "cached" if overwrite and weight.dtype == torch.float32 else "dense"
    exact = packed.exact_difference and weight.dtype in _HALVES and weight.dtype == packed.dtype
    # Scales are left out: they are a fortieth of the bytes, and would tip the balance only where little is gained.
    cached, codes = weight.element_size(), packed.codes.nbytes / weight.numel()
    to_cache = 2 * cached + codes
    return "cached" if overwrite and exact and to_cache + products * cached <= products * (cached + codes) else "fused"


def _packed(weight: Tensor, quantized: Any) -> Any:
    """What kernels read of Q; None without kernels for the device, or for this W or Q."""
    served = ops.backends(weight.device)["grouped_error_product"].backend != "reference"
    return getattr(quantized, "packed", None) if served and weight.dtype in _KERNEL_DTYPES else None


class ErrorMatrices:
    """E of several layers with the same n: W (m, n) and Q, dense or packed, each E in its form.

    precision: the default of the products; see `kernels/precision.py`. The reference always computes in fp32.

    `products` counts the products made over all layers. Each is one pass over an E, which is what a solve costs on a
    GPU.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        quantized: Sequence[Tensor | Dequantizable],
        forms: Sequence[str],
        precision: str = "ieee",
    ) -> None:
        self.shapes = [(weight.shape[0], weight.shape[1]) for weight in weights]
        self.device = weights[0].device
        self.precision = precision
        self.products = 0
        packed = [_packed(*each) for each in zip(weights, quantized, strict=True)]
        self._errors = [_hold(*each) for each in zip(weights, quantized, packed, forms, strict=True)]
        # One launch multiplies all errors of the same kind.
        self._kinds = [
            (weight.dtype, form, *(getattr(codes, name, None) for name in ("quant_type", "blocksize", "dtype")))
            for weight, codes, form in zip(weights, packed, forms, strict=True)
        ]

    @property
    def coarse(self) -> bool:
        """Whether the products are not accurate enough to compute the objective from."""
        served = ops.backends(self.device)["grouped_error_product"].backend
        return served != "reference" and self.precision in ("tf32", "bf16")

    def subset(self, indices: Sequence[int]) -> "ErrorMatrices":
        """The errors of some of the layers; memory is shared."""
        some = object.__new__(ErrorMatrices)
        some.device, some.precision, some.products = self.device, self.precision, 0
        some.shapes = [self.shapes[i] for i in indices]
        some._errors = [self._errors[i] for i in indices]
        some._kinds = [self._kinds[i] for i in indices]
        return some

    def times(
        self, rights: Sequence[Tensor], precision: str | None = None, of: Sequence[int] | None = None
    ) -> list[Tensor]:
        """[E P, ...]: each (n, k) -> (m, k), for the layers `of`, or all."""
        return self._products(ops.grouped_error_product, rights, precision, of)

    def transposed_times(
        self, lefts: Sequence[Tensor], precision: str | None = None, of: Sequence[int] | None = None
    ) -> list[Tensor]:
        """[Eᵀ A, ...]: each (m, k) -> (n, k), for the layers `of`, or all."""
        return self._products(ops.grouped_error_product_t, lefts, precision, of)

    def _products(
        self,
        operation: Callable[..., list[Tensor]],
        thins: Sequence[Tensor],
        precision: str | None,
        of: Sequence[int] | None,
    ) -> list[Tensor]:
        self.products += len(thins)
        layers = dict(zip(range(len(self.shapes)) if of is None else of, thins, strict=True))
        found: dict[int, Tensor] = {}
        for kind in dict.fromkeys(self._kinds[i] for i in layers):
            alike = [i for i in layers if self._kinds[i] == kind]
            products = operation(
                [self._errors[i] for i in alike], [layers[i] for i in alike], precision=precision or self.precision
            )
            found |= zip(alike, products, strict=True)
        return [found[i] for i in layers]

    def panels(self, index: int, whole: bool = True) -> Iterator[tuple[slice, Tensor]]:
        """The E of one layer in fp32, a few rows at a time to save memory. Read only.

        whole: yield all of E at once if it is in memory as fp32 already. Not for callers that copy each panel.
        """
        weight, packed = self._errors[index]
        rows = len(weight)
        if whole and packed is None and weight.dtype == torch.float32:
            yield slice(0, rows), weight
            return
        height = max(1, _PANEL_ELEMENTS // weight.shape[1])
        for start in range(0, rows, height):
            stop = min(start + height, rows)
            panel = weight[start:stop].float() if packed is None else ops.error(weight, packed, start=start, stop=stop)
            yield slice(start, stop), panel

    def dense(self, index: int) -> Tensor:
        """The E of one layer: (m, n) fp32. Read only."""
        weight, packed = self._errors[index]
        if packed is None and weight.dtype == torch.float32:
            return weight
        error = torch.empty(self.shapes[index], dtype=torch.float32, device=self.device)
        for rows, panel in self.panels(index):
            error[rows] = panel
        return error


def _hold(weight: Tensor, quantized: Any, packed: Any, form: str) -> Error:
    if form == "fused":
        return weight.contiguous(), ops.packed(quantized.packed)
    out = weight if form == "cached" else None
    if packed is None:
        return reference.error(weight, quantized, out=out), None
    return ops.error(weight, ops.packed(packed), out=out), None
