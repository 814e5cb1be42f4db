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

    Training scripts often allow TF32 for speed, but the objective is a difference of large sums.
    """
    before = [backend.fp32_precision for backend in _BACKENDS]
    with torch.autocast(device.type, enabled=False):
        try:
            for backend in _BACKENDS:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, precision in zip(_BACKENDS, before, strict=True):
                backend.fp32_precision = precision
