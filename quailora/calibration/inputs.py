"""The inputs of linears in two models: X in the full-precision one, and X̂ behind the quantized layers before them.

A linear that is fitted on X̂ gets a target that undoes a share α of what those layers left (GPTAQ, arXiv 2504.02692;
QEP, arXiv 2504.09629): with H = X̂ X̂ᵀ and D = (X - X̂) X̂ᵀ, the place of W is taken by

    W' = W + α W D (H + λ · mean(diag H) · I)⁻¹

With α = 1 and λ = 0, W' X̂ is the least squares fit of W X.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quailora.calibration.gram import Gram
from quailora.errors import NotFiniteError, SolverError
from quailora.ops.precision import exact_products

# α and λ, by the output error after 6 blocks with 3 bits, on text of the calibration's kind and of another: α = 1 fits
# the calibration text (benchmarks/end_to_end/inputs.py).
SHARE, DAMPING = 0.5, 0.1

_ROWS = 1024  # tokens at a time


class InputPair:
    """H and D of one input, summed over the calibration tokens in fp32 on `device`. features: n."""

    def __init__(self, features: int, device: torch.device | None = None) -> None:
        self.gram = Gram(features, device)
        self.difference = torch.zeros(features, features, dtype=torch.float32, device=device)  # D

    @torch.no_grad()
    def update(self, full: Tensor, quantized: Tensor, keep: Tensor | None = None) -> None:
        """Add the tokens of X and X̂ (..., n) for which `keep`, bool with as many elements, is true."""
        full, quantized = full.flatten(0, -2), quantized.flatten(0, -2)
        if keep is not None:
            full, quantized = full[keep.flatten()], quantized[keep.flatten()]
        self.gram.update(quantized)
        with exact_products(quantized.device):
            for of_full, x in zip(full.split(_ROWS), quantized.split(_ROWS), strict=True):
                if x.dtype is not torch.bfloat16:  # which rounds D by 2⁻⁹ at most; fp16 would overflow
                    of_full, x = of_full.float(), x.float()
                self.difference += (of_full - x).T @ x

    def reduce(self, all_reduce: Callable[[Tensor], object]) -> None:
        """Sum H, D and the count over all processes; see `Gram.reduce`."""
        self.gram.reduce(all_reduce)
        all_reduce(self.difference)

    def targets(
        self, weights: Mapping[str, Tensor], share: float = SHARE, damping: float = DAMPING
    ) -> dict[str, Tensor]:
        """W' (m, n) fp32 in the place of each W (m, n), with α and λ. It gives D up.

        Raises NotFiniteError where inputs are not finite, naming a linear.
        """
        h = self.gram.matrix()
        mean = h.diagonal().mean()
        if not (mean.isfinite() and self.difference.isfinite().all()):
            raise NotFiniteError(
                f"{next(iter(weights))}: inputs overflow in their dtype, in the full-precision model or behind "
                "quantized layers"
            )
        if mean <= 0:
            return {name: weight.float() for name, weight in weights.items()}
        with exact_products(h.device):
            damped = h.clone()
            damped.diagonal().add_(damping * mean)
            lower, info = torch.linalg.cholesky_ex(damped)
            del damped
            if int(info) != 0:
                raise SolverError(f"{next(iter(weights))}: gram is not positive semi-definite")
            change = torch.cholesky_solve(self.difference.T, lower).T
            del lower, self.difference
            return {
                name: torch.addmm(weight.float(), weight.float(), change, alpha=share)
                for name, weight in weights.items()
            }


def groups_by_input(linears: Mapping[str, nn.Module], tokens: int, run: Callable[[], object]) -> list[list[str]]:
    """The linears that share an input, in the order in which `run`, a forward pass over so many tokens, calls them.

    Left out are linears that are called several times, or with other rows than one for each token: experts that tokens
    are sent to.
    """
    seen: list[tuple[Tensor, int, list[str]]] = []  # input, torch's count of its in-place edits, linears
    calls: Counter[str] = Counter()

    def receive(name: str, x: Tensor) -> None:
        calls[name] += 1
        for tensor, version, names in seen:
            if tensor is x and x._version == version:
                names.append(name)
                return
        seen.append((x, x._version, [name]))

    with ExitStack() as hooks:
        for name, linear in linears.items():
            hooks.enter_context(receiving(linear, partial(receive, name)))
        run()
    found = [[name for name in names if calls[name] == 1] for x, _, names in seen if x.shape[:-1].numel() == tokens]
    return [names for names in found if names]


@contextmanager
def receiving(linear: nn.Module, receive: Callable[[Tensor], None], *, stop: bool = False) -> Iterator[None]:
    """Within it, `receive` is called with each input of `linear`. With `stop`, the first one ends the block."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        receive(args[0] if args else kwargs["input"])
        if stop:
            raise _Reached

    handle = linear.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    except _Reached:
        pass
    finally:
        handle.remove()


class _Reached(Exception):
    """Ends a forward pass as soon as an input is known."""
