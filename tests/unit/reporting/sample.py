"""A report and its record, made up."""

from typing import Any

from transformers import BitsAndBytesConfig

from quailora.quantization.bitsandbytes import BitsAndBytes
from quailora.reporting.report import LayerReport, Report

CONFIG = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16"
)


def make_record(config: BitsAndBytesConfig = CONFIG, **base: Any) -> dict[str, Any]:
    return {
        "quailora": "0.1.0",
        "base": {
            "checkpoint": "someone/model: small",
            "revision": None,
            "fingerprint": "0123abcd",
            "dtype": "bfloat16",
            "quantization": BitsAndBytes.from_config(config).to_dict(),
        }
        | base,
        "solver": {"name": "krylov", "iterations": None, "damping": 0.01, "seed": 0},
        "calibration": {"source": "a|b.txt", "samples": 4, "tokens": 400, "sequence_length": 128, "seed": 0},
        "lora": {"r": 8, "alpha": 16},
        "versions": {"torch": "2.13.0"},
    }


def layer(name: str, before: float = 2.0, after: float = 1.0) -> LayerReport:
    return LayerReport(name, 32, 64, 8, 400, 3.0, 2.5, before, after, 0.0, 0.25)


def make_report() -> Report:
    layers = [
        layer(f"model.layers.{i}.self_attn.{kind}", after=after)
        for i in range(12)
        for kind, after in (("q_proj", 1.0), ("o_proj", 0.25))
    ]
    left = {f"model.layers.{i}.mlp.up_proj": "no calibration token reached it" for i in range(5)}
    return Report(layers, left, ["a note"], make_record(), {"forward": 3.0, "solve": 1.0, "write": 121.0})
