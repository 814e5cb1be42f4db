"""H P from one triangle, kernel against fp64, run by Triton's interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quailora.kernels import gram_product as module
from quailora.kernels.gram_product import gram_product, grouped_gram_product
from quailora.kernels.precision import PRECISIONS
from tests.helpers import interpreter
from tests.helpers.rounding import assert_product

interpreter.install()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gram(n: int) -> tuple[Tensor, Tensor]:
    """H, and H as `Gram` gathers it: NaN stands above the diagonal here, so that using any of it shows."""
    h = random(n, n) + random(n, n).T
    return h, torch.where(torch.ones(n, n).tril().bool(), h, float("nan"))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("n", [64, 150, 256])  # one tile; ragged; an even number of tiles
def test_every_precision(n: int, precision: str) -> None:
    h, lower = gram(n)
    right = random(n, 16, seed=1)
    assert_product(gram_product(lower, right, precision=precision), h, right, precision)


@settings(max_examples=12, deadline=None)
@given(n=st.integers(1, 300), k=st.integers(1, 140))
def test_any_shape(n: int, k: int) -> None:
    h, lower = gram(n)
    right = random(n, k, seed=1)
    assert_product(gram_product(lower, right), h, right, "ieee")


def test_every_element_is_taken_from_the_lower_triangle_once() -> None:
    n = 200
    h, lower = gram(n)
    assert torch.equal(gram_product(lower, torch.eye(n)), h)


def test_a_group_is_its_linears_one_by_one() -> None:
    h = (4 * gram(130)[0]).round()  # integers add up exactly in any order
    rights = [random(130, rank, seed=rank).sign() for rank in (16, 5, 130)]
    for product, right in zip(grouped_gram_product(h.tril(), rights), rights, strict=True):
        assert product.is_contiguous()
        assert torch.equal(product, h @ right)


@pytest.mark.parametrize("programs", [1, 3, 256])
def test_the_walk_may_be_split_in_any_way_and_repeats_its_bits(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PROGRAMS", programs)
    h, lower = gram(300)
    right = random(300, 16, seed=1)
    product = gram_product(lower, right)
    assert_product(product, h, right, "ieee")
    assert torch.equal(product, gram_product(lower, right))


def test_nothing_beyond_the_edges_of_p_is_read() -> None:
    h, lower = gram(70)
    memory = torch.full((70 * 16 + 512,), float("nan"))
    right = memory[256 : 256 + 70 * 16].view(70, 16).copy_(random(70, 16))
    assert_product(gram_product(lower, right), h, right, "ieee")


def test_offsets_beyond_two_to_the_31() -> None:
    # n² = 2³¹ + 2¹⁸, of which only the last tile on the diagonal is touched: the rest is address space, never memory.
    n = 46_343
    h, right = torch.empty(n, n), torch.empty(n, 16)
    [setting] = module._settings("sm_80", n, 16, "ieee")
    last = n - n % setting["TILE"]
    h[last:, last:] = 1.0
    right[last:] = 1.0
    tiles = -(-n // setting["TILE"])
    split = tiles - 2  # the one whose only step is there: j = split - (tiles - 1) mod tiles
    partial = torch.empty(tiles, n, 16)
    with interpreter.only(0, tiles - 1, split):
        module._gram_product_kernel[(1, tiles, tiles)](h, right, partial, n, 16, WIDTH=16, PRECISION="ieee", **setting)
    assert (partial[split, last:] == n - last).all()


def test_partners_meet_in_the_same_step() -> None:
    """Tiles (i, j) and (j, i) are the same memory: both are asked for in step i + j, modulo the number of tiles."""
    n = 256
    [setting] = module._settings("sm_80", n, 128, "ieee")
    edge = setting["TILE"]
    tiles = n // edge
    assert module._grid(n, 128, edge, 128)[2] == tiles  # so that the partial product of each step is there to be seen
    owner = torch.arange(n) // edge
    right = torch.eye(tiles)[owner] @ torch.eye(tiles, 128)  # a column for each tile of P, so that the product tells j
    partials = module._launch(torch.ones(n, n), right, "ieee", setting)
    for step, partial in enumerate(partials):
        partner = (step - owner) % tiles
        assert torch.equal(partial, edge * torch.eye(128)[partner])
