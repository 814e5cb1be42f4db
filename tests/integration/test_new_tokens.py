"""Tokens added to the vocabulary: from initialization to a merged checkpoint."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

import quailora
from quailora.calibration.data import Calibration
from quailora.errors import CalibrationError
from quailora.evaluate import compare
from quailora.quantization.registry import evaluating
from tests.helpers import tiny
from tests.integration.test_pipeline import products

NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
ROWS = tiny.VOCABULARY + 8


def load_base(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=NF4, device_map={"": "cpu"}, dtype=torch.float32
    )


def with_new_tokens() -> tuple[Tensor, ...]:
    return tuple(torch.cat([ids, torch.arange(tiny.VOCABULARY, ROWS)]) for ids in tiny.sequences())


embeddings = pytest.mark.parametrize(
    ("saved", "tied"),
    [(None, True), (None, False), (["embed_tokens", "lm_head"], False)],
    ids=["plain, tied", "plain", "modules_to_save"],
)


def train_a_little(model: PeftModel) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 if "lora_B" in name else 0.1 * torch.randn_like(parameter))


@embeddings
def test_new_tokens_from_initialization_to_merge_and_eval(tmp_path: Path, saved: list[str] | None, tied: bool) -> None:
    source = tiny.checkpoint(tmp_path / "model", tie_word_embeddings=tied)
    base = load_base(source)
    base.resize_token_embeddings(ROWS)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", modules_to_save=saved))
    report = quailora.initialize(model, with_new_tokens(), checkpoint=source, progress=False)
    train_a_little(model)
    adapter = tmp_path / "adapter"
    model.save_pretrained(adapter)
    report.save(adapter)

    quailora.merge(source, adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.vocab_size == ROWS
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    ids = with_new_tokens()[0][None]
    with evaluating([*model.modules()]), torch.no_grad():
        got, expected = merged(ids).logits, model(ids).logits
    assert (got - expected).norm() < 1e-5 * expected.norm()  # fp32 sums in another order

    scores = compare(source, adapter, Calibration(tiny.sequences(), "held out"), device="cpu")
    assert scores.adapted is not None and scores.adapted.kl > 0
    with pytest.raises(CalibrationError, match="token id"):
        compare(source, adapter, Calibration(with_new_tokens(), "held out"), device="cpu")


@embeddings
def test_what_is_learned_with_new_tokens_converts(tmp_path: Path, saved: list[str] | None, tied: bool) -> None:
    source = tiny.checkpoint(tmp_path / "model", tie_word_embeddings=tied)
    base = load_base(source)
    base.resize_token_embeddings(ROWS)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", modules_to_save=saved))
    report = quailora.initialize(model, with_new_tokens(), checkpoint=source, progress=False)
    model.save_pretrained(tmp_path / "initial")
    report.save(tmp_path / "initial")
    started = products(model)
    train_a_little(model)
    model.save_pretrained(tmp_path / "trained")

    quailora.convert(tmp_path / "initial", tmp_path / "trained", tmp_path / "converted")
    full = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    full.resize_token_embeddings(ROWS)
    converted = PeftModel.from_pretrained(full, str(tmp_path / "converted")).eval()
    trained, learned = products(model), products(converted)
    for name, product in learned.items():
        expected = trained[name] - started[name]
        assert torch.allclose(product, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max())), name
    for side in ("get_input_embeddings", "get_output_embeddings"):
        ours, theirs = (getattr(each.get_base_model(), side)().weight for each in (converted, model))
        assert torch.equal(ours, theirs), side

    held_out = Calibration(tiny.sequences(), "held out")
    scores = compare(source, tmp_path / "converted", held_out, device="cpu")
    assert scores.adapted is not None and scores.adapted.name == "full precision + adapter"
    with torch.no_grad():
        logits = [converted(ids[None]).logits[0, :-1, : tiny.VOCABULARY].log_softmax(-1) for ids in held_out.sequences]
    losses = [-rows.gather(1, ids[1:, None]) for rows, ids in zip(logits, held_out.sequences, strict=True)]
    assert scores.adapted.perplexity == pytest.approx(torch.cat(losses).mean().exp().item(), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])  # Gemma scales what it looks up
def test_new_tokens_weigh_in_as_if_the_checkpoint_had_them(family: str, tmp_path: Path) -> None:
    full = tiny.model(family)
    full.save_pretrained(tmp_path / "model")
    full.resize_token_embeddings(ROWS)
    with torch.no_grad():
        full.get_input_embeddings().weight[tiny.VOCABULARY :] = torch.randn(8, 64)
    full.save_pretrained(tmp_path / "resized")

    found = []
    for checkpoint in ("model", "resized"):
        base = load_base(tmp_path / "resized")
        model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
        quailora.initialize(model, with_new_tokens(), checkpoint=tmp_path / checkpoint, progress=False)
        found.append({name: value for name, value in model.state_dict().items() if "lora_" in name})
    torch.testing.assert_close(*found, rtol=0, atol=0)
