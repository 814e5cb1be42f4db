"""Adapter folders as trainers leave them: saved empty, or as a pickle."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import quailora
from quailora.errors import AdapterError
from quailora.evaluate import compare
from tests.helpers import tiny
from tests.integration.test_pipeline import DATA, build, lora

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint, and an initialized adapter that saves lm_head too."""
    root = tmp_path_factory.mktemp("adapter")
    model = tiny.checkpoint(root / "model", "qwen2", tie_word_embeddings=False)
    build(model, root / "initial", lora(modules_to_save=["lm_head"]))
    return model, root / "initial"


def uses(model: Path, initial: Path, trained: Path, output: Path) -> dict[str, Callable[[], object]]:
    return {
        "merge": lambda: quailora.merge(model, trained, output, initial=initial),
        "convert": lambda: quailora.convert(initial, trained, output),
        "eval": lambda: compare(model, trained, DATA, initial=initial, device="cpu"),
    }


@pytest.mark.parametrize("use", ["merge", "convert", "eval"])
@pytest.mark.parametrize("which", ["all", "lm_head"])
def test_tensors_saved_empty_are_named(use: str, which: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    """As DeepSpeed ZeRO-3 does."""
    model, initial = folders
    trained = tmp_path / "trained"
    trained.mkdir()
    (trained / "adapter_config.json").write_bytes((initial / "adapter_config.json").read_bytes())
    tensors = load_file(initial / WEIGHTS)
    empty = {k: torch.empty(0) if which in (k.split(".")[-2], "all") else v + 0.01 for k, v in tensors.items()}
    assert any(v.numel() == 0 for v in empty.values())
    save_file(empty, trained / WEIGHTS)
    with pytest.raises(AdapterError, match=r"is empty .*stage3_gather_16bit_weights_on_model_save"):
        uses(model, initial, trained, tmp_path / "out")[use]()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("use", ["merge", "convert", "eval"])
def test_a_pickle_is_refused_with_what_to_do(use: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    model, initial = folders
    trained = tmp_path / "trained"
    trained.mkdir()
    (trained / "adapter_config.json").write_bytes((initial / "adapter_config.json").read_bytes())
    (trained / "adapter_model.bin").write_bytes(b"no matter what")
    with pytest.raises(AdapterError, match=r"adapter_model.bin, a pickle.*safe_serialization=True"):
        uses(model, initial, trained, tmp_path / "out")[use]()
