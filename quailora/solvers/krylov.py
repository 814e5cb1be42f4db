"""Block Krylov: closest to the optimum in the fewest passes over E. The default.

The optimum is A = the top r eigenvectors of S = E H Eᵀ and B = Eᵀ A (CLoQ, arXiv 2501.18475). All layers that share an
input, and so H, advance together: H is read once for all of them.

The host never waits for the device in `_span`, so it can be captured in a CUDA graph. Small eigenproblems follow, one
per layer and one more for each step of the trace (`_ritz`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quailora import ops
from quailora.solvers.problem import FINE, Problem, Solution, inner, leading, objective


def krylov(problem: Problem, traced: bool = True) -> list[Solution]:
    """Rayleigh-Ritz on the span of Y₀, S Y₀, S² Y₀, ..., where Y₀ = E H Ω with a Gaussian Ω.

    After Musco and Musco, arXiv 1504.05477. It takes 2 · depth + 2 products with E, and an accurate one if those are
    coarse. `traced`: whether to report the objective after each step.
    """
    spans = _span(problem, [_random(problem, i) for i in range(len(problem.ranks))])
    ritz = [_ritz(*each, traced) for each in zip(spans, problem.ranks, problem.initial, strict=True)]
    lefts = [span.basis @ vectors for span, (vectors, _) in zip(spans, ritz, strict=True)]
    traces = [trace for _, trace in ritz]
    if problem.errors.coarse:
        rights = problem.errors.transposed_times(lefts, FINE)
        gram_rights = problem.apply_gram(rights)
        for trace, *products in zip(traces, problem.initial, lefts, rights, rights, gram_rights, strict=True):
            trace[-1] = objective(*products)
    else:
        rights = [span.projected @ vectors for span, (vectors, _) in zip(spans, ritz, strict=True)]
        gram_rights = [span.gram_projected @ vectors for span, (vectors, _) in zip(spans, ritz, strict=True)]
    return [Solution(a, b, b, hb, trace) for a, b, hb, trace in zip(lefts, rights, gram_rights, traces, strict=True)]


@dataclass(frozen=True)
class _Span:
    """A subspace, and the products that Rayleigh-Ritz needs."""

    basis: Tensor  # Y (m, k), orthonormal columns or zero
    projected: Tensor  # Eᵀ Y
    gram_projected: Tensor  # H Eᵀ Y, damped


def _random(problem: Problem, index: int) -> tuple[Tensor, Tensor]:
    """Gaussian Ω (n, r), and (m, r) for `_replace_zero_columns`; from the CPU, so that all devices get the same."""
    (rows, columns), rank = problem.errors.shapes[index], problem.ranks[index]
    generator = torch.Generator("cpu").manual_seed(problem.seed)
    omega, spare = (
        torch.randn(size, rank, generator=generator, dtype=torch.float32, device="cpu") for size in (columns, rows)
    )
    device = problem.errors.device
    return torch.empty_like(omega, device=device).copy_(omega), torch.empty_like(spare, device=device).copy_(spare)


def _span(problem: Problem, random: Sequence[tuple[Tensor, Tensor]]) -> list[_Span]:
    """The Krylov subspaces, to which each step adds a block of r columns. The host never waits for the device."""
    errors = problem.errors
    products = errors.times(problem.apply_gram([omega for omega, _ in random]))
    blocks = [
        _replace_zero_columns(ops.orthonormalize(y), spare) for y, (_, spare) in zip(products, random, strict=True)
    ]
    # Basis, projected and gram_projected of each layer, as a list of blocks.
    spans: list[tuple[list[Tensor], ...]] = [([], [], []) for _ in blocks]
    for step in range(problem.iterations + 1):
        projected = errors.transposed_times(blocks)
        gram_projected = problem.apply_gram(projected)
        for span, *parts in zip(spans, blocks, projected, gram_projected, strict=True):
            for so_far, part in zip(span, parts, strict=True):
                so_far.append(part)
        if step == problem.iterations:
            break
        products = errors.times(gram_projected)
        blocks = [
            ops.orthonormalize(y, torch.cat(bases, dim=1)) for y, (bases, *_) in zip(products, spans, strict=True)
        ]
        # S maps the spans to themselves, so they hold its top eigenvectors. (On a GPU the host would have to wait.)
        if errors.device.type == "cpu" and not any(block.any() for block in blocks):
            break
    del products, blocks, projected, gram_projected
    return [_Span(*map(_joined, span)) for span in spans]


def _joined(blocks: list[Tensor]) -> Tensor:
    """Side by side. Empties `blocks`, so that their memory is freed."""
    joined = torch.cat(blocks, dim=1)
    blocks.clear()
    return joined


def _replace_zero_columns(block: Tensor, spare: Tensor) -> Tensor:
    """One outlier channel can make Y₀ numerically rank-deficient: columns that came out zero become random ones."""
    zero = (block == 0).all(dim=0)
    if block.device.type == "cpu" and not zero.any():  # on a GPU the host would have to wait for this
        return block
    return torch.where(zero, ops.orthonormalize(spare, block), block)


def _ritz(span: _Span, rank: int, initial: float, traced: bool) -> tuple[Tensor, list[Tensor]]:
    """The top eigenvectors of S restricted to the span, (k, r) fp32 in its basis, and the objective they leave; if
    `traced`, preceded by those of the smaller subspaces."""
    restricted = inner(span.projected, span.gram_projected)
    restricted = (restricted + restricted.T) / 2
    values, vectors = torch.linalg.eigh(restricted)
    widths = range(rank, len(restricted), rank) if traced else ()
    smaller = [torch.linalg.eigvalsh(restricted[:k, :k]) for k in widths]
    trace = [initial - of_one[-rank:].clamp_min(0).sum() / 2 for of_one in (*smaller, values)]
    return leading(values, vectors, rank).float(), trace
