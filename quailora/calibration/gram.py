"""H of one layer input: x xᵀ summed over the calibration tokens."""

from collections.abc import Callable

import torch
from torch import Tensor

from quailora import ops
from quailora.errors import CalibrationError


class Gram:
    """Accumulates H = X Xᵀ = Σ x xᵀ (a sum over tokens, not a mean) in fp32, on `device`.

    `features` is n, the number of inputs of the layer. The order of the batches, and how tokens are split into them,
    change H by rounding only, so processes may each accumulate a part and merge them.
    """

    def __init__(self, features: int, device: torch.device | str | None = None) -> None:
        self.features = features
        self._h = torch.zeros(features, features, dtype=torch.float32, device=device)  # lower triangle; see `matrix`
        # Counted on the device: reading the count would make the host wait at every layer of the forward pass. And in
        # place, as updates may come on another stream than the one this memory belongs to.
        self._tokens = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def tokens(self) -> int:
        """The number of tokens counted. On a GPU, reading it makes the host wait."""
        return int(self._tokens)

    @torch.no_grad()
    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Add the tokens of `x` (..., n), bf16, fp16 or fp32, for which `mask` (...), bool or 0 and 1, is true.

        Masked tokens are never read. Raises CalibrationError if the shapes do not fit.
        """
        if x.shape[-1:] != (self.features,) or not x.is_floating_point():
            raise CalibrationError(
                f"expected inputs (..., {self.features}) of a floating-point dtype, got {tuple(x.shape)} of {x.dtype}"
            )
        if mask is not None:
            if mask.shape != x.shape[:-1]:
                raise CalibrationError(
                    f"expected a mask {tuple(x.shape[:-1])} for inputs {tuple(x.shape)}, got {tuple(mask.shape)}"
                )
            mask = mask.to(x.device, torch.bool)
        if x.dtype == torch.float64:
            x = x.float()
        ops.gram_(self._h, x, mask)
        self._tokens.add_(x.shape[:-1].numel() if mask is None else mask.sum())

    def matrix(self) -> Tensor:
        """H, (n, n) fp32, symmetric. It shares memory with this object: call again after another `update`.

        Raises CalibrationError if no token was counted.
        """
        if self.tokens == 0:
            raise CalibrationError(
                f"no calibration token reached this input of {self.features} features; "
                "is everything masked, or was the layer never run?"
            )
        ops.mirror_(self._h)
        return self._h

    def merge(self, other: "Gram") -> None:
        """Add the tokens of `other`. Raises CalibrationError if the features differ."""
        if other.features != self.features:
            raise CalibrationError(f"cannot merge a Gram of {other.features} features into one of {self.features}")
        self._h += other._h.to(self._h.device)
        self._tokens += other._tokens.to(self._tokens.device)

    def reduce(self, all_reduce: Callable[[Tensor], object]) -> None:
        """Sum H and the count over all processes, by `all_reduce`, which sums one tensor in place."""
        all_reduce(self._h)
        all_reduce(self._tokens)
