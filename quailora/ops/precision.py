"""How precise products are: what a kernel may be asked for, and what the caller has set, which must not reach ours."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Of products on a GPU, from the finest to the coarsest: see kernels/precision.py.
PRECISIONS = ("ieee", "bf16x3", "tf32", "bf16")

_BACKENDS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Within it fp32 products are fp32: no autocast, no TF32, no bf16. The settings are the caller's again afterwards.

    Training scripts allow TF32 for speed; H, E P and what they add up to are differences of large sums.
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
