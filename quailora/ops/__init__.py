"""The accelerated operations: one signature each, served by the fastest backend that runs on the device.

Tensors only: it must not know solvers, models or quantization libraries. `reference.py` defines what each computes.
"""

from quailora.ops.dispatch import (
    backends,
    cholesky_solve,
    choose_scales,
    error,
    gram_,
    gram_energy,
    grouped_error_product,
    grouped_error_product_t,
    grouped_gram_product,
    grouped_orthonormalize,
    half_products,
    mirror_,
    packed,
    quantize_columns,
)

__all__ = [
    "backends",
    "cholesky_solve",
    "choose_scales",
    "error",
    "gram_",
    "gram_energy",
    "grouped_error_product",
    "grouped_error_product_t",
    "grouped_gram_product",
    "grouped_orthonormalize",
    "half_products",
    "mirror_",
    "packed",
    "quantize_columns",
]
