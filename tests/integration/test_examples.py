"""The scripts and the notebook of examples/ run, on a tiny model."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

import quailora
from quailora.calibration.data import load_calibration
from tests.helpers import ROOT, tiny
from tests.integration import test_training

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint `model`, and the texts `data.jsonl` and `held-out.txt`."""
    folder = tmp_path_factory.mktemp("examples")
    test_training.tokenizer().save_pretrained(tiny.checkpoint(folder / "model", dtype=torch.bfloat16))
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in test_training.TEXTS))
    (folder / "held-out.txt").write_text("\n".join(test_training.TEXTS))
    return folder


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_every_example_is_tested() -> None:
    names = {path.name for path in EXAMPLES.iterdir() if path.is_file()}
    assert names == {"quickstart.py", "quickstart.ipynb", "in_place.py", "trl_finetune.py", "merge_and_convert.py"}


def test_quickstart(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = ("--data", str(folder / "data.jsonl"), "--held-out", str(folder / "held-out.txt"))
    run("quickstart.py", monkeypatch, str(folder / "model"), *data, "--rank", "8")
    assert "quantized + adapter: " in capsys.readouterr().out
    assert (tmp_path / "initial" / "adapter_model.safetensors").is_file()


def test_in_place(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run("in_place.py", monkeypatch, str(folder / "model"), "--data", str(folder / "data.jsonl"), "--rank", "8")
    assert (tmp_path / "initial" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "initial" / "quailora.json").is_file()


def test_fine_tune_merge_and_convert(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    model = str(folder / "model")
    short = ("--data", str(folder / "data.jsonl"), "--rank", "8", "--max-steps", "2", "--learning-rate", "1e-2")
    run("trl_finetune.py", monkeypatch, model, *short)
    run("merge_and_convert.py", monkeypatch, model, "initial", "trained")
    assert json.loads((tmp_path / "converted" / "adapter_config.json").read_text())["r"] == 16
    text = list(load_calibration(test_training.TEXTS, test_training.tokenizer()).batches(8))
    found = [
        quailora.evaluate.perplexity(AutoModelForCausalLM.from_pretrained(path), text)
        for path in (folder / "model", tmp_path / "dense")
    ]
    assert found[1] < found[0]  # it has learned the texts

    run("trl_finetune.py", monkeypatch, model, *short, "--freeze", "--output", "over")
    run("merge_and_convert.py", monkeypatch, model, "initial", "over", "--dense", "both", "--converted", "task")


def test_the_notebook(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    names: dict[str, object] = {}
    settings, *rest = ("".join(cell["source"]) for cell in code)
    exec(settings, names)
    names |= {"MODEL": str(folder / "model"), "DATA": str(folder / "data.jsonl"), "RANK": 8}
    names["TEXT"] = test_training.TEXTS[0]
    for cell in rest:
        exec(compile(cell, "quickstart.ipynb", "exec"), names)
    assert (tmp_path / "initial" / "adapter_model.safetensors").is_file()
