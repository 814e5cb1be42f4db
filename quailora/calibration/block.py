"""What is done to one block, in steps that can be called alone: capture its H, propagate, put Q + A Bᵀ in place.

    grams = run.capture(linears, hidden)              # H of each distinct input, while the block runs
    ...                                               # Q and the factors, from W and H
    with in_place(linears, deployed):                 # the block as the fine-tune will run it
        run.propagate(hidden_of_the_quantized_prefix)

None of these steps disables gradients; the caller does, if it needs none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as multiply
from transformers.pytorch_utils import Conv1D

from quailora import ops
from quailora.calibration.calls import Call
from quailora.calibration.data import Batch
from quailora.calibration.gram import Gram
from quailora.calibration.hidden_states import HiddenStates
from quailora.calibration.hooks import collect


@dataclass(frozen=True)
class BlockRun:
    """One block whose weights are in memory, and what it is run on.

    module: the block.
    device, dtype: where it is, and what it computes in.
    batches: the token batches, for their padding.
    calls: what the model passes to this block beside the hidden states, one for each batch.
    """

    module: nn.Module
    device: torch.device
    dtype: torch.dtype
    batches: Sequence[Batch]
    calls: Sequence[Call]

    def forward(self, number: int, hidden: Tensor) -> Tensor:
        """The block's output for one batch of hidden states, both (b, t, d)."""
        return self.calls[number].run(self.module, hidden)

    def propagate(self, states: HiddenStates) -> None:
        """Replace the hidden states of every batch by the block's outputs."""
        with ops.half_products(self.device, [self.dtype]):
            for number in range(len(self.batches)):
                states[number] = self.forward(number, states[number])

    def capture(
        self, linears: Mapping[str, nn.Module], states: HiddenStates, *, propagate: bool = True
    ) -> dict[str, Gram]:
        """H of each of these linears, from one forward pass; linears that receive the same tensor share one.

        A linear that no token reached has no entry. With `propagate`, the hidden states move on in the same pass.
        """
        with ops.half_products(self.device, [self.dtype]), collect(dict(linears)) as collector:
            for number, batch in enumerate(self.batches):
                with collector.batch(to_device(batch.keep, self.device)):
                    hidden = self.forward(number, states[number])
                if propagate:
                    states[number] = hidden
                del hidden  # or it would be in memory beside the next batch's
        return collector.grams


@dataclass(frozen=True, eq=False)
class DeployedLinear:
    """The weight of a linear as the fine-tune has it: Q + A Bᵀ.

    Q: (m, n), in the dtype that the quantized linear computes in.
    A, B: (m, r) and (n, r) fp32; they may require gradients. None where no adapter is on the linear.
    """

    Q: Tensor
    A: Tensor | None = None
    B: Tensor | None = None

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x Qᵀ + bias + (x B) Aᵀ for x (..., n), with the casts of a quantized linear and of PEFT's LoRA layers."""
        base = multiply(x.to(self.Q.dtype), self.Q, None if bias is None else bias.to(self.Q.dtype)).to(x.dtype)
        if self.A is None or self.B is None:
            return base
        return (base + x.to(self.B.dtype) @ self.B @ self.A.T).to(x.dtype)

    def computing_in(self, dtype: torch.dtype) -> DeployedLinear:
        """The same with products of A and B in `dtype`, as autocast computes them; A and B keep their gradients."""
        if self.A is None or self.B is None:
            return self
        return replace(self, A=self.A.to(dtype), B=self.B.to(dtype))


@contextmanager
def in_place(linears: Mapping[str, nn.Module], deployed: Mapping[str, DeployedLinear]) -> Iterator[None]:
    """Within it these linears compute with Q + A Bᵀ, as they will in the fine-tune."""
    try:
        for name, weight in deployed.items():
            module = linears[name]
            assert isinstance(module, nn.Linear | Conv1D), type(module)
            module.forward = lambda x, weight=weight, module=module: weight.forward(x, module.bias)  # type: ignore[method-assign]
        yield
    finally:
        for name in deployed:
            linears[name].__dict__.pop("forward", None)


def to_device(mask: Tensor | None, device: torch.device) -> Tensor | None:
    """A batch's mask, where it is used."""
    if mask is None or device.type != "cuda":
        return mask
    return mask.pin_memory().to(device, non_blocking=True)  # pinned: the host does not wait for the copy
