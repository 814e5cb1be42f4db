"""Columns rounded with error feedback: the reference against GPTQ as its paper has it, every CPU path against both."""

import math
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from quailora.ops import extension, reference
from quailora.ops.reference import Columns

OBSTACLE = extension.obstacle(torch.device("cpu"))
built = pytest.mark.skipif(OBSTACLE is not None, reason=f"quailora._C: {OBSTACLE}")

PATHS = ["amx-bf16", "avx512-bf16", "avx512", "avx2", "portable"]
CLIPS = (1.0, 0.9, 0.8, 0.7)
NF4 = torch.tensor([-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0,
                    0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1])  # fmt: skip


@pytest.fixture
def use_path() -> Iterator[Callable[[str], None]]:
    from quailora import _C

    before = _C.cpu_path()

    def use(name: str) -> None:
        if name not in _C.cpu_paths():
            pytest.skip(f"this processor, or this build, has no {name}")
        _C.use_cpu_path(name)

    yield use
    _C.use_cpu_path(before)


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, use_path: Callable[[str], None]) -> str:
    use_path(request.param)
    return request.param


@pytest.fixture(params=["reference", *PATHS])
def quantize(request: pytest.FixtureRequest) -> Callable[..., Columns]:
    if request.param == "reference":
        return reference.quantize_columns
    if OBSTACLE is not None:
        pytest.skip(f"quailora._C: {OBSTACLE}")
    request.getfixturevalue("use_path")(request.param)
    return extension.quantize_columns


class Problem(NamedTuple):
    weight: Tensor
    feedback: Tensor
    factor: Tensor
    importance: Tensor
    h: Tensor  # (k, k) fp64

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.weight, self.feedback, self.factor, self.importance


def problem(m: int, k: int, *, feedback: float = 0.1) -> Problem:
    """With inputs of k features that are correlated and of different lengths, and weights with a few outliers."""
    generator = torch.Generator().manual_seed(1000 * m + k)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = (random(4 * k, k) + random(4 * k, 4) @ random(4, k)) * (0.5 * random(k)).exp()
    h = x.T @ x / len(x)
    factor = torch.linalg.cholesky(h.flip(0, 1)).flip(0, 1)  # upper triangular: H = (U √D) (U √D)ᵀ
    roots = factor.diagonal()
    weight = random(m, k) * random(m, 1).exp()
    weight[:, ::17] *= 4
    return Problem(
        weight.float(), (feedback * random(m, k)).float(), (factor / roots).float(), roots.square().float(), h
    )


def values(found: Columns, levels: Tensor | None = None) -> Tensor:
    """Q in fp64."""
    group = found.codes.shape[1] // found.scales.shape[1]
    scales, zeros = (each.double().repeat_interleave(group, dim=1) for each in (found.scales, found.zeros))
    return scales * (found.codes - zeros if levels is None else levels.double()[found.codes.long()])


def assert_agrees(found: Columns, expected: Columns, h: Tensor, tolerated: float = 0.01) -> None:
    """The paths fuse products with sums where they can, and choose scales by sums in another order. That moves a value
    by some 1e-7 of itself, across the middle between two levels once in 10^4 to 10^6 values, and what is rounded after
    it in that row then differs too. So all bits are to be equal but in that many rows, and one more in a small matrix;
    those are to cost as much, up to the scatter of a row's cost."""
    departed = (found.codes != expected.codes).any(dim=1) | (found.scales != expected.scales).any(dim=1)
    assert departed.sum() <= 1 + tolerated * len(departed)
    for mine, reference_s in zip(found, expected, strict=True):
        assert mine.dtype == reference_s.dtype
        assert mine.shape == reference_s.shape
        assert torch.equal(mine[~departed], reference_s[~departed])
    costs = [(each.errors.double() @ h * each.errors.double()).sum(dim=1) for each in (found, expected)]
    assert (costs[0] <= 1.5 * costs[1] + 1e-12).all()


SHAPES = [
    (m, k, group) for m in (1, 3, 17, 100) for k in (32, 64, 96, 128) for group in (32, 64, 128) if k % group == 0
]


