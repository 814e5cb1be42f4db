"""The integers of a GPTQ base in compressed-tensors' pack-quantized form, which servers take at every width.

A value is code - 2^(bits - 1), so that codes, zeros and scales stay as they are; only their places change:

    weight_packed      (m, n · bits / 32) int32: codes, a stream of bits along each row, low bits first
    weight_scale       (m, n / g)
    weight_zero_point  (m · bits / 32, n / g) int32: zeros, a stream of bits down each column; asymmetric bases only
    weight_shape       (2,) int64: m, n

and Q = scale · (value - zero point). A scale may be negative: nothing in the formula takes its sign.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from quailora.quantization.gptq import GPTQ, WHOLE_ROWS, GPTQWeight, pack

METHOD = "compressed-tensors"


def packed(weight: GPTQWeight, base: GPTQ) -> dict[str, Tensor]:
    """The tensors of a linear, by what follows its name."""
    found = {
        "weight_packed": pack(weight.codes.T, weight.bits).T.contiguous(),
        "weight_scale": weight.scales.to(base.dtype),
        "weight_shape": torch.tensor(weight.shape),
    }
    return found if base.symmetric else found | {"weight_zero_point": pack(weight.zeros, weight.bits)}


def checkpoint_config(base: GPTQ, ignored: Iterable[str]) -> dict[str, Any]:
    """`quantization_config` in config.json. ignored: the names of the linears in full precision."""
    whole = base.group_size == WHOLE_ROWS
    weights = {
        "num_bits": base.bits,
        "type": "int",
        "symmetric": base.symmetric,
        "strategy": "channel" if whole else "group",
        "group_size": None if whole else base.group_size,
    }
    return {
        "quant_method": METHOD,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": sorted(ignored),
    }
