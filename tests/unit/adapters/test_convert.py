"""A converted adapter adds to the full-precision weights what training learned, and nothing else."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import quailora
from quailora.errors import AdapterError
from quailora.evaluate import compare
from quailora.reporting.record import RECORD, weights_digest
from tests.helpers import tiny
from tests.helpers.adapters import WEIGHTS, dense, train_a_little
from tests.integration import test_pipeline as pipeline


@pytest.mark.parametrize(
    "changes", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"up_proj": 5}}]
)
def test_converted_it_adds_to_full_precision_what_training_learned(changes: dict[str, object], tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    pipeline.build(folder, tmp_path / "initial", pipeline.lora(**changes))
    train_a_little(tmp_path / "initial", tmp_path / "trained")
    quailora.convert(tmp_path / "initial", tmp_path / "trained", tmp_path / "converted")

    def product(name: str) -> dict[str, torch.Tensor]:
        return pipeline.products(PeftModel.from_pretrained(dense(folder), str(tmp_path / name)))

    initial, trained, converted = product("initial"), product("trained"), product("converted")
    assert converted.keys() == trained.keys()
    for name, learned in converted.items():
        expected = trained[name] - initial[name]
        # The factors are stored in fp32.
        assert torch.allclose(learned, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max())), name
    ranks = {value.shape[0] for key, value in load_file(tmp_path / "converted" / WEIGHTS).items() if "lora_A" in key}
    assert max(ranks) <= 16


def test_converted_to_a_lower_rank_it_is_the_best_of_that_rank(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    pipeline.build(folder, tmp_path / "initial")
    train_a_little(tmp_path / "initial", tmp_path / "trained")
    for rank in (3, 16):
        quailora.convert(tmp_path / "initial", tmp_path / "trained", tmp_path / str(rank), rank=rank)
    low, whole = (
        pipeline.products(PeftModel.from_pretrained(dense(folder), str(tmp_path / str(rank)))) for rank in (3, 16)
    )
    for name, product in whole.items():
        beyond = torch.linalg.svdvals(product)[3:].norm()
        assert (low[name] - product).norm().item() == pytest.approx(beyond.item(), rel=1e-3)


def test_what_is_learned_survives_beside_much_larger_factors(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    pipeline.build(folder, tmp_path / "initial")
    train_a_little(tmp_path / "initial", tmp_path / "trained")
    weights = load_file(tmp_path / "initial" / WEIGHTS)
    first = next(key for key in weights if ".lora_B." in key)
    weights[first][0, 0] += 0.5
    save_file(weights, tmp_path / "trained" / WEIGHTS, metadata={"format": "pt"})
    quailora.convert(tmp_path / "initial", tmp_path / "trained", tmp_path / "converted")
    learned = pipeline.products(PeftModel.from_pretrained(dense(folder), str(tmp_path / "converted")))
    started = pipeline.products(PeftModel.from_pretrained(dense(folder), str(tmp_path / "initial")))
    changed = first.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
    for name, product in learned.items():  # elsewhere B A - B A, through a QR in fp64
        assert (product.norm() > 1e-3 * started[name].norm()) == (name == changed), name
        assert name == changed or product.norm() < 1e-12 * started[name].norm(), name


def test_a_start_and_what_was_trained_from_it_are_not_mistaken(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    pipeline.build(folder, tmp_path / "initial")
    train_a_little(tmp_path / "initial", tmp_path / "trained")
    with pytest.raises(AdapterError, match="give the initialized adapter first"):
        quailora.convert(tmp_path / "trained", tmp_path / "initial", tmp_path / "converted")
    shutil.copytree(tmp_path / "initial", tmp_path / "copy")
    with pytest.raises(AdapterError, match="hold the same factors"):
        quailora.convert(tmp_path / "initial", tmp_path / "copy", tmp_path / "converted")
    shutil.copy(tmp_path / "trained" / WEIGHTS, tmp_path / "copy")
    record = json.loads((tmp_path / "copy" / RECORD).read_text())
    refined = record | {"weights": weights_digest(tmp_path / "copy")}
    (tmp_path / "copy" / RECORD).write_text(json.dumps(refined))
    with pytest.raises(AdapterError, match="copy was not trained: it has the weights that quailora gave it"):
        quailora.convert(tmp_path / "initial", tmp_path / "copy", tmp_path / "converted")
    assert not (tmp_path / "converted").exists()
    (tmp_path / "copy" / RECORD).write_text(json.dumps(record))  # trained in its own folder
    quailora.convert(tmp_path / "initial", tmp_path / "copy", tmp_path / "converted")


def test_what_was_converted_is_scored_on_full_precision_and_not_merged_into_q(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    pipeline.build(folder, tmp_path / "initial")
    train_a_little(tmp_path / "initial", tmp_path / "trained")
    quailora.convert(tmp_path / "initial", tmp_path / "trained", tmp_path / "learned")
    found = compare(folder, tmp_path / "learned", pipeline.DATA)
    model = PeftModel.from_pretrained(dense(folder), str(tmp_path / "learned"))
    assert found.adapted is not None
    assert found.adapted.name == "full precision + adapter"
    trained = compare(folder, tmp_path / "trained", pipeline.DATA, initial=tmp_path / "initial")
    batches = list(pipeline.DATA.batches(1))
    assert found.adapted.perplexity == pytest.approx(quailora.evaluate.perplexity(model, batches), rel=1e-6)
    started = compare(folder, tmp_path / "initial", pipeline.DATA)
    assert (found.full, found.quantized) == (started.full, started.quantized)
    assert (started.untrained, trained.untrained, found.untrained) == (True, False, False)
    shutil.copy(tmp_path / "initial" / RECORD, tmp_path / "trained")  # as if it had been trained in its own folder
    assert not compare(folder, tmp_path / "trained", pipeline.DATA).untrained
    record = json.loads((tmp_path / "learned" / RECORD).read_text())
    assert record["lora"] == {"r": 16, "alpha": 16, "use_rslora": False}  # twice the start's
    with pytest.raises(AdapterError, match="no Q to merge it with"):
        quailora.merge(folder, tmp_path / "learned", tmp_path / "dense")


def test_adapters_of_different_modules_do_not_convert(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    pipeline.build(folder, tmp_path / "one", pipeline.lora(target_modules=["q_proj"]))
    pipeline.build(folder, tmp_path / "other", pipeline.lora(target_modules=["v_proj"]))
    with pytest.raises(AdapterError, match="different modules"):
        quailora.convert(tmp_path / "one", tmp_path / "other", tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize(
    "changes", [{"lora_bias": True, "target_modules": ["q_proj"]}, {"target_modules": ["q_proj", "embed_tokens"]}]
)
def test_what_cannot_be_converted_is_refused_by_name(changes: dict[str, object], tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model", "qwen2", tie_word_embeddings=False)
    pipeline.build(folder, tmp_path / "adapter", pipeline.lora(**changes))
    with pytest.raises(AdapterError, match=r"lora_B\.bias|lora_embedding"):
        quailora.convert(tmp_path / "adapter", tmp_path / "adapter", tmp_path / "converted")
    if "lora_bias" in changes:
        with pytest.raises(AdapterError, match="lora_bias"):
            quailora.merge(folder, tmp_path / "adapter", tmp_path / "dense")
    assert not (tmp_path / "converted").exists()
    assert not (tmp_path / "dense").exists()


def test_adapters_of_parameters_do_not_convert(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    pipeline.build(folder, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_parameters": ["experts.gate_up_proj"]}))
    with pytest.raises(AdapterError, match=r"target_parameters.*experts\.gate_up_proj"):
        quailora.convert(tmp_path / "adapter", tmp_path / "adapter", tmp_path / "converted")


def test_a_folder_that_is_not_there_is_not_looked_for_on_a_hub(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="does not exist"):
        quailora.convert("someone/start", "someone/trained", tmp_path / "converted")
