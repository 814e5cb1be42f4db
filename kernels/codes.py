"""A packed Q as the kernels read it."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Codes:
    """A packed Q as the kernel reads it: every absmax in fp32. GPTQ's codes come in 4 bits: `quantization.steps`."""

    codes: Tensor
    absmax: Tensor
    blocksize: int | None = None  # b; None for LLM.int8
    dtype: torch.dtype = torch.float32  # Q is rounded to it
    table: Tensor | None = None  # (256,) int64: byte -> the two fp32 values it stands for; None for LLM.int8

    @classmethod
    def of(cls, quantized: Any) -> "Codes":
        """From a packed quantized weight, whose codes it shares. Nested absmax is decoded."""
        if quantized.codes.dtype == torch.int8:
            return cls(quantized.codes, quantized.absmax)
        absmax = quantized.absmax if isinstance(quantized.absmax, Tensor) else quantized.absmax.dequantize()
        # The values of every byte come from the weight itself, so they are those of the forward pass.
        device, blocks = quantized.codes.device, -(-512 // quantized.blocksize)
        every_byte = replace(
            quantized,
            codes=torch.arange(256, dtype=torch.uint8, device=device),
            absmax=torch.ones(blocks, device=device),
            shape=(1, 512),
            dtype=torch.float32,
        )
        table = every_byte.dequantize().view(256, 2).view(torch.int64).view(256)
        return cls(quantized.codes, absmax, quantized.blocksize, quantized.dtype, table)
