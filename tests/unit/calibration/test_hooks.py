"""Which linears share an H, and what is in it."""

import pytest
import torch
from torch import Tensor, nn

from quailora.calibration.gram import Gram
from quailora.calibration.hooks import collect
from quailora.errors import CalibrationError


def linears(*names: str) -> dict[str, nn.Module]:
    return {name: nn.Linear(4, 2) for name in names}


def h_of(x: Tensor) -> Tensor:
    gram = Gram(4)
    gram.update(x)
    return gram.matrix()


def test_linears_share_h_if_they_receive_the_same_tensor_object() -> None:
    layers = linears("q", "k", "v", "o", "view")
    batches = [torch.randn(2, 3, 4), torch.randn(1, 5, 4)]
    with collect(layers) as collector, torch.no_grad():
        for x in batches:
            with collector.batch(None):
                for name in ("q", "k", "v"):
                    layers[name](x)
                layers["view"](x[:])
                layers["o"](2 * x)
    grams = collector.grams
    assert grams["q"] is grams["k"] is grams["v"]
    assert len({id(gram) for gram in grams.values()}) == 3
    h = sum(map(h_of, batches))
    for name, factor in (("q", 1), ("view", 1), ("o", 4)):
        assert torch.allclose(grams[name].matrix(), factor * h, rtol=1e-5)


def test_a_tensor_of_an_earlier_batch_is_not_mistaken_for_a_new_one() -> None:
    """Memory of the first batch is used again in the second, where a new linear runs."""
    layers = linears("first", "second")
    with collect(layers) as collector, torch.no_grad():
        with collector.batch(None):
            layers["first"](torch.ones(3, 4))
        with collector.batch(None):
            layers["second"](torch.ones(3, 4))
    assert collector.grams["first"] is not collector.grams["second"]
    assert not collector._held


def test_an_input_that_was_changed_in_place_is_another_input() -> None:
    first, second = nn.Linear(4, 2), nn.Linear(4, 2)
    x = torch.ones(3, 4)
    with collect({"first": first, "second": second}) as collector, collector.batch(None), torch.no_grad():
        first(x)
        second(x.mul_(3))
    assert collector.grams["first"] is not collector.grams["second"]
    assert torch.equal(collector.grams["second"].matrix(), 9 * collector.grams["first"].matrix())


def test_an_edit_after_the_linears_changes_no_h() -> None:
    layers = linears("q", "k")
    with collect(layers) as collector, torch.no_grad():
        for _ in range(2):
            x = torch.ones(3, 4)
            with collector.batch(None):
                layers["q"](x)
                layers["k"](x)
                x.mul_(3)
    assert collector.grams["q"] is collector.grams["k"]
    assert torch.equal(collector.grams["q"].matrix(), torch.full((4, 4), 6.0))


def test_experts_that_no_token_chose_share_nothing() -> None:
    experts = linears("first", "second", "third")
    x = torch.ones(3, 4)
    with collect(experts) as collector, torch.no_grad():
        with collector.batch(None):
            empty = x[:0]
            for expert in experts.values():
                expert(empty)
        for name, factor in (("first", 1), ("second", 3)):
            with collector.batch(None):
                experts[name](factor * x)
    assert collector.grams.keys() == {"first", "second"}
    assert torch.equal(collector.grams["second"].matrix(), 9 * collector.grams["first"].matrix())


def test_padding_is_left_out_where_rows_are_tokens_and_refused_elsewhere() -> None:
    layers = linears("q", "expert")
    x, keep = torch.randn(2, 3, 4), torch.tensor([[True, True, False], [True, False, False]])
    with collect(layers) as collector, torch.no_grad(), collector.batch(keep):
        layers["q"](x.flatten(0, 1))
        with pytest.raises(CalibrationError, match=r"expert receives \(2, 4\) in a batch of \(2, 3\).*--batch-size 1"):
            layers["expert"](x[0, :2])
    assert torch.allclose(collector.grams["q"].matrix(), h_of(x[keep]))


def test_hooks_are_removed_after_an_error() -> None:
    layers = linears("q")
    with pytest.raises(RuntimeError), collect(layers):
        assert layers["q"]._forward_pre_hooks
        raise RuntimeError
    assert not layers["q"]._forward_pre_hooks
