"""The model card's code loads the base that was recorded."""

import ast

import pytest
import yaml
from transformers import BitsAndBytesConfig

from quailora.quantization.bitsandbytes import BitsAndBytes
from quailora.reporting.model_card import model_card
from tests.unit.reporting.sample import CONFIG, make_record, make_report


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", llm_int8_skip_modules=["lm_head"]),
        BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=5.0),
    ],
)
@pytest.mark.parametrize("revision", [None, "main"])
def test_the_model_card_loads_the_base_as_recorded(config: BitsAndBytesConfig, revision: str | None) -> None:
    record = make_record(config, revision=revision)
    card = model_card(record, make_report(), "out/adapter")

    _, front, body = card.split("---\n", 2)
    data = yaml.safe_load(front)
    assert data["library_name"] == "peft"
    assert data["base_model"] == "someone/model: small"
    assert {"quailora", "qlora", "lora"} <= set(data["tags"])

    code = body.split("```python\n")[1].split("```")[0]
    calls = {
        ast.unparse(node.func): ([ast.literal_eval(a) for a in node.args if isinstance(a, ast.Constant)], node.keywords)
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call)
    }
    arguments = {k.arg: ast.literal_eval(k.value) for k in calls["BitsAndBytesConfig"][1] if k.arg}
    assert BitsAndBytesConfig(**arguments).to_dict() == BitsAndBytes.from_config(config).to_config().to_dict()
    positional, keywords = calls["AutoModelForCausalLM.from_pretrained"]
    assert positional == ["someone/model: small"]
    constants = {k.arg: k.value.value for k in keywords if isinstance(k.value, ast.Constant)}
    assert constants == {"dtype": "bfloat16"} | ({"revision": revision} if revision else {})
    assert calls["PeftModel.from_pretrained"][0] == ["out/adapter"]
