"""The precisions that kernels offer, and a guard against those that the caller has set for torch."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Of products on a GPU, from fine to coarse. See kernels/precision.py.
PRECISIONS = ("ieee", "bf16x3", "tf32", "bf16")

_BACKENDS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Within it, fp32 products are computed in fp32: no autocast, no TF32, no bf16. The caller's settings return after.

    Training scripts often allow TF32 for speed, but the objective is a difference of large sums. torch has two
    interfaces for that: `fp32_precision` of each backend, which decides, and the older
    `set_float32_matmul_precision`, which also sets the former. Where the two disagree torch raises an error when the
    older one is read, as torch.compile does, so both are set here.
    """
    before = [backend.fp32_precision for backend in _BACKENDS]
    for backend in _BACKENDS:
        backend.fp32_precision = "ieee"
    older = torch.get_float32_matmul_precision()  # which can be read now, whatever the caller has set
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(older)
        for backend, precision in zip(_BACKENDS, before, strict=True):
            backend.fp32_precision = precision
