"""The report, the record and the model card."""

import ast
import errno
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import BitsAndBytesConfig

from quailora.errors import AdapterError, QuailoraError
from quailora.files import write_files
from quailora.quantization.bitsandbytes import Quantization
from quailora.reporting.model_card import model_card
from quailora.reporting.record import RECORD, read_record
from quailora.reporting.report import LayerReport, Report, error_left

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
            "quantization": Quantization.from_config(config).to_dict(),
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


def test_error_left_is_a_geometric_mean() -> None:
    assert error_left([layer("a", 2, 1), layer("b", 8, 1)]) == pytest.approx(0.25)
    assert error_left([layer("a", 2, 1), layer("exact", 0, 0)]) == pytest.approx(0.5)
    assert error_left([layer("a", 2, 1), layer("undone", 2, 0)]) == 0
    assert error_left([layer("exact", 0, 0)]) == 1


def test_a_saved_report_is_loaded_as_it_was(tmp_path: Path) -> None:
    report = make_report()
    report.save(tmp_path / "new" / "folder")
    assert Report.load(tmp_path / "new" / "folder") == report
    assert read_record(tmp_path / "new" / "folder") == report.record
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [RECORD, "report.json", "report.md"]


def test_json_is_strict(tmp_path: Path) -> None:
    report = make_report()
    report.layers.append(layer("bad", after=math.nan))
    with pytest.raises(ValueError, match="not JSON compliant"):
        report.save(tmp_path)
    assert not any(tmp_path.iterdir())


def test_markdown_has_every_layer_once_and_what_was_left() -> None:
    report = make_report()
    text = report.to_markdown()
    for name in [x.name for x in report.layers] + list(report.left):
        # Ended, for layers.1 begins the name of none but layers.10 would.
        assert text.count(f"{name} ") + text.count(f"{name},") + text.count(f"{name}\n") == 1, name
    assert "| q_proj | 12 | 2 | 1 | 50.0% |" in text
    assert "| o_proj | 12 | 2 | 0.25 | 12.5% |" in text
    assert r"a\|b.txt" in text
    assert "| write | 2 min 01 s | 97% |" in text
    assert "- a note" in text


def test_every_row_of_a_table_has_as_many_cells_as_its_header() -> None:
    tables = [part for part in make_report().to_markdown().split("\n\n") if part.startswith("|")]
    assert len(tables) == 4
    for table in tables:
        assert len({line.replace(r"\|", "").count("|") for line in table.splitlines()}) == 1


def test_summary_names_a_few_that_were_left_and_counts_the_rest() -> None:
    lines = str(make_report().summary()).splitlines()
    assert lines[0] == (
        "24 linear layers initialized; 25.0% of their output error on the calibration tokens is left (geometric mean)"
    )
    assert lines[1] == "400 tokens of a|b.txt, 2 min 05 s"
    assert lines[2].count("up_proj") == 3 and "and 2 more (no calibration token reached it)" in lines[2]
    assert lines[3] == "a note"


def fail_on_fsync(number: int) -> Callable[[int], None]:
    """An fsync that finds the disk full at the `number`th file."""
    calls = iter(range(1, number))

    def fsync(descriptor: int) -> None:
        if next(calls, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return fsync


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_full_disk_leaves_the_old_files_whole(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_report().save(tmp_path)
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    newer = make_report()
    newer.notes.append("another note")
    newer.record["quailora"] = "0.2.0"

    monkeypatch.setattr(os, "fsync", fail_on_fsync(number))
    file = ("report.json", "report.md", RECORD)[number - 1]
    with pytest.raises(QuailoraError, match=f"{file} cannot be written: No space left on device; make room"):
        newer.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(QuailoraError, match=r"taken cannot be written: File exists"):
        write_files(tmp_path / "taken", {"a": "b"})


def test_no_record_is_none(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None
    with pytest.raises(AdapterError, match=r"has no report\.json"):
        Report.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"base": {', "cannot be read"),
        ("[]", "holds a list"),
        ("{}", "lacks base, calibration, lora, solver, versions"),
        (json.dumps(make_record() | {"base": {"checkpoint": "x"}}), r"lacks base\.revision, base\.fingerprint"),
        (json.dumps(make_record() | {"lora": None}), "lacks lora"),
    ],
)
def test_a_damaged_record_is_refused(text: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(AdapterError, match=complaint):
        read_record(tmp_path)


def test_a_damaged_report_is_refused(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"layers": [{"name": "x"}]}')
    with pytest.raises(AdapterError, match="is not a report that quailora wrote"):
        Report.load(tmp_path)


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
    assert BitsAndBytesConfig(**arguments).to_dict() == Quantization.from_config(config).to_config().to_dict()
    positional, keywords = calls["AutoModelForCausalLM.from_pretrained"]
    assert positional == ["someone/model: small"]
    constants = {k.arg: k.value.value for k in keywords if isinstance(k.value, ast.Constant)}
    assert constants == {"dtype": "bfloat16"} | ({"revision": revision} if revision else {})
    assert calls["PeftModel.from_pretrained"][0] == ["out/adapter"]
