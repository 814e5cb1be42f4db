"""What only a GPU can show; skipped where there is none. `pytest -m gpu`"""

from types import ModuleType
from typing import Any

import pytest
import torch

from quailora import ops
from quailora.doctor import examine
from quailora.ops import reference
from quailora.quantization.bitsandbytes import BitsAndBytes
from quailora.solvers import als, krylov
from quailora.solvers.config import SolverConfig
from quailora.solvers.inputs import Linear
from quailora.solvers.solve import LoraFactors, solve_group
from tests.helpers.columns import assert_same, block

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
NF4 = BitsAndBytes("nf4", double=True, blocksize=64, compute_dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def kernels_serve() -> None:
    if ops.backends(CUDA)["grouped_error_product"].backend != "triton":
        pytest.skip(f"no kernels for this device: {ops.backends(CUDA)['grouped_error_product'].others['triton']}")


def solved(solver: str, iterations: int | None = None, **options: Any) -> list[LoraFactors]:
    heights, n = (1024, 256), 1024
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2 * n, n, generator=g) * torch.arange(1, n + 1) ** -0.5
    weights = [torch.randn(m, n, generator=g).mul(0.02).bfloat16().to(CUDA) for m in heights]
    linears = [Linear(weight, NF4.quantize(weight), 64) for weight in weights]
    config = SolverConfig(solver, iterations, damping=0.0)
    return solve_group(linears, (x.T @ x).to(CUDA), config, **options)


@pytest.mark.parametrize("size", [64, 256, 1000, 2048])
def test_every_kernel_computes_what_the_reference_does(size: int) -> None:
    assert [finding for finding in examine(CUDA, size=size) if not finding.sound] == []


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("solver", ["krylov", "als"])
def test_the_same_bits_every_run(solver: str, overwrite: bool) -> None:
    once, again = (solved(solver, overwrite_weights=overwrite) for _ in range(2))
    for first, second in zip(once, again, strict=True):
        assert torch.equal(first.A, second.A) and torch.equal(first.B, second.B)


@pytest.mark.parametrize("grid", ["symmetric", "asymmetric", "scales", "zeros", "levels"])
@pytest.mark.parametrize("k", [128, 96, 37])
def test_columns_are_those_of_the_reference_to_the_bit(k: int, grid: str) -> None:
    """With the same scales. Either of two that cost the same up to rounding may be chosen, in one row of a thousand."""
    m, group = 1003, {128: 64, 96: 32, 37: 37}[k]
    tensors, clips = block(m, k), tuple(1 - 0.05 * i for i in range(10))
    options: dict[str, Any] = {"group": group, "bits": 4, "symmetric": grid == "symmetric", "clips": clips}
    scales = tensors[0].split(group, dim=1)[0].abs().amax(dim=1, keepdim=True).expand(m, k // group) / 8
    zeros = (torch.arange(m * k // group) % 16).to(torch.uint8).view(m, -1)
    options |= {"scales": {"scales": scales}, "zeros": {"scales": scales, "zeros": zeros},
                "levels": {"scales": 8 * scales, "levels": torch.linspace(-1, 1, 16) ** 3}}.get(grid, {})  # fmt: skip
    moved = {key: value.to(CUDA) if isinstance(value, torch.Tensor) else value for key, value in options.items()}
    on_device = [each.to(CUDA) for each in tensors]
    ops.quantize_columns(*on_device, **moved)  # compiles, and copies the clips
    torch.cuda.set_sync_debug_mode("error")
    try:
        once, again = (ops.quantize_columns(*on_device, **moved) for _ in range(2))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(once, again)
    found, expected = reference.Columns(*(part.cpu() for part in once)), reference.quantize_columns(*tensors, **options)
    if grid in ("symmetric", "asymmetric"):
        options |= {"scales": found.scales, "zeros": found.zeros}
        chosen = (found.scales == expected.scales) & (found.zeros == expected.zeros)
        assert chosen.all(dim=1).float().mean() > 0.99
        expected = reference.quantize_columns(*tensors, **options)
    assert_same(found, expected)


LOOPS: dict[str, tuple[ModuleType, str]] = {"krylov": (krylov, "_span"), "als": (als, "_alternate")}


@pytest.fixture(params=LOOPS)
def solver(request: pytest.FixtureRequest) -> str:
    return request.param


def test_the_iteration_does_not_wait(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    solved(solver, 1)  # compiles the kernels
    loop, ran = getattr(*LOOPS[solver]), []

    def run(*args: Any) -> Any:
        ran.append(loop)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return loop(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(*LOOPS[solver], run)
    solved(solver, 1)
    assert ran


def test_the_iteration_is_captured_in_a_graph(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = solved(solver)
    loop, ran = getattr(*LOOPS[solver]), []

    def run(*args: Any) -> Any:
        # `_alternate` replaces what its lists hold, and a replay reads it again.
        ran.append([list(arg) if isinstance(arg, list) else arg for arg in args])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = loop(*args)
        graph.replay()
        return results

    monkeypatch.setattr(*LOOPS[solver], run)
    for captured, plain in zip(solved(solver), expected, strict=True):
        assert torch.equal(captured.A, plain.A) and torch.equal(captured.B, plain.B)
    assert ran


def test_fused_products_need_no_room_for_the_error() -> None:
    m, n, r = 8192, 4096, 16
    weight = torch.randn(m, n, device=CUDA, dtype=torch.bfloat16)
    packed, right = ops.packed(NF4.quantize(weight)), torch.randn(n, r, device=CUDA)
    ops.grouped_error_product([(weight, packed)], [right], precision="tf32")  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ops.grouped_error_product([(weight, packed)], [right], precision="tf32")
    # The product, and its parts if the walk was split; E in bf16 alone would be 64 MiB.
    assert torch.cuda.max_memory_allocated() - before < weight.nbytes / 4
