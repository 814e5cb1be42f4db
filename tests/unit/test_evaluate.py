"""Perplexity, KL divergence, and the comparison of a quantized base with and without an adapter."""

import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from quailora import evaluate
from quailora.calibration.data import Calibration
from quailora.errors import AdapterError, CalibrationError, MismatchError, QuailoraError
from quailora.evaluate import Comparison, Scores, compare, gap_closed, kl_divergence, perplexity
from quailora.files import to_json
from quailora.modeling.checkpoint import Checkpoint
from quailora.quantization.bitsandbytes import BitsAndBytes
from quailora.reporting.record import RECORD

VOCABULARY = 160
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
INT8 = BitsAndBytesConfig(load_in_8bit=True)
# Sums of some hundred fp32 terms, added in another order (other chunks, other batch shapes) than in the test.
ROUNDING = 1e-5


def tiny_llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_dropout=0.5,  # shows wherever a model is not in eval mode
        initializer_range=0.3,  # logits of some size, so that models differ
    )
    return LlamaForCausalLM(config)


def sequences_of(*lengths: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randint(VOCABULARY, (length,), generator=generator) for length in lengths)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama(0)


@pytest.fixture(scope="module")
def other() -> LlamaForCausalLM:
    return tiny_llama(1).train()


@pytest.fixture(scope="module")
def data() -> Calibration:
    return Calibration(sequences_of(17, 5, 1, 30, 2), "test")


@torch.no_grad()
def logits_of(model: nn.Module, sequence: Tensor) -> Tensor:
    """(t - 1, vocabulary): of one sequence by itself, those that predict its tokens."""
    modes = [module.training for module in model.modules()]
    logits: Tensor = model.eval()(sequence[None]).logits[0, :-1]
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    return logits


def expected_perplexity(model: nn.Module, data: Calibration) -> float:
    losses = [cross_entropy(logits_of(model, s), s[1:], reduction="sum") for s in data.sequences if len(s) > 1]
    return math.exp(sum(losses).item() / sum(len(s) - 1 for s in data.sequences))  # type: ignore[union-attr]


def expected_kl(model: nn.Module, reference: nn.Module, data: Calibration) -> float:
    terms = []
    for sequence in data.sequences:
        p, q = (logits_of(m, sequence).double().softmax(-1) for m in (reference, model))
        terms.append((p * (p / q).log()).sum(-1))
    return torch.cat(terms).mean().item()


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_perplexity_is_that_of_a_plain_loop(batch_size: int, model: LlamaForCausalLM, data: Calibration) -> None:
    measured = perplexity(model, data.batches(batch_size))
    assert measured == pytest.approx(expected_perplexity(model, data), rel=ROUNDING)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_kl_is_that_of_brute_force(
    batch_size: int, model: LlamaForCausalLM, other: LlamaForCausalLM, data: Calibration
) -> None:
    expected = expected_kl(model, other, data)
    assert expected > 0.1
    assert kl_divergence(model, other, data.batches(batch_size)) == pytest.approx(expected, rel=ROUNDING)


def test_kl_to_itself_is_zero(model: LlamaForCausalLM, data: Calibration) -> None:
    assert kl_divergence(model, model, data.batches(2)) == 0


def test_token_tensors_are_batches(model: LlamaForCausalLM) -> None:
    rows = torch.stack(sequences_of(9, 9))
    expected = expected_perplexity(model, Calibration(tuple(rows), "rows"))
    assert perplexity(model, [rows]) == pytest.approx(expected, rel=ROUNDING)
    with pytest.raises(CalibrationError, match=r"\(b, t\) tokens, got \(9,\)"):
        perplexity(model, rows)


