"""Block Krylov: closest to the optimum in the fewest passes over E. The default.

The optimum is A = the top r eigenvectors of S = E H Eᵀ and B = Eᵀ A (CLoQ, arXiv 2501.18475). All layers that share an
input, and so H, advance together: H is read once for all of them.

Of two bases of the same size, the one of narrower blocks comes closer, because its polynomials in S are of a higher
degree; but each block takes two passes over E. On a GPU it is passes that cost, so blocks have r columns. On a CPU it
is operations: blocks are as narrow as products are fast, and a layer is done when the last one added little. Where it
still added much when the basis is as large as it may get, the layer begins anew from its Ritz vectors, once.

On a GPU the host never waits for the device in `_span`, so it can be captured in a CUDA graph.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from quailora import ops
from quailora.solvers.problem import FINE, Problem, Solution, leading, to_floats, to_host

# The narrowest block that CPUs multiply at full speed.
_NARROW = 16

# With so many narrow blocks beyond the rank most layers are done; before, it is not worth a look.
_USUAL = 7

# Less than this of the initial objective is rounding: what is left of it is not known any better.
_ROUNDING = 1e-6


def krylov(problem: Problem) -> list[Solution]:
    """Rayleigh-Ritz on the span of Y₀, S Y₀, S² Y₀, ..., where Y₀ = E H Ω with a Gaussian Ω.

    After Musco and Musco, arXiv 1504.05477. In blocks of r columns it takes 2 · depth + 2 products with E, and an
    accurate one if those are coarse.
    """
    bases = [_Basis(problem, i) for i in range(len(problem.ranks))]
    _span(problem, bases, range(len(bases)))
    if unsettled := _unsettled(bases):
        for i in unsettled:
            bases[i].begin_anew()
        _span(problem, bases, unsettled)
    _find_ritz(bases)
    lefts = [basis.leading(basis.vectors) for basis in bases]
    traces = [basis.trace() for basis in bases]
    if problem.errors.coarse:
        rights = problem.errors.transposed_times(lefts, FINE)
        gram_rights = problem.apply_gram(rights)
    else:
        rights = [basis.leading(basis.projected) for basis in bases]
        gram_rights = [basis.leading(basis.gram_projected) for basis in bases]
    return [Solution(a, b, b, hb, trace) for a, b, hb, trace in zip(lefts, rights, gram_rights, traces, strict=True)]


def narrow(device: torch.device) -> bool:
    """Whether blocks are narrow, and the host looks at each."""
    return device.type == "cpu"


@lru_cache(maxsize=8)
def gaussian(rows: int, width: int, seed: int) -> Tensor:
    """Random (rows, width) fp32, read only; from the CPU, so that all devices get the same."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(rows, width, generator=generator, dtype=torch.float32, device="cpu")


class _Basis:
    """An orthonormal basis Y of a subspace, which grows by blocks, and what Rayleigh-Ritz needs. Filled so far are the
    first `size` columns."""

    def __init__(self, problem: Problem, index: int) -> None:
        (rows, inputs), device = problem.errors.shapes[index], problem.errors.device
        self.problem, self.rank, self.initial = problem, problem.ranks[index], problem.initial[index]
        self.narrow = narrow(device)
        width, self.most = self.rank, (problem.iterations + 1) * self.rank
        if self.narrow:
            width, self.most = min(width, _NARROW), min(self.most, rows)
        self.look = self.rank + _USUAL * width  # at what size to look whether it is enough
        self.size, self.last = 0, 0  # columns of the basis, and of the last block
        # Y, its columns orthonormal or zero; Eᵀ Y; H Eᵀ Y, damped; and Yᵀ S Y, the first rows of its lower triangle.
        self.vectors, self.projected, self.gram_projected = (
            torch.empty(length, self.most, dtype=torch.float32, device=device) for length in (rows, inputs, inputs)
        )
        self.restricted = torch.zeros(self.most, self.most, dtype=torch.float64, device=device)
        self.rows = 0  # how many
        self.ritz: tuple[Tensor, Tensor] | None = None  # its eigenvalues and -vectors, on the host
        self.start: Tensor | None = None  # Y₀, if it is not from Ω
        self.omega, self.spare = (  # the latter as wide as a block may be
            torch.empty(length, k, dtype=torch.float32, device=device).copy_(gaussian(length, k, seed))
            for length, k, seed in ((inputs, width, problem.seed), (rows, self.rank, problem.seed + 1))
        )
        self.earlier: list[Tensor] = []  # of the trace

    def filled(self, block: Tensor) -> Tensor:
        """A narrow block with random columns for those that are zero."""
        zero = block.square().sum(dim=0) == 0
        if zero.any():  # no more columns than are wanted: few may be left that are new, and they come first
            spare = self.spare[:, : int(zero.sum())].roll(self.size, dims=0)
            known = torch.cat([self.vectors[:, : self.size], block], dim=1)
            [block[:, zero]] = ops.grouped_orthonormalize([spare], [known])
        return block

    def add(self, block: Tensor, projected: Tensor, gram_projected: Tensor) -> None:
        start, self.last = self.size, block.shape[1]
        self.size = start + self.last
        self.vectors[:, start : self.size] = block
        self.projected[:, start : self.size] = projected
        self.gram_projected[:, start : self.size] = gram_projected
        self.ritz = None

    def done(self) -> bool:
        if self.size == self.most or not (self.narrow and self.problem.enough) or self.size < self.look:
            return self.size == self.most
        self.look = self.size * 9 // 8
        _find_ritz([self])
        return float(self.gain()) <= self.problem.enough

    def restrict(self) -> Tensor:
        """Yᵀ S Y, its lower triangle. In fp32 like its factors: what that loses is relative to the lengths of both."""
        new = self.gram_projected[:, self.rows : self.size]
        self.restricted[self.rows : self.size, : self.size] = new.T @ self.projected[:, : self.size]
        self.rows = self.size
        return self.restricted[: self.size, : self.size]

    def gain(self) -> Tensor:
        """What the last block took off the objective, at most, as a part of what is left. (Ritz vectors without their
        entries in that block span a subspace of the basis before it, which leaves so much more.)"""
        assert self.ritz is not None
        values, vectors = self.ritz[0][-self.rank :], self.ritz[1][:, -self.rank :]
        taken = (values.clamp_min(0) * vectors[-self.last :].square().sum(dim=0)).sum()
        left = 2 * self.initial - values.sum()
        return taken / left.clamp_min(_ROUNDING * 2 * self.initial)

    def leading(self, columns: Tensor) -> Tensor:
        """The top Ritz vectors, if of `vectors`, or the products with them."""
        assert self.ritz is not None
        return columns[:, : self.size] @ leading(*self.ritz, self.rank).to(columns)

    def trace(self) -> list[Tensor]:
        """The objective that the basis leaves, if `traced` preceded by those of its first r, 2 r, ... columns."""
        assert self.ritz is not None
        widths = range(self.rank, self.size, self.rank) if self.problem.traced else ()
        values = [*(torch.linalg.eigvalsh(self.restricted[:width, :width]).cpu() for width in widths), self.ritz[0]]
        return self.earlier + [self.initial - each[-self.rank :].clamp_min(0).sum() / 2 for each in values]

    def begin_anew(self) -> None:
        """From the Ritz vectors, in blocks as wide as they are."""
        if self.problem.traced:
            self.earlier = self.trace()
        self.start, self.size, self.rows = self.leading(self.vectors), 0, 0


