"""Linears narrower than r, as current mixtures and hybrids have them: their rank is capped, and the report says so."""

import json
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

import quailora
from quailora.adapters.targets import find_targets
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
HYBRID: dict[str, Any] = {
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
FAMILIES: dict[str, dict[str, Any]] = {  # each with linears narrower than r
    "qwen2_moe": QWEN2_MOE,
    "qwen3_next": QWEN2_MOE | HYBRID,
    "qwen3_5_text": HYBRID,
    "doge": {},
    "gemma3n_text": {
        "head_dim": 32,
        "intermediate_size": [128, 128],
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": tiny.VOCABULARY,
        "num_kv_shared_layers": 0,
        "laurel_rank": 8,
        "altup_num_inputs": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "activation_sparsity_pattern": [0.0, 0.0],
    },
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


@pytest.mark.parametrize("family", FAMILIES)
def test_default_options_run_on_models_that_have_them(family: str, tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model", family, **FAMILIES[family])
    report = build(folder, tmp_path / "out", lora(r=64))
    assert any("narrower than r" in note for note in report.notes)
    assert {layer.rank for layer in report.layers} > {64}
    for name, reason in report.left.items():
        assert ("fused expert" in reason) <= ("experts" in name), (name, reason)


def test_in_place_they_keep_the_lora_default(folder: Path) -> None:
    model = get_peft_model(load_base(folder, four_bits()), lora())
    report = quailora.initialize(model, DATA, checkpoint=folder, progress=False)
    assert "rank 8 exceeds the smaller side of its 1 x 64 weight" in report.left[GATE]
    assert GATE not in {target.name for target in find_targets(model)[0]}


def test_a_rank_above_every_linear_is_an_error(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    with pytest.raises(AdapterError, match=r"rank 512 exceeds the smaller side of every targeted linear .*--rank"):
        build(folder, tmp_path / "out", lora(r=512))
