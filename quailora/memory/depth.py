"""Memory and work of fitting linears on their inputs behind quantized layers (`calibration.inputs`), from shapes.

The linears that share an input are a group. All others of its block are taken to be deployed already.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from quailora.memory.sizes import Base, BlockSizes, Device, Weight, solving
from quailora.solvers.config import SolverConfig

_FP32 = 4
_ROWS = 1024  # tokens at a time for D, as `calibration.inputs` takes them


def deployed(linears: Sequence[Weight], base: Base, on: Device, size: int) -> int:
    """Bytes of linears that compute with Q + A Bᵀ in a dtype of `size` bytes: Q, and A and B in fp32 and that dtype;
    and on a CPU their codes, which stay until the block is done."""
    weights = sum(size * w.outputs * w.inputs + (_FP32 + size) * w.rank * (w.outputs + w.inputs) for w in linears)
    if on.device.type == "cuda":
        return weights
    return weights + sum(base.memory(w.outputs, w.inputs, on.device)[0] for w in linears)


def comparing(
    group: Sequence[Weight], block: BlockSizes, base: Base, on: Device, size: int, tokens: int
) -> Iterator[tuple[str, int]]:
    """Bytes that running both models up to a group takes, besides weights and activations, by what they are."""
    n = group[0].inputs
    yield "H of the quantized model's inputs, and D", 2 * _FP32 * n * n
    yield "deployed linears", deployed(_others(group, block), base, on, size)
    rows = min(_ROWS, tokens)
    yield (
        "inputs of both models",
        # That of the quantized one, both without padding, the products for D, and what goes into them.
        3 * size * tokens * n + _FP32 * (n * n + 3 * rows * n) + 2 * size * tokens * block.widest,
    )


def retargeting(
    group: Sequence[Weight], block: BlockSizes, base: Base, solver: SolverConfig, on: Device, size: int
) -> Iterator[tuple[str, int]]:
    """Bytes that making the targets of a group, and solving for them, takes besides weights and H."""
    n = group[0].inputs
    yield "deployed linears", deployed(_others(group, block), base, on, size)
    yield "targets", sum(_FP32 * w.outputs * n for w in group)
    codes, workspace = solving([replace(w, dtype=torch.float32) for w in group], base, solver, on, False)
    yield "quantized weights", codes
    # D, H damped and its Cholesky factor; or what W is multiplied with, and W in fp32, twice.
    yield "E and the solver", max(workspace, 3 * _FP32 * n * n, _FP32 * (n * n + 2 * max(w.outputs for w in group) * n))


def work(block: BlockSizes, pairs: int) -> int:
    """FLOPs for each token besides those of a pass of either model and of H. pairs: those of attention.

    Both models run up to each group, as far as shapes tell its place, the full-precision one on from the last; and D.
    """
    before, parts = 0, []
    for group in block.groups:
        parts.append(before + pairs if before else 0)
        before += sum(2 * w.outputs * w.inputs for w in group)
    products = sum(2 * group[0].inputs ** 2 for group in block.groups)
    return 2 * sum(parts) - (parts[-1] if parts else 0) + products


def _others(group: Sequence[Weight], block: BlockSizes) -> list[Weight]:
    return [w for w in block.linears if w not in group]
