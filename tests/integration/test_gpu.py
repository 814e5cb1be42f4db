"""A whole run on a GPU, compared with one on the CPU, and with one less of each thing that only a GPU has.

Skipped where there is none. `pytest -m gpu` runs these and tests/kernels/test_gpu.py.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor
from transformers import BitsAndBytesConfig

import quailora
from benchmarks.end_to_end import memory
from quailora.calibration.data import Calibration
from quailora.calibration.hooks import Collector
from quailora.memory.planner import _Planner
from quailora.ops.precision import exact_products
from quailora.pipeline import quantize
from quailora.reporting.report import Report
from tests.helpers import tiny

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
BLOCKS = 3


def data(samples: int = 10, length: int = 200) -> Calibration:
    return Calibration(tiny.sequences(samples, length), "random tokens")


def build(model: Path, output: Path, device: str | torch.device = CUDA, **changes: Any) -> Report:
    """In fp32, so that little but the order of sums differs between devices. Several batches, with padding."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
    )
    lora = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    options: dict[str, Any] = {"quantization": quantization, "progress": False, "batch_size": 2} | changes
    return quailora.build_adapter(model, lora, data(), output, device=device, **options)


def products(folder: Path) -> dict[str, Tensor]:
    """B A of every linear in fp64."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return {
        name: tensors[name.replace("lora_A", "lora_B")].double() @ a.double()
        for name, a in tensors.items()
        if "lora_A" in name
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_hidden_layers": BLOCKS}
    return tiny.checkpoint(tmp_path_factory.mktemp("gpu") / "model", **sizes)


@pytest.fixture(scope="module")
def undisturbed(model: Path) -> tuple[Path, Report]:
    """The adapter that a GPU makes."""
    folder = model.parent / "undisturbed"
    return folder, build(model, folder)


def assert_same_bits(folder: Path, other: Path) -> None:
    assert (folder / "adapter_model.safetensors").read_bytes() == (other / "adapter_model.safetensors").read_bytes()


def test_the_adapter_is_that_of_the_cpu(model: Path, undisturbed: tuple[Path, Report], tmp_path: Path) -> None:
    expected, (folder, found) = build(model, tmp_path / "cpu", "cpu"), undisturbed
    assert len(found.layers) == 7 * BLOCKS
    for mine, its in zip(found.layers, expected.layers, strict=True):
        assert (mine.name, mine.tokens) == (its.name, its.tokens)
        assert mine.output_error == pytest.approx(its.output_error, rel=1e-3)
        assert mine.output_error_after == pytest.approx(its.output_error_after, rel=1e-3)
    mine, its = products(folder), products(tmp_path / "cpu")
    assert mine.keys() == its.keys()
    for name in its:
        # Nearly equal singular values, which random weights have, mix with what little differs.
        assert (mine[name] - its[name]).norm() < 0.1 * its[name].norm(), name


def test_h_is_the_same_without_a_side_stream(
    model: Path, undisturbed: tuple[Path, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(Collector, "_beside", lambda self, *args: nullcontext(seen.append(args)))
    plain = build(model, tmp_path / "adapter")
    assert seen
    for mine, its in zip(undisturbed[1].layers, plain.layers, strict=True):
        assert mine.output_error == pytest.approx(its.output_error, rel=1e-5)
        assert mine.output_error_after == pytest.approx(its.output_error_after, rel=1e-4)


def test_the_same_bits_without_prefetch(
    model: Path, undisturbed: tuple[Path, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preferences, dropped = _Planner.preferences, []

    def without(self: _Planner, *args: Any) -> Iterator[Any]:
        for states, prefetch, batch, passes in preferences(self, *args):
            dropped.append(prefetch)
            yield states, False, batch, passes

    monkeypatch.setattr(_Planner, "preferences", without)
    build(model, tmp_path / "adapter")
    assert dropped[0], "the run that this is compared with read ahead"
    assert_same_bits(tmp_path / "adapter", undisturbed[0])


def test_the_same_bits_when_resumed(
    model: Path, undisturbed: tuple[Path, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solve, solved = quantize.solve, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if len(solved) == 6:  # the groups of one block and a half
            raise KeyboardInterrupt
        solved.append(args)
        return solve(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(quantize, "solve", interrupted)
        build(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    build(model, tmp_path / "adapter")
    assert_same_bits(tmp_path / "adapter", undisturbed[0])


@pytest.mark.parametrize("interface", ["older", "newer"])
def test_tf32_stays_out_of_h_and_the_solve(interface: str) -> None:
    """By whichever of torch's interfaces a caller has allowed it."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(512, 512, generator=g).to(CUDA) for _ in range(2))
    exact = x.double() @ y.double()

    def off() -> float:
        return float(((x @ y).double() - exact).norm() / exact.norm())

    before = torch.backends.cuda.matmul.fp32_precision
    try:
        if interface == "older":
            torch.set_float32_matmul_precision("high")
        else:
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert off() > 1e-5  # or there is nothing to see on this GPU
        with exact_products(CUDA):
            assert off() < 1e-6
            assert not torch.backends.cuda.matmul.allow_tf32
        assert off() > 1e-5
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("budget", ["700MiB", "2GiB"])
def test_the_allocator_stays_within_the_budget(budget: str, tmp_path: Path) -> None:
    """With half of what the fastest plan takes, and with plenty."""
    size = memory.Size(hidden=2048, inner=5504, blocks=2, heads=16, groups=16, vocabulary=4096)
    memory.write_model(tmp_path / "model", size)
    torch.cuda.empty_cache()  # what is cached counts as taken before the run
    before = torch.cuda.memory_allocated(CUDA)
    found = memory.measure(tmp_path / "model", 32, 512, 64, "all-linear", budget)
    assert found["planned"] <= found["budget"]
    assert 0.5 * found["planned"] < found["measured"] <= found["budget"]
    assert torch.cuda.memory_allocated(CUDA) == before  # all is freed, on all streams


def test_stages_make_up_the_whole_run(undisturbed: tuple[Path, Report]) -> None:
    stages = undisturbed[1].stages
    assert {"load", "forward", "quantize", "solve", "write"} <= stages.keys()
    assert all(seconds > 0 for seconds in stages.values())
