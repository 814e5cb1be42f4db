"""After training: merge into Q, convert for the full-precision weights, refuse what does not belong together."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import quailora
from quailora.adapters.base_record import base_of
from quailora.errors import AdapterError, MismatchError, QuailoraError
from quailora.evaluate import compare
from quailora.reporting.record import RECORD
from tests.helpers import tiny
from tests.integration import test_pipeline as pipeline

WEIGHTS = "adapter_model.safetensors"


def train_a_little(initial: Path, trained: Path, seed: int = 0) -> None:
    """What a trainer would leave: the same adapter with other weights, and no record beside it."""
    trained.mkdir()
    (trained / "adapter_config.json").write_text((initial / "adapter_config.json").read_text())
    generator = torch.Generator().manual_seed(seed)
    weights = load_file(initial / WEIGHTS)
    moved = {key: value + 0.01 * torch.randn(value.shape, generator=generator) for key, value in weights.items()}
    save_file(moved, trained / WEIGHTS, metadata={"format": "pt"})


def dense(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "bloom", "opt"])
def test_merge_computes_what_the_quantized_base_with_its_adapter_computes(family: str, tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model", family)
    pipeline.build(folder, tmp_path / "initial")
    train_a_little(tmp_path / "initial", tmp_path / "trained")
    quailora.merge(folder, tmp_path / "trained", tmp_path / "dense", initial=tmp_path / "initial")
    base = pipeline.load_base(folder, pipeline.four_bits())
    model = PeftModel.from_pretrained(base, str(tmp_path / "trained"))
    got, expected = pipeline.logits(dense(tmp_path / "dense")), pipeline.logits(model)
    assert (got - expected).norm() < 1e-5 * expected.norm()  # fp32 sums in another order


@pytest.mark.parametrize("kind", pipeline.QUANTIZATIONS)
def test_merged_weights_are_q_plus_the_product_on_every_base(kind: str, tmp_path: Path) -> None:
    folder, quantization = tiny.checkpoint(tmp_path / "model", dtype=torch.bfloat16), pipeline.QUANTIZATIONS[kind]
    pipeline.build(folder, tmp_path / "adapter", quantization=quantization)
    quailora.merge(folder, tmp_path / "adapter", tmp_path / "dense", dtype=torch.float32)
    base = pipeline.load_base(folder, quantization, torch.bfloat16)
    twin = pipeline.dense_twin(folder, PeftModel.from_pretrained(base, str(tmp_path / "adapter")), torch.float32)
    merged = load_file(tmp_path / "dense" / "model.safetensors")
    for name, value in twin.state_dict().items():
        if name in merged:  # a tied head is stored once
            assert torch.allclose(merged[name], value, rtol=1e-6, atol=1e-7), name


def test_linears_without_an_adapter_become_q_for_that_is_what_training_saw(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    pipeline.build(folder, tmp_path / "adapter", pipeline.lora(target_modules=["q_proj"]))
    quailora.merge(folder, tmp_path / "adapter", tmp_path / "dense")
    base = pipeline.load_base(folder, pipeline.four_bits())
    model = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    got, expected = pipeline.logits(dense(tmp_path / "dense")), pipeline.logits(model)
    assert (got - expected).norm() < 1e-5 * expected.norm()


def test_merge_keeps_shards_names_dtype_and_saved_modules(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny.model(dtype=torch.bfloat16, tie_word_embeddings=False).save_pretrained(folder, max_shard_size="60KB")
    pipeline.build(folder, tmp_path / "adapter", pipeline.lora(modules_to_save=["lm_head"]))
    weights = load_file(tmp_path / "adapter" / WEIGHTS)
    weights["base_model.model.lm_head.weight"] *= 2
    save_file(weights, tmp_path / "adapter" / WEIGHTS, metadata={"format": "pt"})
    quailora.merge(folder, tmp_path / "adapter", tmp_path / "dense")

    def shards(path: Path) -> dict[str, dict[str, torch.Tensor]]:
        return {file.name: load_file(file) for file in path.glob("*.safetensors")}

    before, after = shards(folder), shards(tmp_path / "dense")
    assert len(after) > 1
    assert {n: sorted(s) for n, s in before.items()} == {n: sorted(s) for n, s in after.items()}
    assert {value.dtype for shard in after.values() for value in shard.values()} == {torch.bfloat16}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    original = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded.lm_head.weight, original.lm_head.weight * 2)
    assert torch.equal(loaded.model.norm.weight, original.model.norm.weight)


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
    assert not (tmp_path / "converted").exists()


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
    record = json.loads((tmp_path / "learned" / RECORD).read_text())
    assert record["lora"] == {"r": 16, "alpha": 16, "use_rslora": False}  # twice the start's
    with pytest.raises(AdapterError, match="no Q to merge it with"):
        quailora.merge(folder, tmp_path / "learned", tmp_path / "dense")


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


def test_the_tokenizer_that_was_trained_with_is_the_one_to_serve_with(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    words = {"<s>": 0, "<pad>": 1, "<end>": 2, "a": 3}

    def tokenizer(**tokens: str) -> PreTrainedTokenizerFast:
        model = Tokenizer(models.WordLevel(words, unk_token="a"))
        return PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", pad_token="<pad>", **tokens)

    tokenizer(eos_token="<pad>").save_pretrained(folder)
    pipeline.build(folder, tmp_path / "initial")
    train_a_little(tmp_path / "initial", tmp_path / "trained")
    quailora.merge(folder, tmp_path / "trained", tmp_path / "before", initial=tmp_path / "initial")
    trained = tokenizer(eos_token="<end>")
    trained.chat_template = "{{ messages }}"
    trained.save_pretrained(tmp_path / "trained")
    quailora.merge(folder, tmp_path / "trained", tmp_path / "after", initial=tmp_path / "initial")
    before, after = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("before", "after"))
    assert (before.eos_token, before.chat_template) == ("<pad>", None)
    assert (after.eos_token, after.chat_template) == ("<end>", "{{ messages }}")
    for name, ends in (("before", None), ("after", 2)):
        for config in (AutoConfig.from_pretrained(tmp_path / name), dense(tmp_path / name).generation_config):
            found = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
            assert found[0] == (ends if ends is not None else AutoConfig.from_pretrained(folder).eos_token_id)


def test_adapters_of_different_modules_do_not_convert(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    pipeline.build(folder, tmp_path / "one", pipeline.lora(target_modules=["q_proj"]))
    pipeline.build(folder, tmp_path / "other", pipeline.lora(target_modules=["v_proj"]))
    with pytest.raises(AdapterError, match="different modules"):
        quailora.convert(tmp_path / "one", tmp_path / "other", tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def test_another_base_is_refused_by_eval_merge_and_initialize(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    other = tiny.checkpoint(tmp_path / "other", seed=1)
    pipeline.build(folder, tmp_path / "adapter")
    fp4 = pipeline.QUANTIZATIONS["fp4"]

    with pytest.raises(MismatchError, match="fingerprint"):
        quailora.merge(other, tmp_path / "adapter", tmp_path / "dense")
    with pytest.raises(MismatchError, match=r"NF4.*FP4"):
        quailora.merge(folder, tmp_path / "adapter", tmp_path / "dense", quantization=fp4)
    with pytest.raises(MismatchError, match="fingerprint"):
        compare(other, tmp_path / "adapter", pipeline.DATA)
    with pytest.raises(MismatchError, match=r"NF4.*FP4"):
        compare(folder, tmp_path / "adapter", pipeline.DATA, quantization=fp4)
    model = get_peft_model(pipeline.load_base(folder, pipeline.four_bits()), pipeline.lora())
    with pytest.raises(MismatchError, match="is not the quantized weight of"):
        quailora.initialize(model, pipeline.DATA, checkpoint=other, progress=False)
    assert not (tmp_path / "dense").exists()


def test_a_trainers_checkpoint_below_the_adapter_is_known_by_the_folder_above(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    pipeline.build(folder, tmp_path / "adapter")
    train_a_little(tmp_path / "adapter", tmp_path / "adapter" / "checkpoint-10")
    quailora.merge(folder, tmp_path / "adapter" / "checkpoint-10", tmp_path / "dense")


def test_an_adapter_of_unknown_base_is_refused_unless_its_base_is_named(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    pipeline.build(folder, tmp_path / "adapter")
    train_a_little(tmp_path / "adapter", tmp_path / "trained")
    with pytest.raises(AdapterError, match=RECORD):
        quailora.merge(folder, tmp_path / "trained", tmp_path / "dense")
    quailora.merge(folder, tmp_path / "trained", tmp_path / "dense", quantization=pipeline.four_bits())


def test_a_damaged_record_is_an_error_not_an_absent_one(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    pipeline.build(folder, tmp_path / "adapter")
    (tmp_path / "adapter" / RECORD).write_text(json.dumps({"base": {}}))
    with pytest.raises(QuailoraError, match=RECORD):
        quailora.merge(folder, tmp_path / "adapter", tmp_path / "dense")


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


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_a_weight_that_head_and_embeddings_share_is_not_merged_into_both(name: str, tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    pipeline.build(folder, tmp_path / "adapter", pipeline.lora(modules_to_save=[name]))
    with pytest.raises(AdapterError, match=rf"{name} is adapted.*tied"):
        quailora.merge(folder, tmp_path / "adapter", tmp_path / "dense")


def test_trained_rows_of_embeddings_are_not_lost_in_silence(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    pipeline.build(folder, tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / WEIGHTS)
    weights["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"] = torch.zeros(1, 64)
    save_file(weights, tmp_path / "adapter" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="trainable_token_indices"):
        quailora.merge(folder, tmp_path / "adapter", tmp_path / "dense")


def test_a_single_shard_takes_the_name_of_a_whole_model(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    shard = "model-00001-of-00001.safetensors"
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / shard)
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    pipeline.build(folder, tmp_path / "adapter")
    quailora.merge(folder, tmp_path / "adapter", tmp_path / "dense")
    assert dense(tmp_path / "dense")


def test_adapters_of_parameters_do_not_convert(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    pipeline.build(folder, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_parameters": ["experts.gate_up_proj"]}))
    with pytest.raises(AdapterError, match=r"experts\.gate_up_proj.*target_parameters"):
        quailora.convert(tmp_path / "adapter", tmp_path / "adapter", tmp_path / "converted")


def test_the_start_that_is_named_counts_more_than_the_folder_above(tmp_path: Path) -> None:
    folder, fp4 = tiny.checkpoint(tmp_path / "model"), pipeline.QUANTIZATIONS["fp4"]
    pipeline.build(folder, tmp_path / "above")
    pipeline.build(folder, tmp_path / "start", quantization=fp4)
    trained = tmp_path / "above" / "trained"
    train_a_little(tmp_path / "start", trained)
    assert base_of(trained) != base_of(trained, tmp_path / "start") == base_of(tmp_path / "start")
    for missing, words in ((tmp_path / "strat", "does not exist"), (folder, f"has no {RECORD}")):
        with pytest.raises(AdapterError, match=words):
            quailora.merge(folder, trained, tmp_path / "dense", initial=missing, quantization=fp4)


def test_a_folder_that_is_not_there_is_not_looked_for_on_a_hub(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="does not exist"):
        quailora.convert("someone/start", "someone/trained", tmp_path / "converted")