@built
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_every_path_agrees_with_the_reference(path: str, bits: int, symmetric: bool) -> None:
    for m, k, group in [*SHAPES, (33, 30, 3), (40, 100, 100), (9, 13, 1), (2, 300, 150)]:
        case = problem(m, k)
        how: dict[str, Any] = {"group": group, "bits": bits, "symmetric": symmetric, "clips": CLIPS}
        found = extension.quantize_columns(*case.operands, **how)
        # It is W - Q of what is given back: exactly, as a scale has 8 bits and a code at most 9.
        assert torch.equal(found.errors, (case.weight - values(found)).float())
        assert_agrees(found, reference.quantize_columns(*case.operands, **how), case.h)


@built
@pytest.mark.parametrize("kind", ["zeros", "symmetric", "NF4", "256 levels", "2 levels"])
def test_scales_that_are_given(path: str, kind: str) -> None:
    for m, k, group in [*SHAPES, (33, 30, 3)]:
        case = problem(m, k)
        scales = case.weight.unflatten(1, (-1, group)).abs().amax(dim=2)
        scales[::3, 0] = 0
        scales[1::3] *= -1 if kind in ("zeros", "symmetric") else 1
        zeros = (torch.arange(scales.numel()) % 18).to(torch.uint8).reshape(scales.shape)  # some of no code's place
        bits = {"256 levels": 8, "2 levels": 1}.get(kind, 4)
        levels = {
            "NF4": NF4,
            "256 levels": torch.linspace(-1, 1, 256) ** 3,  # some of them equal: 0
            "2 levels": torch.tensor([-0.5, 0.25]),
        }.get(kind)
        if levels is None:
            scales /= 8
        how = {
            "group": group, "bits": bits, "symmetric": kind == "symmetric", "clips": (), "scales": scales,
            "zeros": zeros if kind == "zeros" else None, "levels": levels,
        }  # fmt: skip
        found = extension.quantize_columns(*case.operands, **how)
        expected = reference.quantize_columns(*case.operands, **how)
        assert torch.equal(found.scales, scales)
        assert torch.equal(found.zeros, expected.zeros)
        # The reference rounds scale · level before it subtracts; fused, the error differs by that rounding, 6e-8 of Q.
        off = (found.errors.double() - (case.weight - values(found, levels))).abs()
        assert (off <= 1.2e-7 * (case.weight.abs() + found.errors.abs())).all()
        departed = (found.codes != expected.codes).any(dim=1)
        assert departed.sum() <= 1 + 0.01 * m
        torch.testing.assert_close(found.errors[~departed], expected.errors[~departed], rtol=0, atol=1e-5)


