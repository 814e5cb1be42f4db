"""Block Krylov: the nearest to the optimum for the fewest passes over E. The default.

The optimum is A = the top r eigenvectors of S = E H Eᵀ and B = Eᵀ A (CLoQ, arXiv 2501.18475). All linears that share an
input, and so H, are solved in step: H is read once for all of them.

The host waits for nothing while `_span` is running, so it can be captured in a CUDA graph. After it come small
eigenproblems, one for each linear and one more for each step of the trace (`_ritz`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quailora import ops
from quailora.solvers.problem import FINE, Problem, Solution, inner, leading, objective


def krylov(problem: Problem, traced: bool = True) -> list[Solution]:
    """Rayleigh-Ritz on the span of Y₀, S Y₀, S² Y₀, ..., where Y₀ = E H Ω with a Gaussian Ω.

    After Musco and Musco, arXiv 1504.05477. Products with E: 2 · depth + 2, and a precise one if those are coarse.
    """
    spans = _span(problem, [_draw(problem, i) for i in range(len(problem.ranks))])
    ritz = [_ritz(*each, traced) for each in zip(spans, problem.ranks, problem.initial, strict=True)]
    lefts = [span.basis @ vectors for span, (vectors, _) in zip(spans, ritz, strict=True)]
    traces = [trace for _, trace in ritz]
    if problem.errors.coarse:
        rights = problem.errors.transposed_times(lefts, FINE)
        weighed = problem.weigh(rights)
        for trace, *products in zip(traces, problem.initial, lefts, rights, rights, weighed, strict=True):
            trace[-1] = objective(*products)
    else:
        rights = [span.projected @ vectors for span, (vectors, _) in zip(spans, ritz, strict=True)]
        weighed = [span.weighed @ vectors for span, (vectors, _) in zip(spans, ritz, strict=True)]
    return [Solution(a, b, b, hb, trace) for a, b, hb, trace in zip(lefts, rights, weighed, traces, strict=True)]


@dataclass(frozen=True)
class _Span:
    """A subspace, and what Rayleigh-Ritz needs of it."""

    basis: Tensor  # Y (m, k), orthonormal columns or zero
    projected: Tensor  # Eᵀ Y
    weighed: Tensor  # H Eᵀ Y, damped


def _draw(problem: Problem, index: int) -> tuple[Tensor, Tensor]:
    """Ω (n, r), and (m, r) to fill up with: drawn on the CPU, so that every device starts alike."""
    (rows, columns), rank = problem.errors.shapes[index], problem.ranks[index]
    generator = torch.Generator().manual_seed(problem.seed)
    start, filling = (torch.randn(size, rank, generator=generator) for size in (columns, rows))
    device = problem.errors.device
    return torch.empty_like(start, device=device).copy_(start), torch.empty_like(filling, device=device).copy_(filling)


def _span(problem: Problem, chance: Sequence[tuple[Tensor, Tensor]]) -> list[_Span]:
    """Nested subspaces, a block of r columns for each step. The host waits for nothing."""
    errors = problem.errors
    products = errors.times(problem.weigh([start for start, _ in chance]))
    blocks = [_fill(ops.orthonormalize(y), filling) for y, (_, filling) in zip(products, chance, strict=True)]
    # What each step adds to a _Span, by linear.
    spans: list[tuple[list[Tensor], ...]] = [([], [], []) for _ in blocks]
    for step in range(problem.iterations + 1):
        projected = errors.transposed_times(blocks)
        weighed = problem.weigh(projected)
        for span, *parts in zip(spans, blocks, projected, weighed, strict=True):
            for known, part in zip(span, parts, strict=True):
                known.append(part)
        if step == problem.iterations:
            break
        products = errors.times(weighed)
        blocks = [
            ops.orthonormalize(y, torch.cat(bases, dim=1)) for y, (bases, *_) in zip(products, spans, strict=True)
        ]
        # S maps the spans into themselves: its top eigenvectors are in there. Again, a GPU's host would have to wait.
        if errors.device.type == "cpu" and not any(block.any() for block in blocks):
            break
    del products, blocks, projected, weighed
    return [_Span(*map(_joined, span)) for span in spans]


def _joined(blocks: list[Tensor]) -> Tensor:
    """Side by side; `blocks` is emptied, so that they are not in memory besides."""
    joined = torch.cat(blocks, dim=1)
    blocks.clear()
    return joined


def _fill(block: Tensor, filling: Tensor) -> Tensor:
    """An outlier channel may drown the rest of the start in rounding: chance stands in for columns that are zero."""
    zero = (block == 0).all(dim=0)
    if block.device.type == "cpu" and not zero.any():  # which a GPU's host would have to wait for
        return block
    return torch.where(zero, ops.orthonormalize(filling, block), block)


def _ritz(span: _Span, rank: int, initial: float, traced: bool) -> tuple[Tensor, list[Tensor]]:
    """The top eigenvectors of S on the span, (k, r) fp32 in terms of its basis, and the objective they leave; before
    it, if `traced`, those of the smaller subspaces."""
    restricted = inner(span.projected, span.weighed)
    restricted = (restricted + restricted.T) / 2
    values, vectors = torch.linalg.eigh(restricted)
    widths = range(rank, len(restricted), rank) if traced else ()
    smaller = [torch.linalg.eigvalsh(restricted[:k, :k]) for k in widths]
    trace = [initial - of_one[-rank:].clamp_min(0).sum() / 2 for of_one in (*smaller, values)]
    return leading(values, vectors, rank).float(), trace
