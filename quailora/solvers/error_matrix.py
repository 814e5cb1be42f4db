"""E = W - Q of the linears that share an input, as a solver sees them: operators on thin matrices.

How an E is held is its *form*, and decides what a product with it costs:

    dense     in fp32, besides W                             4 bytes an element
    cached    in the dtype of W and in W's memory: W is gone   2, from NF4 with W and Q both bf16, or both fp16;
                                                             4, the same E as "dense", where W is fp32
    fused     not at all: every product de-quantizes Q       2.56 from bf16 and blocks of 64
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from quailora import ops
from quailora.ops import reference
from quailora.ops.reference import Dequantizable, Error

# Rows of E that are in memory at a time where E as a whole is not.
_PANEL_ROWS = 1024

_HALVES = (torch.bfloat16, torch.float16)
_OF_KERNELS = (*_HALVES, torch.float32)  # what W may be in, for kernels


def choose_form(weight: Tensor, quantized: Tensor | Dequantizable, products: int, overwrite: bool) -> str:
    """The form that reads and writes the fewest bytes in so many products; `overwrite`: W is not needed any more.

    Without kernels for the device, or without codes to read, it is "dense"; but an fp32 W that is not needed any more
    has room for the same values.
    """
    if weight.dtype not in _OF_KERNELS or not hasattr(quantized, "codes"):
        return "dense"
    if ops.backends(weight.device)["grouped_error_product"].backend == "reference":
        return "cached" if overwrite and weight.dtype == torch.float32 and weight.is_contiguous() else "dense"
    # NF4: W and Q are within a factor of two of each other, or Q is 0, so their difference has no more bits than they
    # have and is exact; but for 1 % of the elements where absmax is quantized too, which costs E 7e-5 of its norm. FP4
    # and int8 are further from W where it is small: E would lose 20 times as much.
    halves = weight.dtype in _HALVES and weight.dtype == getattr(quantized, "dtype", None)
    exact = halves and getattr(quantized, "quant_type", None) == "nf4"
    overwrite = overwrite and weight.is_contiguous()  # the transpose of another's memory would be a copy
    # Without absmax, a fortieth of the whole: it would give up W where next to nothing is gained by that.
    cached, packed = weight.element_size(), quantized.codes.nbytes / weight.numel()
    making = 2 * cached + packed
    return "cached" if overwrite and exact and making + products * cached < products * (cached + packed) else "fused"


class ErrorMatrices:
    """The E of `weights` (m, n), all of one n, and `quantized`, dense or packed, in the `forms` that they are to have.

    precision: of the products, where none is asked for; see `kernels/precision.py`. The reference gives fp32 always.

    `products` counts those made, of all linears: each is one pass over an E, which is what a solve costs on a GPU.
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
        self._errors = [_hold(*each) for each in zip(weights, quantized, forms, strict=True)]
        # Of these, one launch takes what is of one kind.
        self._kinds = [
            (weight.dtype, form, *(getattr(q, name, None) for name in ("quant_type", "blocksize", "dtype")))
            for weight, q, form in zip(weights, quantized, forms, strict=True)
        ]

    @property
    def coarse(self) -> bool:
        """Whether products are less precise than what the objective is made of must be."""
        served = ops.backends(self.device)["grouped_error_product"].backend
        return served != "reference" and self.precision in ("tf32", "bf16")

    def only(self, indices: Sequence[int]) -> "ErrorMatrices":
        """Those of some of the linears, sharing their memory."""
        some = object.__new__(ErrorMatrices)
        some.device, some.precision, some.products = self.device, self.precision, 0
        some.shapes = [self.shapes[i] for i in indices]
        some._errors = [self._errors[i] for i in indices]
        some._kinds = [self._kinds[i] for i in indices]
        return some

    def times(self, rights: Sequence[Tensor], precision: str | None = None) -> list[Tensor]:
        """[E P, ...]: each (n, k) -> (m, k)."""
        return self._products(ops.grouped_error_product, rights, precision)

    def transposed_times(self, lefts: Sequence[Tensor], precision: str | None = None) -> list[Tensor]:
        """[Eᵀ A, ...]: each (m, k) -> (n, k)."""
        return self._products(ops.grouped_error_product_t, lefts, precision)

    def _products(
        self, operation: Callable[..., list[Tensor]], thins: Sequence[Tensor], precision: str | None
    ) -> list[Tensor]:
        self.products += len(thins)
        found: dict[int, Tensor] = {}
        for kind in dict.fromkeys(self._kinds):
            alike = [i for i, each in enumerate(self._kinds) if each == kind]
            products = operation(
                [self._errors[i] for i in alike], [thins[i] for i in alike], precision=precision or self.precision
            )
            found |= zip(alike, products, strict=True)
        return [found[i] for i in range(len(thins))]

    def panels(self, index: int, whole: bool = True) -> Iterator[tuple[slice, Tensor]]:
        """The E of one linear in fp32, so many rows at a time that little memory is needed; not to be written to.

        whole: all of it at once where it is in memory as fp32 already; for who makes no copies of what comes.
        """
        weight, packed = self._errors[index]
        rows = len(weight)
        if whole and packed is None and weight.dtype == torch.float32:
            yield slice(0, rows), weight
            return
        for start in range(0, rows, _PANEL_ROWS):
            stop = min(start + _PANEL_ROWS, rows)
            panel = weight[start:stop].float() if packed is None else ops.error(weight, packed, start=start, stop=stop)
            yield slice(start, stop), panel

    def dense(self, index: int) -> Tensor:
        """The E of one linear, whole: (m, n) fp32, not to be written to."""
        weight, packed = self._errors[index]
        if packed is None and weight.dtype == torch.float32:
            return weight
        error = torch.empty(self.shapes[index], dtype=torch.float32, device=self.device)
        for rows, panel in self.panels(index):
            error[rows] = panel
        return error


def _hold(weight: Tensor, quantized: Any, form: str) -> Error:
    if weight.dtype not in _OF_KERNELS or not hasattr(quantized, "codes"):  # dense, or says only what it stands for
        return reference.error(weight, quantized), None
    if form == "fused":
        return weight.contiguous(), ops.packed(quantized)
    return ops.error(weight, ops.packed(quantized), out=weight if form == "cached" else None), None
