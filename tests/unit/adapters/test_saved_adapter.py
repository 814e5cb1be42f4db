"""Adapters on disk that cannot be used are refused with the tensor's name."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import quailora
from quailora.errors import AdapterError
from tests.helpers import tiny
from tests.helpers.adapters import WEIGHTS, train_a_little
from tests.integration import test_pipeline as pipeline


@pytest.mark.parametrize("fault", ["not finite", "lora_A", "lora_B", "both"])
def test_adapters_that_diverged_or_lack_a_factor_are_named(fault: str, tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    pipeline.build(folder, tmp_path / "initial")
    train_a_little(tmp_path / "initial", tmp_path / "trained")
    weights = load_file(tmp_path / "trained" / WEIGHTS)
    name = "base_model.model.model.layers.1.mlp.up_proj"
    if fault == "not finite":
        weights[f"{name}.lora_A.weight"][0, 0] = torch.nan
    for side in ("lora_A", "lora_B"):
        if fault in (side, "both"):
            del weights[f"{name}.{side}.weight"]
    save_file(weights, tmp_path / "trained" / WEIGHTS, metadata={"format": "pt"})
    words = rf"{name}\.lora_A\.weight.*not finite" if fault == "not finite" else rf"lacks {name}\.lora_[AB]\.weight"
    with pytest.raises(AdapterError, match=words):
        quailora.merge(folder, tmp_path / "trained", tmp_path / "dense", initial=tmp_path / "initial")
    with pytest.raises(AdapterError, match="different modules" if fault == "both" else words):
        quailora.convert(tmp_path / "initial", tmp_path / "trained", tmp_path / "converted")
