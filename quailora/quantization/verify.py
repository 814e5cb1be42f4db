"""Is this the quantized weight that it should be? One function answers, for a loaded linear or one just quantized."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from quailora.errors import MismatchError
from quailora.quantization.protocol import QuantizedBase, QuantizedWeight

# How far Q may be from nearest rounding of W, in parts of ‖W - Q‖. SAME is more than rounding the scales to bf16 makes,
# as bitsandbytes does on some CPUs, and less than the codes that change where W is off by little more than rounding:
# factors made for one Q serve the other. RELATED is about one code in a hundred: the same weights, but loaded in
# another dtype or quantized on another device, and not a fine-tune of them.
SAME, RELATED = 0.05, 0.35

NEAREST, CALIBRATED = "nearest", "calibrated"  # how the codes of a base were chosen, in its record


def digest(quantized: QuantizedWeight) -> str:
    """64 bits of the SHA-256 of the codes, and of the scales rounded to bf16: "0123456789abcdef-0123456789abcdef".

    Rounded, for bitsandbytes keeps no more of them once a CPU with AVX512-BF16 has run a model in eval mode.
    """
    codes, scales = quantized.parts()
    return f"{_hash(codes)}-{_hash(scale.bfloat16() for scale in scales)}"


def digest_of(tensor: Tensor) -> str:
    """Of a tensor that is not quantized, its shape and 64 bits of the SHA-256 of its values rounded to bf16:
    "128x64-0123456789abcdef". Rounded, for trainers cast some of them to fp32."""
    return f"{'x'.join(map(str, tensor.shape))}-{_hash([tensor.bfloat16()])}"


def verify(
    name: str,
    quantized: QuantizedWeight,
    base: QuantizedBase,
    weight: Callable[[], Tensor],
    checkpoint: str,
    *,
    recorded: str | None = None,
    rounding: str = NEAREST,
    tolerance: float = SAME,
    advice: str = "",
) -> None:
    """Make sure that a linear holds the quantized weight that it should.

    It does where its digest is the recorded one. Another digest need not be wrong where codes follow from W by nearest
    rounding, since devices may round ties differently: then, and where none is recorded, Q is compared with what
    `base.quantize` makes of W. Without a digest, codes chosen by calibration only have to be closer to W than zeros.

    Args:
        name: the linear's, for errors.
        weight: gives W (m, n) on the device of `quantized`, in the dtype the base is loaded in; called if need be.
        checkpoint: where W comes from, for errors.
        recorded: the digest in the record of the base.
        rounding: how the record says codes were chosen, "nearest" or "calibrated".
        tolerance: SAME or RELATED.
        advice: appended to an error: what to load or give instead.

    Raises:
        MismatchError: it does not; with which of the tests failed.
    """
    found = None if recorded is None else digest(quantized)
    if recorded is not None and found == recorded:
        return
    differs = "" if recorded is None or found is None else f"its {_different(found, recorded)} not the recorded ones"
    if differs and rounding == CALIBRATED:
        raise MismatchError(
            f"{name} is another quantized weight: {differs} (digest {found}, recorded {recorded}), and calibration "
            f"chose those, so they cannot be made again from the full-precision weights{advice}"
        )
    w = weight().float()
    if base.nearest and rounding == NEAREST:
        expected = base.quantize(weight()).dequantize().float()
        off, cost = (quantized.dequantize().float() - expected).norm(), (w - expected).norm()
        if off > tolerance * cost:
            raise MismatchError(
                f"{name} is not the quantized weight of {checkpoint}: it is off by {float(off / cost):.0%} of what "
                f"quantization costs{f', and {differs}' if differs else ''}{advice}"
            )
    elif (quantized.dequantize().float() - w).norm() >= w.norm():
        raise MismatchError(f"{name} is not a quantized weight of {checkpoint}: zeros would be closer to it{advice}")


def _different(found: str, recorded: str) -> str:
    """ "codes are", "scales are" or "codes and scales are"."""
    sides = zip(("codes", "scales"), found.split("-"), recorded.split("-"), strict=False)
    return f"{' and '.join(side for side, mine, theirs in sides if mine != theirs)} are"


def _hash(tensors: Iterable[Tensor]) -> str:
    sha = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().view(-1)
        sha.update(memoryview(flat.view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return sha.hexdigest()[:16]
