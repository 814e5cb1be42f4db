"""Training scripts set torch's default dtype and device; neither may reach an initialization."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor

import quailora
from quailora.evaluate import compare
from tests.helpers import tiny
from tests.helpers.adapters import WEIGHTS, train_a_little
from tests.integration.test_pipeline import DATA, build, four_bits, load_base, lora, products


@pytest.fixture
def bfloat16_and_another_device() -> Iterator[None]:
    """The meta device fails on whatever reads a value, as a GPU that nobody asked for would fail on mixed devices."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("defaults") / "model")


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, Tensor]:
    build(folder, folder.parent / "expected")
    return load_file(folder.parent / "expected" / "adapter_model.safetensors")


def test_build_adapter(
    folder: Path, expected: dict[str, Tensor], bfloat16_and_another_device: None, tmp_path: Path
) -> None:
    build(folder, tmp_path / "adapter", progress=True)
    found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name: tensor.dtype for name, tensor in found.items()} == {n: t.dtype for n, t in expected.items()}
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_initialize(folder: Path, request: pytest.FixtureRequest) -> None:
    models = [get_peft_model(load_base(folder, four_bits()), lora()) for _ in range(2)]
    quailora.initialize(models[0], DATA, checkpoint=folder, progress=False)
    request.getfixturevalue("bfloat16_and_another_device")
    quailora.initialize(models[1], DATA, checkpoint=folder, progress=False)
    first, second = (products(model) for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_merge(folder: Path, expected: dict[str, Tensor], request: pytest.FixtureRequest, tmp_path: Path) -> None:
    quailora.merge(folder, folder.parent / "expected", tmp_path / "plain")
    request.getfixturevalue("bfloat16_and_another_device")
    quailora.merge(folder, folder.parent / "expected", tmp_path / "merged")
    plain, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "merged"))
    assert {name: tensor.dtype for name, tensor in merged.items()} == {n: t.dtype for n, t in plain.items()}
    assert all(torch.equal(merged[name], plain[name]) for name in plain)
    assert (tmp_path / "merged" / "config.json").read_text() == (tmp_path / "plain" / "config.json").read_text()


def test_convert(folder: Path, expected: dict[str, Tensor], request: pytest.FixtureRequest, tmp_path: Path) -> None:
    train_a_little(folder.parent / "expected", tmp_path / "trained")
    quailora.convert(folder.parent / "expected", tmp_path / "trained", tmp_path / "plain")
    request.getfixturevalue("bfloat16_and_another_device")
    quailora.convert(folder.parent / "expected", tmp_path / "trained", tmp_path / "converted")
    plain, converted = (load_file(tmp_path / name / WEIGHTS) for name in ("plain", "converted"))
    assert all(torch.equal(converted[name], plain[name]) for name in plain)


def test_compare(folder: Path, expected: dict[str, Tensor], request: pytest.FixtureRequest) -> None:
    plain = compare(folder, folder.parent / "expected", DATA)
    request.getfixturevalue("bfloat16_and_another_device")
    assert compare(folder, folder.parent / "expected", DATA) == plain


def test_check_base(folder: Path, expected: dict[str, Tensor], request: pytest.FixtureRequest) -> None:
    base = load_base(folder, four_bits())
    request.getfixturevalue("bfloat16_and_another_device")
    quailora.check_base(base, folder.parent / "expected")