def _span(problem: Problem, bases: Sequence[_Basis], which: Iterable[int]) -> None:
    """Let the bases of some layers grow by the Krylov subspaces until they are done."""
    errors, growing = problem.errors, list(which)
    starts = [bases[i].start for i in growing]
    blocks = [start for start in starts if start is not None]
    if not blocks:
        products = errors.times(problem.apply_gram([bases[i].omega for i in growing]), of=growing)
        blocks = _blocks([bases[i] for i in growing], products)
    while growing:
        projected = errors.transposed_times(blocks, of=growing)
        gram_projected = problem.apply_gram(projected)
        for i, *parts in zip(growing, blocks, projected, gram_projected, strict=True):
            bases[i].add(*parts)
        rest = [(i, part) for i, part in zip(growing, gram_projected, strict=True) if not bases[i].done()]
        growing = [i for i, _ in rest]
        products = errors.times([part for _, part in rest], of=growing)
        if growing:
            blocks = _blocks([bases[i] for i in growing], products)


def _blocks(bases: Sequence[_Basis], products: Sequence[Tensor]) -> list[Tensor]:
    """The orthonormal blocks that products with S add to their bases.

    One outlier channel can make the first numerically rank-deficient: columns that come out zero become random. So do
    those of narrow blocks, which may find fewer copies of an eigenvalue than there are; all after would lack them too.
    """
    products = [product[:, : basis.most - basis.size] for basis, product in zip(bases, products, strict=True)]
    known = [basis.vectors[:, : basis.size] for basis in bases]
    if bases[0].narrow:
        blocks = ops.grouped_orthonormalize(products, known if bases[0].size else None)
        return [basis.filled(block) for basis, block in zip(bases, blocks, strict=True)]
    if bases[0].size:
        return ops.grouped_orthonormalize(products, known)
    # A GPU's host would have to wait to know how many columns are zero: there are random ones for all.
    both = [torch.cat([product, basis.spare], dim=1) for product, basis in zip(products, bases, strict=True)]
    halves = [found.chunk(2, dim=1) for found in ops.grouped_orthonormalize(both)]
    return [torch.where((block == 0).all(dim=0), spare, block) for block, spare in halves]


def _find_ritz(bases: Sequence[_Basis]) -> None:
    if missing := [basis for basis in bases if basis.ritz is None]:
        for basis, restricted in zip(missing, to_host([basis.restrict() for basis in missing]), strict=True):
            basis.ritz = tuple(torch.linalg.eigh(restricted))


def _unsettled(bases: Sequence[_Basis]) -> list[int]:
    """The layers that still gain more than `enough`."""
    enough = bases[0].problem.enough
    if not enough:
        return []
    _find_ritz(bases)
    gains = to_floats([basis.gain() for basis in bases])
    whole = [basis.size == len(basis.vectors) for basis in bases]
    return [i for i, gain in enumerate(gains) if gain > enough and not whole[i]]
