"""Routers that subclass nn.Linear but return a tuple: PEFT wraps them and cannot run them, so they are left out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

import quailora
from quailora.errors import AdapterError
from tests.helpers import tiny

SMALL: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama4_text": SMALL | {"intermediate_size_mlp": 64, "head_dim": 16, "num_experts_per_tok": 1},
    "phimoe": SMALL | {"num_experts_per_tok": 2},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_router_is_left_out_and_the_adapter_runs(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder, adapter = tmp_path / "model", tmp_path / "adapter"
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family])).save_pretrained(folder)
    options: dict[str, Any] = {"device": "cpu", "progress": False}
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    report = quailora.build_adapter(folder, config, tiny.sequences(), adapter, **options)
    routers = {name: why for name, why in report.left.items() if name.endswith("router")}
    assert len(routers) == 2 and all("returns more than one tensor" in why for why in routers.values())

    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, device_map="cpu")
    model = PeftModel.from_pretrained(base, str(adapter))
    assert model(torch.arange(2, 18)[None]).logits.isfinite().all()

    config = LoraConfig(r=4, target_modules=["router", "q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(AdapterError, match=r"router .* returns more than one tensor, .* leave it out"):
        quailora.build_adapter(folder, config, tiny.sequences(), tmp_path / "named", **options)
