"""Weights as bitsandbytes holds them, and the Q that its layers compute with: NF4 and FP4, and LLM.int8.

m and n are a linear's outputs and inputs; b is the number of elements that share one absmax.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import bitsandbytes as bnb
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class NestedAbsmax:
    """The absmax of double quantization: 8-bit codes, in blocks of their own, around a common offset."""

    codes: Tensor  # (ceil(m n / b),) uint8
    table: Tensor  # (256,) fp32
    absmax: Tensor  # (ceil(len(codes) / blocksize),) fp32
    offset: Tensor  # () fp32
    blocksize: int

    def dequantize(self) -> Tensor:
        """absmax[i] = table[codes[i]] absmax[i // blocksize] + offset: (ceil(m n / b),) fp32."""
        spread = bnb.functional.dequantize_blockwise(
            self.codes, absmax=self.absmax, code=self.table, blocksize=self.blocksize
        )
        return spread + self.offset

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.codes, self.table, self.absmax, self.offset))

    def to(self, device: torch.device) -> "NestedAbsmax":
        return _to_device(self, device)


@dataclass(frozen=True, eq=False)
class FourBit:
    """An NF4 or FP4 weight. Element i of the weight, flattened by rows, is table[codes[i]] absmax[i // b]."""

    codes: Tensor  # (ceil(m n / 2),) uint8, two codes a byte, the high nibble first
    absmax: Tensor | NestedAbsmax  # (ceil(m n / b),) fp32
    blocksize: int  # b
    quant_type: str  # "nf4" or "fp4": which table of 16 values
    shape: tuple[int, int]  # (m, n)
    dtype: torch.dtype  # the compute dtype, which Q is rounded to

    def dequantize(self) -> Tensor:
        """Q (m, n), in the compute dtype: table * absmax in fp32, rounded once, to what the layer casts its input to.

        That is what `bitsandbytes::gemm_4bit` does. The dtype the weight had before has no part in it, though the
        backward pass and bitsandbytes.functional.dequantize_4bit round to that: fp32 compute leaves Q unrounded.
        Fused kernels (small inputs on a GPU; eval mode on a CPU with AVX512-BF16) depart from Q by rounding only.
        """
        size = self.shape[0] * self.shape[1]
        # Rows of one block each: where a row is no whole number of blocks, the AVX-512 kernel of bitsandbytes 0.50.2
        # multiplies with the absmax of another block; and where it is odd there is no kernel for a CPU.
        whole = size % self.blocksize == 0
        rows = (size // self.blocksize, self.blocksize) if whole else (1, 2 * self.codes.numel())
        absmax = self.absmax.dequantize() if isinstance(self.absmax, NestedAbsmax) else self.absmax
        q = torch.ops.bitsandbytes.dequantize_4bit.default(
            self.codes, absmax, self.blocksize, self.quant_type, rows, self.dtype
        )
        return q.view(-1)[:size].view(self.shape)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.absmax.nbytes

    def parts(self) -> tuple[list[Tensor], list[Tensor]]:
        return [self.codes], [self.absmax.dequantize() if isinstance(self.absmax, NestedAbsmax) else self.absmax]

    def to(self, device: torch.device) -> "FourBit":
        return _to_device(self, device)

    @property
    def packed(self) -> "FourBit":
        """Itself: the fused kernels read its codes."""
        return self

    @property
    def exact_difference(self) -> bool:
        """Whether W - Q is exact in the 16 bits of W and Q. With NF4 they are within a factor of two of each other or Q
        is 0, so it is (Sterbenz); with double quantization 1 % of the elements are not, which costs E 7e-5 of its norm.
        FP4 and int8 are further off where W is small: E would lose 20 times as much."""
        return self.quant_type == "nf4"


@dataclass(frozen=True, eq=False)
class EightBit:
    """An LLM.int8 weight: Q[i, j] = codes[i, j] absmax[i] / 127."""

    codes: Tensor  # (m, n) int8
    absmax: Tensor  # (m,) fp32, bitsandbytes' SCB

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> Tensor:
        """Q (m, n) fp32: the forward pass sums integers and scales the sum, so it never rounds the weight itself.

        But columns that meet an outlier, and all columns in training on a CPU, are rounded to the dtype of the input.
        """
        return bnb.functional.int8_vectorwise_dequant(self.codes, self.absmax)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.absmax.nbytes

    def parts(self) -> tuple[list[Tensor], list[Tensor]]:
        return [self.codes], [self.absmax]

    def to(self, device: torch.device) -> "EightBit":
        return _to_device(self, device)

    @property
    def packed(self) -> "EightBit":
        """Itself: the fused kernels read its codes."""
        return self

    @property
    def exact_difference(self) -> bool:
        """See `FourBit.exact_difference`."""
        return False


_Parts = TypeVar("_Parts", bound=FourBit | EightBit | NestedAbsmax)


def _to_device(parts: _Parts, device: torch.device) -> _Parts:
    moved: dict[str, Any] = {
        field.name: part.to(device)
        for field in fields(parts)
        if isinstance(part := getattr(parts, field.name), NestedAbsmax | Tensor)
    }
    return replace(parts, **moved)
