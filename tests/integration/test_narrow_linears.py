"""Linears narrower than r, as current mixtures and hybrids have them: their rank is capped, and the report says so."""

import json
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

import quailora
from quailora.adapters.lora import find_targets
from quailora.errors import AdapterError
from tests.helpers import tiny
from tests.integration.test_pipeline import DATA, build, four_bits, load_base, lora

QWEN2_MOE: dict[str, Any] = {
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "decoder_sparse_step": 1,
}
GATE = "model.layers.0.mlp.shared_expert_gate"  # 1 x hidden


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.checkpoint(tmp_path / "model", "qwen2_moe", **QWEN2_MOE)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_rank_is_capped_and_the_scaling_stays(folder: Path, tmp_path: Path, rslora: bool) -> None:
    report = build(folder, tmp_path / "out", lora(use_rslora=rslora))
    assert {layer.name: layer.rank for layer in report.layers}[GATE] == 1
    assert any("2 linears narrower than r" in note and GATE in note for note in report.notes)
    model = PeftModel.from_pretrained(load_base(folder, four_bits()), str(tmp_path / "out"))
    layers = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    assert layers[GATE].r["default"] == 1
    assert len({round(layer.scaling["default"], 6) for layer in layers.values()}) == 1
    ranks = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["rank_pattern"]
    assert len(ranks) == 2


def test_in_place_they_keep_the_lora_default(folder: Path) -> None:
    model = get_peft_model(load_base(folder, four_bits()), lora())
    report = quailora.initialize(model, DATA, checkpoint=folder, progress=False)
    assert "rank 8 exceeds the smaller side of its 1 x 64 weight" in report.left[GATE]
    assert GATE not in {target.name for target in find_targets(model)[0]}


def test_a_rank_above_every_linear_is_an_error(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    with pytest.raises(AdapterError, match=r"rank 512 exceeds the smaller side of every targeted linear .*--rank"):
        build(folder, tmp_path / "out", lora(r=512))
