"""Integers with a scale for every few columns, as the fused kernels read them: in the layout of bitsandbytes' 4-bit
weights, so that the kernels of NF4 serve them with another table of 16 values, -8 to 7.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

_LOW = -8  # the value of code 0
_BLOCKS = (64, 32)  # of the sizes that a group is divided into; kernels read an absmax for each 64 columns anyway


def block(group: int) -> int | None:
    """The b that groups of this many columns are read in; None if there is none."""
    return next((size for size in _BLOCKS if group % size == 0), None)


@dataclass(frozen=True, eq=False)
class Steps:
    """Element i of the weight, flattened by rows, is (codes[i] - 8) absmax[i // b], rounded to `dtype`.

    The same fields as `bitsandbytes_weights.FourBit`, which the kernels read too.
    """

    codes: Tensor  # (m n / 2,) uint8, two codes a byte, the high nibble first
    absmax: Tensor  # (m n / b,) fp32: scales, of either sign
    blocksize: int  # b
    shape: tuple[int, int]  # (m, n)
    dtype: torch.dtype

    quant_type: ClassVar[str] = "steps"  # which table of 16 values
    exact_difference: ClassVar[bool] = False  # feedback and factors may leave W further from Q than a factor of two

    @classmethod
    def of(cls, codes: Tensor, zeros: Tensor, scales: Tensor, dtype: torch.dtype) -> Steps | None:
        """From codes (m, n) uint8, and zeros uint8 and scales (m, n / g); codes - zeros must be -8 to 7.

        None where g has no `block`.
        """
        (m, n), groups = codes.shape, scales.shape[1]
        group = n // groups
        if (size := block(group)) is None:
            return None
        nibbles = (codes.view(m, groups, group) - (zeros + _LOW).unsqueeze(-1)).view(-1, 2)  # modulo 256: 0 to 15
        absmax = scales.to(dtype).float().repeat_interleave(group // size, dim=1)
        return cls((nibbles[:, 0] << 4) | nibbles[:, 1], absmax.view(-1), size, (m, n), dtype)

    def dequantize(self) -> Tensor:
        """Q (m, n) in `dtype`."""
        nibbles = torch.stack((self.codes >> 4, self.codes & 15), dim=1).view(-1, self.blocksize)
        return ((nibbles.float() + _LOW) * self.absmax[:, None]).to(self.dtype).view(self.shape)
