"""A merged checkpoint computes what the quantized base with its adapter computes; what cannot be merged is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import quailora
from quailora.errors import AdapterError
from tests.helpers import tiny
from tests.helpers.adapters import WEIGHTS, dense, train_a_little
from tests.integration import test_pipeline as pipeline


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


def test_what_is_copied_keeps_its_dtype(tmp_path: Path) -> None:
    """Routers' biases, for example, are in fp32 in checkpoints of bf16 weights."""
    folder = tiny.checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.full((64,), 1 + 2.0**-20)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    pipeline.build(folder, tmp_path / "adapter")
    for dtype in (None, torch.float16):
        quailora.merge(folder, tmp_path / "adapter", tmp_path / str(dtype), dtype=dtype)
        merged = load_file(tmp_path / str(dtype) / "model.safetensors")
        norm = merged.pop("model.norm.weight")
        assert torch.equal(norm, weights["model.norm.weight"].to(dtype or torch.float32))
        assert norm.dtype == (dtype or torch.float32)
        assert {value.dtype for value in merged.values()} == {dtype or torch.bfloat16}


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


def test_an_adapter_that_cannot_be_merged_is_announced_when_it_is_made(tmp_path: Path) -> None:
    model = tiny.checkpoint(tmp_path / "model", "mixtral")
    settings: dict[str, Any] = {"device": "cpu", "progress": False}
    for name, targets in (("all", "all-linear"), ("linears", ["q_proj", "k_proj", "v_proj", "o_proj"])):
        config = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
        report = quailora.build_adapter(model, config, tiny.sequences(), tmp_path / name, **settings)
        notes = [note for note in report.notes if "cannot be merged into the checkpoint (quailora merge)" in note]
        if name == "all":
            assert len(notes) == 1 and "layers.0.mlp" in notes[0]
            with pytest.raises(AdapterError, match="cannot be merged"):
                quailora.merge(model, tmp_path / name, tmp_path / "merged")
        else:
            assert notes == []
            quailora.merge(model, tmp_path / name, tmp_path / "merged")
