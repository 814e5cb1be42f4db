"""H, D and the target of linears behind quantized layers, by hand; and which linears share an input, in which order."""

import pytest
import torch
from torch import Tensor, nn

from quailora.calibration import inputs
from quailora.calibration.inputs import InputPair, groups_by_input, receiving
from quailora.errors import NotFiniteError


def pair_of(full: Tensor, quantized: Tensor, keep: Tensor | None = None) -> InputPair:
    pair = InputPair(full.shape[-1])
    pair.update(full, quantized, keep)
    return pair


def some(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """X, X̂ (b, t, n) and a mask."""
    torch.manual_seed(0)
    full = torch.randn(3, 20, 12)
    return full.to(dtype), (full + 0.2 * torch.randn(3, 20, 12)).to(dtype), torch.rand(3, 20) < 0.8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_target_by_its_formula(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "_ROWS", 16)
    full, quantized, keep = some(dtype)
    x, x_hat = full[keep].double().T, quantized[keep].double().T  # (n, t)
    w = torch.randn(5, 12).to(dtype)
    h, d = x_hat @ x_hat.T, (x - x_hat) @ x_hat.T
    expected = w.double() + 0.5 * w.double() @ d @ (h + 0.1 * h.diagonal().mean() * torch.eye(12)).inverse()
    pair = pair_of(full, quantized, keep)
    found = pair.targets({"w": w})["w"]
    assert found.dtype == torch.float32 and pair.gram.tokens == keep.sum()
    change, rest = expected - w.double(), found - expected
    assert rest.norm() < (1e-5 if dtype != torch.bfloat16 else 1e-2) * change.norm()
    assert (pair.gram.matrix() - h).norm() < 1e-5 * h.norm()


def test_all_of_the_correction_is_the_least_squares_fit() -> None:
    full, quantized, _ = some()
    w = torch.randn(5, 12)
    found = pair_of(full, quantized).targets({"w": w}, 1.0, 0.0)["w"]
    fit = torch.linalg.lstsq(quantized.flatten(0, 1), full.flatten(0, 1) @ w.T).solution.T
    torch.testing.assert_close(found, fit, rtol=1e-4, atol=1e-4)


def test_equal_inputs_and_no_inputs_change_nothing() -> None:
    full, _, _ = some()
    w = torch.randn(5, 12)
    assert torch.equal(pair_of(full, full).targets({"w": w})["w"], w)
    assert torch.equal(pair_of(full, torch.zeros_like(full)).targets({"w": w})["w"], w)


@pytest.mark.parametrize("of", ["full", "quantized"])
def test_inputs_that_overflow_are_an_error(of: str) -> None:
    full, quantized, _ = some()
    {"full": full, "quantized": quantized}[of][0, 0, 0] = float("inf")
    with pytest.raises(NotFiniteError, match=r"^w: inputs overflow in their dtype"):
        pair_of(full, quantized).targets({"w": torch.randn(5, 12)})


class Block(nn.Module):
    """q and k share an input; o has another; v gets the first after an edit; one expert has few tokens, one linear is
    called twice, one never."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("o", "v", "k", "q", "expert", "twice", "never", "last"):
            setattr(self, name, nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        y = self.o(self.q(x) + self.k(input=x))
        x += 1
        y = y + self.v(x)
        self.expert(y.flatten(0, 1)[:3])
        self.twice(y), self.twice(y)
        return self.last(y.flatten(0, 1))


def test_groups_in_the_order_in_which_they_run() -> None:
    block = Block()
    linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    with torch.no_grad():
        found = groups_by_input(linears, 6, lambda: block(torch.randn(2, 3, 4)))
    assert found == [["q", "k"], ["o"], ["v"], ["last"]]
    assert not any(linear._forward_pre_hooks for linear in linears.values())


def test_a_forward_pass_ends_where_the_input_is_known() -> None:
    block, seen, ran = Block(), list[Tensor](), list[str]()
    block.v.register_forward_hook(lambda *_: ran.append("v"))
    with receiving(block.v, seen.append, stop=True):
        block(torch.zeros(2, 3, 4))
    assert not ran and torch.equal(seen[0], torch.ones(2, 3, 4))
    with receiving(block.v, seen.append):
        block(torch.zeros(2, 3, 4))
    assert ran == ["v"] and len(seen) == 2
    with pytest.raises(ValueError, match="its own"), receiving(block.v, seen.append, stop=True):
        raise ValueError("its own")
    assert not block.v._forward_pre_hooks