def gptq(
    weight: Tensor, h: Tensor, group: int, grid: Callable[[Tensor, int], tuple[Tensor, Tensor]], top: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 1 of arXiv 2210.17323 without its blocks, in fp64: codes, Q, and how near each value was to the middle
    between two levels, in units of a level's distance."""
    w = weight.double().clone()
    codes, q, margin = (torch.empty_like(w) for _ in range(3))
    inverse = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    for j in range(w.shape[1]):
        if j % group == 0:
            scale, zero = grid(w[:, j : j + group], j // group)
        position = w[:, j] / scale + zero
        codes[:, j] = position.round().clamp(0, top)
        margin[:, j] = (position.clamp(0, top) - position.clamp(0, top).floor() - 0.5).abs()
        q[:, j] = scale * (codes[:, j] - zero)
        error = (w[:, j] - q[:, j]) / inverse[j, j]
        w[:, j:] -= error[:, None] * inverse[j, j:]
    return codes, q, margin


@pytest.mark.parametrize("chosen", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_is_gptq(quantize: Callable[..., Columns], bits: int, chosen: bool) -> None:
    """In one call; and block by block, where `feedback` is what GPTQ has already subtracted from the later columns.

    On the same grids: where a later group chooses its scale, GPTQ looks at columns that already foresee each other's
    errors, and this at columns that have those of earlier groups.
    """
    k, top = 48, 2**bits - 1
    group = k if chosen else 12
    case = problem(40, k, feedback=0)
    spans = case.weight.unflatten(1, (-1, group)).abs().amax(dim=2).half().bfloat16().float()
    given = {} if chosen else {"scales": spans / 2**bits, "zeros": (spans.int() % 3 + top // 2).to(torch.uint8)}

    def grid(w: Tensor, number: int) -> tuple[Tensor, Tensor]:
        if given:
            return given["scales"][:, number].double(), given["zeros"][:, number].double()
        low, high = w.amin(dim=1).clamp(max=0), w.amax(dim=1).clamp(min=0)
        scale = ((high - low) / top).half().bfloat16().double()
        return scale, (-low / scale).round().clamp(1, top)  # the format has no zero at code 0

    codes, q, margin = gptq(case.weight, case.h, group, grid, top)
    # U is given in fp32, and sums are, so that values differ by about 1e-6 of the weights, 1e-5 of a scale. From a
    # value on that lies nearer than that to a middle, the codes of a row may differ. Few of 1920 do.
    sure = (margin > 1e-4).long().cumprod(dim=1).bool()
    assert sure.double().mean() > 0.97
    for blocks in (1,) if chosen else (1, 2, 4):
        width, before, found = k // blocks, [], []
        for start in range(0, k, width):
            part = slice(start, start + width)
            feedback = torch.cat(before, dim=1) @ case.factor[:start, part] if before else case.feedback[:, part]
            tables = {name: each[:, start // group : (start + width) // group] for name, each in given.items()}
            found.append(
                quantize(
                    case.weight[:, part], feedback, case.factor[part, part], case.importance[part], group=group,
                    bits=bits, symmetric=False, clips=(1.0,), **tables,
                )
            )  # fmt: skip
            before.append(found[-1].errors)
        assert torch.equal(torch.cat([each.codes for each in found], dim=1)[sure].double(), codes[sure])
        off = torch.cat([values(each) for each in found], dim=1) - q
        assert off[sure].abs().max() < 1e-12


def test_of_all_scales_the_best_is_chosen(quantize: Callable[..., Columns]) -> None:
    """One group, without feedback: no scale that was to be tried costs less."""
    case = problem(50, 24)
    target = (case.weight + case.feedback).double()
    for symmetric in (True, False):
        how: dict[str, Any] = {"group": 24, "bits": 3, "symmetric": symmetric}
        operands = (*case.operands[:2], torch.eye(24), case.importance)
        costs = {}
        for clips in (CLIPS, *((clip,) for clip in CLIPS)):
            off = values(quantize(*operands, **how, clips=clips)) - target
            costs[clips] = (off.square() * case.importance).sum(dim=1)
        tried = torch.stack([costs[(clip,)] for clip in CLIPS])
        assert len(tried.argmin(dim=0).unique()) > 1
        torch.testing.assert_close(costs[CLIPS], tried.amin(dim=0))
    signs = quantize(*operands, **how | {"symmetric": True}, clips=CLIPS).scales.sign()
    assert set(signs.flatten().tolist()) == {-1.0, 1.0}


@built
def test_half_way_between_two_levels_it_is_the_even_one(path: str) -> None:
    """Exactly half way, with scales whose reciprocal is not exact. Fused, a product with it would round elsewhere."""
    scales = (torch.arange(1, 256)[:, None] / 64).bfloat16().float()
    weight = scales * (torch.arange(-20, 20) + 0.5)
    how: dict[str, Any] = {"group": 40, "bits": 8, "symmetric": True, "clips": (), "scales": scales}
    operands = (weight, torch.zeros_like(weight), torch.eye(40), torch.ones(40))
    found, expected = (each(*operands, **how) for each in (extension.quantize_columns, reference.quantize_columns))
    assert torch.equal(found.codes, expected.codes)
    even = (found.codes % 2 == 0).double().mean()
    assert even > 0.8  # of the others the reciprocal has moved the product off the middle


@built
def test_scales_are_rounded_as_torch_does(path: str) -> None:
    """To fp16 with its subnormals, then to bf16: for each number of either, for the middles between those, and for what
    is next to all these. With 1 bit and a clip of a half, the span of a single weight is the weight."""
    halves = torch.arange(0, 0x7C00, dtype=torch.int16).view(torch.float16).float()
    brains = torch.arange(0x3000, 0x4800, dtype=torch.int16).view(torch.bfloat16).float()
    middles = [(each[1:] + each[:-1]) / 2 for each in (halves, brains)]
    tried = torch.cat([halves, brains, *middles, torch.tensor([65504.0, 65519.99, 65520.0, 65536.0, 1e6])])
    tried = torch.cat([tried, *(torch.nextafter(tried, torch.tensor(end)) for end in (0.0, math.inf))])[:, None]
    found = extension.quantize_columns(
        tried, torch.zeros_like(tried), torch.ones(1, 1), torch.ones(1), group=1, bits=1, symmetric=True, clips=(0.5,)
    )
    expected = reference.fp16_and_bf16(tried)
    assert torch.equal(found.scales.abs(), expected.where(expected.isfinite(), 0.0))


@built
@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_that_are_unlike_the_others(path: str, symmetric: bool) -> None:
    """Nothing that a row holds reaches another one."""
    case = problem(40, 64)
    how: dict[str, Any] = {"group": 32, "bits": 4, "symmetric": symmetric, "clips": CLIPS}
    plain = extension.quantize_columns(*case.operands, **how)
    weight, feedback = case.weight.clone(), case.feedback.clone()
    finite = {1: 0.0, 2: -0.0, 18: 1e-30, 19: 65504.0}
    for row, value in finite.items():
        weight[row], feedback[row] = value, 0.0
    weight[3, 5] = 1e4
    broken = {20: math.nan, 21: math.inf, 22: -math.inf, 23: 1e30}
    for row, value in broken.items():
        weight[row, 40] = value  # in the second group
    feedback[39, 0] = math.nan  # in the first
    found = extension.quantize_columns(weight, feedback, *case.operands[2:], **how)
    expected = reference.quantize_columns(weight, feedback, *case.operands[2:], **how)

    def at(columns: Columns, rows: list[int]) -> Columns:
        return Columns(*(each[rows] for each in columns))

    others = [row for row in range(40) if row not in {3, 39} | finite.keys() | broken.keys()]
    assert all(torch.equal(*pair) for pair in zip(at(found, others), at(plain, others), strict=True))
    rows = [3, *finite]
    assert_agrees(at(found, rows), at(expected, rows), case.h)
    for row in (1, 2):
        assert not found.errors[row].any()
        assert torch.equal(found.scales[row], torch.full((2,), 2.0**-24))
    for row in broken:
        assert torch.equal(found.codes[row, :32], plain.codes[row, :32])
        assert torch.equal(found.scales[row], torch.tensor([plain.scales[row, 0], 0.0]))
    assert found.errors[39].isnan().all()
    assert torch.equal(found.errors.isnan(), expected.errors.isnan())
    assert torch.equal(found.scales, expected.scales)
    assert torch.equal(found.zeros, expected.zeros)


@built
def test_matrices_are_views_and_nothing_around_them_is_read_or_written(path: str) -> None:
    case = problem(21, 48)
    how: dict[str, Any] = {"group": 16, "bits": 4, "symmetric": False, "clips": CLIPS}
    expected = extension.quantize_columns(*case.operands, **how)

    def inside(x: Tensor) -> Tensor:
        around = torch.full([size + 7 for size in x.shape], math.nan)
        view = around[tuple(slice(3, 3 + size) for size in x.shape)]
        view.copy_(x)
        return view

    def spread(x: Tensor) -> Tensor:
        return x.T.contiguous().T if x.dim() == 2 else x.repeat_interleave(2)[::2]

    for views in (map(inside, case.operands), map(spread, case.operands)):
        operands = list(views)
        before = [each.clone() for each in operands]
        found = extension.quantize_columns(*operands, **how)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        assert all(torch.equal(*pair) for pair in zip(operands, before, strict=True))
        assert all(each.is_contiguous() for each in found)
    none = torch.zeros(1, 1).expand(21, 48)
    found = extension.quantize_columns(case.weight, none, *case.operands[2:], **how)
    assert torch.equal(
        found.codes, extension.quantize_columns(case.weight, none.clone(), *case.operands[2:], **how).codes
    )


@built
def test_what_is_below_the_diagonal_of_the_factor_means_nothing(path: str) -> None:
    case = problem(10, 40)
    how: dict[str, Any] = {"group": 20, "bits": 3, "symmetric": True, "clips": CLIPS}
    other = case.factor.triu(1) + torch.full((40, 40), 7.0).tril()
    found = extension.quantize_columns(case.weight, case.feedback, other, case.importance, **how)
    expected = extension.quantize_columns(*case.operands, **how)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@built
def test_threads_change_nothing(path: str) -> None:
    case = problem(300, 64)
    how: dict[str, Any] = {"group": 32, "bits": 4, "symmetric": True, "clips": CLIPS}
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(extension.quantize_columns(*case.operands, **how))
    finally:
        torch.set_num_threads(before)
    workers = [
        threading.Thread(target=lambda: results.append(extension.quantize_columns(*case.operands, **how)))
        for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 7
    for result in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(result, results[0], strict=True))


@built
def test_no_rows_and_no_columns() -> None:
    for m, k in ((0, 8), (3, 0), (0, 0)):
        case = (torch.zeros(m, k), torch.zeros(m, k), torch.eye(k), torch.ones(k))
        found = extension.quantize_columns(*case, group=4, bits=4, symmetric=True, clips=CLIPS)
        assert [each.shape for each in found] == [(m, k), (m, k // 4), (m, k // 4), (m, k)]


@built
@pytest.mark.parametrize("given", [False, True])
def test_the_operator_is_declared_as_it_behaves(given: bool) -> None:
    case = problem(6, 16)
    how: dict[str, Any] = {"group": 8, "bits": 4, "symmetric": False, "clips": CLIPS}
    if given:
        how |= {"scales": torch.ones(6, 2), "levels": NF4}
    torch.library.opcheck(torch.ops.quailora.quantize_columns.default, case.operands, how)


@built
def test_errors_carry_the_values() -> None:
    w, f, u, d = torch.zeros(3, 8), torch.zeros(3, 8), torch.eye(8), torch.ones(8)
    s, z = torch.ones(3, 2), torch.zeros(3, 2, dtype=torch.uint8)
    wrong: list[tuple[tuple[Tensor, ...], dict[str, Any], str]] = [
        ((w[0], f, u, d), {}, r"weight \(m, k\) of float32, got \[8\]"),
        ((w.bfloat16(), f, u, d), {}, r"weight .*float32, got \[3, 8\] of BFloat16"),
        ((w, f[:, :7], u, d), {}, r"feedback \[3, 8\] of Float, got \[3, 7\]"),
        ((w, f.double(), u, d), {}, r"feedback .* of Float, got \[3, 8\] of Double"),
        ((w, f, u[:7], d), {}, r"factor \[8, 8\] of Float, got \[7, 8\]"),
        ((w, f, u, u), {}, r"importance \[8\] of Float, got \[8, 8\]"),
        ((w, f, u, d), {"bits": 0}, "bits from 1 to 8, got 0"),
        ((w, f, u, d), {"bits": 9}, "bits from 1 to 8, got 9"),
        ((w, f, u, d), {"group": 3}, "group that divides the 8 columns, got 3"),
        ((w, f, u, d), {"group": 0}, "group that divides the 8 columns, got 0"),
        ((w, f, u, d), {"scales": s[:, :1]}, r"scales \[3, 2\] of Float, got \[3, 1\]"),
        ((w, f, u, d), {"scales": s, "zeros": z.int()}, r"zeros \[3, 2\] of Byte, got \[3, 2\] of Int"),
        ((w, f, u, d), {"scales": s, "levels": NF4[:15]}, r"levels \[16\] of Float, got \[15\]"),
        ((w, f, u, d), {"levels": NF4}, "scales with levels"),
        ((w, f, u, d), {"zeros": z}, "scales with zeros"),
    ]
    for operands, changes, message in wrong:
        for device in ("cpu", "meta"):
            how = {"group": 4, "bits": 4, "symmetric": True, "clips": (1.0,)} | changes
            how = {name: each.to(device) if isinstance(each, Tensor) else each for name, each in how.items()}
            with pytest.raises(ValueError, match=message):
                extension.quantize_columns(*(each.to(device) for each in operands), **how)
    with pytest.raises(ValueError, match="factor and weight on one device, got meta and cpu"):
        extension.quantize_columns(w, f, u.to("meta"), d, group=4, bits=4, symmetric=True, clips=(1.0,))