def test_padding_counts_on_neither_side(model: LlamaForCausalLM) -> None:
    (sequence,) = sequences_of(8)
    keep = torch.tensor([[False] * 3 + [True] * 8 + [False] * 2])
    padded = torch.zeros(keep.shape, dtype=torch.int64).masked_scatter(keep, sequence)
    expected = perplexity(model, [sequence[None]])
    # A shift of all positions changes rotary angles by rounding only.
    assert perplexity(model, [evaluate.Batch(padded, keep)]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("tokens_at_once", [0.5, 1, 7])
def test_chunks_do_not_change_the_result(
    tokens_at_once: float,
    model: LlamaForCausalLM,
    other: LlamaForCausalLM,
    data: Calibration,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = perplexity(model, data.batches(3)), kl_divergence(model, other, data.batches(3))
    monkeypatch.setattr(evaluate, "LOGITS_AT_ONCE", int(tokens_at_once * VOCABULARY))
    chunked = perplexity(model, data.batches(3)), kl_divergence(model, other, data.batches(3))
    assert chunked == pytest.approx(whole, rel=ROUNDING)


def test_a_model_is_left_as_it_was(data: Calibration) -> None:
    model = tiny_llama(0).train()
    model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    recorded = []
    model.register_forward_hook(lambda module, args, output: recorded.append(output.logits.requires_grad))
    perplexity(model, data.batches(2))
    assert recorded and not any(recorded)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(CalibrationError):
        perplexity(model, [])
    assert [module.training for module in model.modules()] == modes


def test_no_token_to_score(model: LlamaForCausalLM) -> None:
    with pytest.raises(CalibrationError, match="takes sequences of two tokens or more"):
        perplexity(model, Calibration(sequences_of(1, 1), "single tokens").batches(2))


def test_logits_that_overflow_are_named(data: Calibration) -> None:
    model = tiny_llama(0)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.inf
    with pytest.raises(QuailoraError, match=r"not finite: .* torch\.float32"):
        perplexity(model, data.batches(1))


def test_vocabularies_must_agree(model: LlamaForCausalLM, data: Calibration) -> None:
    larger = tiny_llama(0)
    larger.resize_token_embeddings(VOCABULARY + 4)
    with pytest.raises(MismatchError, match="164 and 160 tokens"):
        kl_divergence(larger, model, data.batches(1))


def test_gap_closed() -> None:
    assert gap_closed(10, 14, 11) == 0.75
    assert gap_closed(10, 14, 15) == -0.25
    assert gap_closed(10, 10, 9) is None
    assert gap_closed(10, 9.5, 9) is None


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    tiny_llama(0).save_pretrained(path)
    return path


def load_quantized(checkpoint: Path, config: BitsAndBytesConfig) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, quantization_config=config, device_map="cpu"
    )
    return model


@pytest.fixture(scope="module")
def adapter(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter that changes the model: both factors random."""
    path = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    get_peft_model(load_quantized(checkpoint, NF4), config).save_pretrained(str(path))
    return path


@pytest.mark.parametrize("config", [NF4, INT8], ids=["nf4", "int8"])
def test_compare_scores_what_users_load(
    config: BitsAndBytesConfig,
    checkpoint: Path,
    adapter: Path,
    data: Calibration,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    seen = []
    with caplog.at_level(logging.WARNING):
        result = compare(
            checkpoint,
            adapter,
            data,
            quantization=config,
            device="cpu",
            batch_size=2,
            progress=lambda *n: seen.append(n),
        )
    assert not caplog.records and not recwarn.list and capfd.readouterr() == ("", "")  # the libraries keep quiet
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert result.tokens == sum(len(sequence) - 1 for sequence in data.sequences)

    full, quantized = tiny_llama(0), load_quantized(checkpoint, config)
    assert result.full.perplexity == pytest.approx(perplexity(full, data.batches(2)))
    assert result.full.kl == 0
    assert result.quantized.perplexity == pytest.approx(perplexity(quantized, data.batches(2)))
    assert result.quantized.kl == pytest.approx(kl_divergence(quantized, full, data.batches(2)))
    assert result.adapted is not None
    adapted = PeftModel.from_pretrained(quantized, str(adapter))
    assert result.adapted.perplexity == pytest.approx(perplexity(adapted, data.batches(2)))
    assert result.adapted.kl == pytest.approx(kl_divergence(adapted, full, data.batches(2)))
    assert 0 < result.quantized.kl < result.adapted.kl  # a random adapter does harm


def test_compare_without_an_adapter(checkpoint: Path, data: Calibration) -> None:
    seen: list[tuple[int, int]] = []
    result = compare(checkpoint, None, data, quantization=NF4, device="cpu", progress=lambda *n: seen.append(n))
    assert result.adapted is None and result.gap_closed is None
    assert seen == [(1, 1)]  # sequences this short go into one batch
    assert result.quantized.kl > 0
    with pytest.raises(AdapterError, match=r"give quantization \(--quant\)"):
        compare(checkpoint, None, data)
    with pytest.raises(CalibrationError, match=r"batch_size \(--batch-size\) must be at least 1"):
        compare(checkpoint, None, data, quantization=NF4, batch_size=0)


def test_a_full_device_is_named_with_the_way_out(
    checkpoint: Path, data: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "load_model", mock.Mock(side_effect=torch.OutOfMemoryError("2.00 GiB")))
    with pytest.raises(QuailoraError, match=r"cpu is out of memory: .*--batch-size 1.*2\.00 GiB"):
        compare(checkpoint, None, data, quantization=NF4, device="cpu")


@pytest.mark.parametrize(
    ("source", "named", "others", "same"),
    [
        ("list (3 records)", False, False, True),
        ("wiki (train)", True, True, True),
        ("chats.jsonl (8 records)", True, True, True),
        ("wiki (test)", True, True, False),
        ("list (4 records)", False, True, False),
    ],
)
def test_scores_on_the_calibration_data_are_not_held_out(
    source: str, named: bool, others: bool, same: bool, data: Calibration
) -> None:
    """The same sequences, or others from the same file or data set; as many records in a list may be any."""
    made_with = {"source": "list (4 records)" if not named else "wiki (train)", "fingerprint": data.fingerprint()}
    record = {"calibration": made_with, "model_refinement": {"data": "chats.jsonl (8 records)"}}
    notes = evaluate._not_held_out(record, Calibration(data.sequences[others:], source, named=named))
    assert [source in note and "not held-out" in note for note in notes] == [True] * same
    scores = Scores("full precision", 10, 0)
    result = Comparison(scores, scores, None, 800, notes=notes)
    assert ("not held-out" in result.to_markdown()) == same
    assert result.to_dict()["notes"] == notes


def test_compare_refuses_what_does_not_belong_together(
    checkpoint: Path, adapter: Path, data: Calibration, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=r"no adapter_config\.json"):
        compare(checkpoint, checkpoint, data, quantization=NF4)

    other = tmp_path / "other"
    tiny_llama(1).save_pretrained(other)
    recorded = tmp_path / "adapter"
    recorded.mkdir()
    for file in adapter.iterdir():
        (recorded / file.name).write_bytes(file.read_bytes())
    source = Checkpoint(checkpoint)
    base = {"checkpoint": "x", "revision": None, "fingerprint": source.fingerprint, "dtype": "float32"}
    record: dict[str, Any] = {name: {} for name in ("calibration", "lora", "solver", "versions")}
    record["base"] = base | {"quantization": BitsAndBytes.from_config(NF4).to_dict()}
    (recorded / RECORD).write_text(to_json(record))

    assert compare(source, recorded, data, device="cpu") == compare(
        source, recorded, data, quantization=NF4, device="cpu"
    )
    with pytest.raises(MismatchError, match=r"LLM\.int8"):
        compare(source, recorded, data, quantization=INT8)
    with pytest.raises(MismatchError, match="was made for x"):
        compare(other, recorded, data)


def test_compare_refuses_an_adapter_of_another_shape(adapter: Path, data: Calibration, tmp_path: Path) -> None:
    config = tiny_llama(0).config
    config.intermediate_size = 192
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(MismatchError, match="does not fit LlamaForCausalLM"):
        compare(tmp_path, adapter, data, quantization=NF4, device="cpu")


@pytest.mark.skipif(not bnb.functional.has_avx512bf16(), reason="bitsandbytes repacks on CPUs with AVX512-BF16 alone")
def test_scoring_leaves_a_quantized_model_trainable_on_a_cpu(checkpoint: Path, data: Calibration) -> None:
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(load_quantized(checkpoint, NF4), config)
    perplexity(model, data.batches(2))
    layers: list[Any] = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert layers and all(layer.support_avx512bf16_for_cpu for layer in layers)
    assert not any(getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in layers)

    model.train()
    row = data.sequences[0][None]
    model(input_ids=row, labels=row).loss.backward()
    assert all(p.grad is not None and p.grad.any() for name, p in model.named_parameters() if ".lora_" in name)


def test_a_comparison_in_every_form(tmp_path: Path) -> None:
    result = Comparison(Scores("full precision", 10, 0), Scores("quantized", 14, 0.3), Scores("adapted", 11, 0.05), 800)
    assert result.gap_closed == 0.75
    assert replace(result, untrained=False).gap_closed is None  # what it has learned beside counts too then
    console = Console(record=True, width=80)
    console.print(result.table())
    for text in (console.export_text(), result.to_markdown()):
        assert [word in text for word in ("full precision", "14", "0.05", "800 predicted tokens", "75.0%")] == [
            True
        ] * 5
    result.save(tmp_path / "scores.json")
    saved = json.loads((tmp_path / "scores.json").read_text())
    assert saved["adapted"] == {"name": "adapted", "perplexity": 11, "kl": 0.05}
    assert saved["gap_closed"] == 0.75 and saved["tokens"] == 800
