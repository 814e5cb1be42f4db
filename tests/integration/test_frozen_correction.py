"""The initialized adapter frozen, and another trained on top by TRL: what is trained and saved, and every use of it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

import quailora
from quailora.adapters.correction import FILE, Correction
from quailora.calibration.data import Calibration
from quailora.errors import AdapterError, MismatchError, QuailoraError
from quailora.evaluate import compare
from tests.integration.test_training import TEXTS, Start, four_bit, load, make_start, text_tokens, tokenizer

WEIGHTS = "adapter_model.safetensors"


class Tuned(NamedTuple):
    start: Start
    adapter: Path  # trained over start.adapter
    logits: Tensor  # of both on their base, as loaded from disk
    in_memory: Tensor  # after training, where TRL had cast the frozen factors to bf16


def base_of(start: Start) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        start.checkpoint, dtype=torch.float32, quantization_config=four_bit(torch.float32), device_map={"": "cpu"}
    )


def logits_of(model: nn.Module) -> Tensor:
    """In training mode, without dropout: where bitsandbytes on a CPU multiplies with Q itself."""
    model.train()
    with torch.no_grad():
        return model(input_ids=text_tokens()).logits


def trainer_of(model: PeftModel, output: Path, steps: int) -> SFTTrainer:
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            str(output),
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            use_cpu=True,
            bf16=False,
            save_steps=2,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer(),
    )
    for parameter in model.parameters():
        if parameter.requires_grad:  # TRL cast them to bf16
            parameter.data = parameter.data.float()
    return trainer


def reloaded(start: Start, adapter: Path) -> Tensor:
    return logits_of(quailora.freeze_correction(base_of(start), start.adapter, adapter))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    folder = tmp_path_factory.mktemp("frozen")
    start = make_start(folder, torch.float32)
    model = quailora.freeze_correction(base_of(start), start.adapter)
    trainer = trainer_of(model, folder / "trained", steps=4)
    trainer.train()
    trainer.save_model()
    return Tuned(start, folder / "trained", reloaded(start, folder / "trained"), logits_of(model))


def test_it_starts_where_the_correction_does_and_trains_the_other_alone(tuned: Tuned) -> None:
    model = quailora.freeze_correction(base_of(tuned.start), tuned.start.adapter)
    torch.testing.assert_close(logits_of(model), logits_of(load(tuned.start, torch.float32)), rtol=0, atol=0)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(".default." in name for name in trained)
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha) == (8, 16)


def test_the_trained_adapter_is_saved_alone_and_names_the_other(tuned: Tuned) -> None:
    assert not (tuned.adapter / "correction").exists()
    assert Correction.read(tuned.adapter) == Correction.of(tuned.start.adapter)
    assert (tuned.adapter / "checkpoint-2" / FILE).is_file()
    tensors = load_file(tuned.adapter / WEIGHTS)
    assert any(float(value.abs().max()) > 0 for name, value in tensors.items() if ".lora_B." in name)


def test_training_resumes_to_the_same_bits(tuned: Tuned, tmp_path: Path) -> None:
    model = quailora.freeze_correction(base_of(tuned.start), tuned.start.adapter)
    trainer_of(model, tmp_path / "again", steps=4).train(resume_from_checkpoint=str(tuned.adapter / "checkpoint-2"))
    model.save_pretrained(tmp_path / "again")
    first, again = load_file(tuned.adapter / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(logits_of(model), tuned.in_memory)


def test_it_is_loaded_again_over_its_correction(tuned: Tuned) -> None:
    model = quailora.freeze_correction(base_of(tuned.start), tuned.start.adapter, tuned.adapter)
    assert any(parameter.requires_grad for parameter in model.parameters())
    # The frozen factors were rounded to 8 bits in memory, and what they add to the logits is small.
    torch.testing.assert_close(logits_of(model), tuned.in_memory, rtol=1e-2, atol=1e-2)
    alone = PeftModel.from_pretrained(base_of(tuned.start), str(tuned.adapter))
    assert (logits_of(alone) - tuned.logits).norm() > 10 * (tuned.in_memory - tuned.logits).norm()


def test_merge_and_eval_add_both(tuned: Tuned, tmp_path: Path) -> None:
    quailora.merge(tuned.start.checkpoint, tuned.adapter, tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    # Sums in another order, in fp32; logits are of order 1.
    torch.testing.assert_close(logits_of(dense), tuned.logits, rtol=1e-4, atol=1e-4)
    data = Calibration(tuple(text_tokens()), "the training text")
    found = compare(tuned.start.checkpoint, tuned.adapter, data, device="cpu")
    assert found.adapted is not None
    assert found.adapted.name == "NF4 + adapter"
    assert found.adapted.perplexity == pytest.approx(quailora.evaluate.perplexity(dense, [text_tokens()]), rel=1e-3)


def test_convert_gives_the_trained_adapter_bit_for_bit(tuned: Tuned, tmp_path: Path) -> None:
    quailora.convert(tuned.start.adapter, tuned.adapter, tmp_path / "task")
    before, after = load_file(tuned.adapter / WEIGHTS), load_file(tmp_path / "task" / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "task" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tuned.start.checkpoint)
    with pytest.raises(AdapterError, match="converted for the full-precision weights"):
        quailora.merge(tuned.start.checkpoint, tmp_path / "task", tmp_path / "never")


def test_combined_it_is_one_adapter_for_the_base(tuned: Tuned, tmp_path: Path) -> None:
    quailora.convert(tuned.start.adapter, tuned.adapter, tmp_path / "both", combine=True)
    model = PeftModel.from_pretrained(base_of(tuned.start), str(tmp_path / "both"))
    assert model.peft_config["default"].r == 16
    torch.testing.assert_close(logits_of(model), tuned.logits, rtol=1e-4, atol=1e-4)
    quailora.check_base(model, tmp_path / "both")
    data = Calibration(tuple(text_tokens()), "the training text")
    found = compare(tuned.start.checkpoint, tmp_path / "both", data, device="cpu")
    assert found.adapted is not None
    assert found.adapted.name == "NF4 + adapter"


def test_another_task_trains_fewer_modules_over_the_same_correction(tuned: Tuned, tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = quailora.freeze_correction(base_of(tuned.start), tuned.start.adapter, config)
    trainer_of(model, tmp_path / "other", steps=2).train()
    model.save_pretrained(tmp_path / "other")
    expected = reloaded(tuned.start, tmp_path / "other")
    quailora.merge(tuned.start.checkpoint, tmp_path / "other", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    torch.testing.assert_close(logits_of(dense), expected, rtol=1e-4, atol=1e-4)
    quailora.convert(tuned.start.adapter, tmp_path / "other", tmp_path / "both", combine=True)
    both = PeftModel.from_pretrained(base_of(tuned.start), str(tmp_path / "both"))
    torch.testing.assert_close(logits_of(both), expected, rtol=1e-4, atol=1e-4)


def test_a_correction_that_moved_is_given_as_initial(tuned: Tuned, tmp_path: Path) -> None:
    shutil.copytree(tuned.adapter, moved := tmp_path / "trained")
    shutil.copytree(tuned.start.adapter, tmp_path / "correction")
    (moved / FILE).write_text(Correction("nowhere", Correction.of(tuned.start.adapter).digest).to_json())
    with pytest.raises(AdapterError, match=r"nowhere has no .* \(--initial\)"):
        quailora.merge(tuned.start.checkpoint, moved, tmp_path / "never")
    quailora.merge(tuned.start.checkpoint, moved, tmp_path / "dense", initial=tmp_path / "correction")
    (tmp_path / "correction" / WEIGHTS).write_bytes((tuned.adapter / WEIGHTS).read_bytes())
    with pytest.raises(MismatchError, match="is not the adapter that was frozen"):
        quailora.merge(tuned.start.checkpoint, moved, tmp_path / "never", initial=tmp_path / "correction")
    with pytest.raises(MismatchError, match="is not the adapter that was frozen"):
        quailora.freeze_correction(base_of(tuned.start), tuned.start.adapter, other_correction(moved, tuned))


def other_correction(adapter: Path, tuned: Tuned) -> Path:
    (adapter / FILE).write_text(Correction(str(tuned.start.adapter), "0" * 64).to_json())
    return adapter


def test_a_correction_that_training_changed_is_saved_and_convert_says_so(tuned: Tuned, tmp_path: Path) -> None:
    model = quailora.freeze_correction(base_of(tuned.start), tuned.start.adapter)
    model.base_model.set_adapter(["default", "correction"])  # what a trainer should not do: both get gradients
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".correction." in name:
                parameter.mul_(1.5)
    with pytest.warns(UserWarning, match="training changed it"):
        model.save_pretrained(tmp_path / "trained")
    quailora.merge(tuned.start.checkpoint, tmp_path / "trained", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    torch.testing.assert_close(logits_of(dense), logits_of(model), rtol=1e-4, atol=1e-4)
    for initial in (tuned.start.adapter, tmp_path / "trained" / "correction"):
        with pytest.raises(AdapterError, match="was changed by training"):
            quailora.convert(initial, tmp_path / "trained", tmp_path / "task")
    quailora.merge(tuned.start.checkpoint, tmp_path / "trained", tmp_path / "again", initial=tuned.start.adapter)
    again, dense = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("again", "dense"))
    assert again == dense


def test_what_cannot_be_frozen(tuned: Tuned, tmp_path: Path) -> None:
    start = tuned.start
    with pytest.raises(AdapterError, match="has an adapter already"):
        quailora.freeze_correction(load(start, torch.float32), start.adapter)
    with pytest.raises(AdapterError, match="was not trained over a frozen adapter"):
        quailora.freeze_correction(base_of(start), start.adapter, start.adapter)
    with pytest.raises(AdapterError, match=r"nothing to combine \(--combine\)"):
        quailora.convert(start.adapter, start.adapter, tmp_path / "both", combine=True)
    with pytest.raises(AdapterError, match=r"leave out rank \(--rank\)"):
        quailora.convert(start.adapter, tuned.adapter, tmp_path / "task", rank=4)
    full = AutoModelForCausalLM.from_pretrained(start.checkpoint)
    with pytest.raises(MismatchError):
        quailora.freeze_correction(full, start.adapter)
    with pytest.raises(AdapterError, match="was itself trained over a frozen adapter"):
        quailora.freeze_correction(base_of(start), tuned.adapter)
    with pytest.raises(AdapterError, match="nowhere does not exist"):
        quailora.freeze_correction(base_of(start), start.adapter, "nowhere")
    with pytest.raises(AdapterError, match="adapter is a dict"):
        quailora.freeze_correction(base_of(start), start.adapter, {})  # type: ignore[arg-type]
    for setting, value in (("lora_bias", True), ("target_parameters", ["w"]), ("init_lora_weights", False)):
        config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **{setting: value})  # type: ignore[arg-type]
        with pytest.raises(AdapterError, match=setting):
            quailora.freeze_correction(base_of(start), start.adapter, config)
    with pytest.raises(AdapterError, match="PEFT refuses"):
        quailora.freeze_correction(base_of(start), start.adapter, LoraConfig(target_modules=["no_such"]))
    model = quailora.freeze_correction(base_of(start), start.adapter)
    before = (start.adapter / WEIGHTS).read_bytes()
    with pytest.raises(AdapterError, match="saving would overwrite"):
        model.save_pretrained(start.adapter)
    assert (start.adapter / WEIGHTS).read_bytes() == before
    shutil.copytree(start.adapter, saving := tmp_path / "saving")
    config = json.loads((saving / "adapter_config.json").read_text())
    (saving / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": ["lm_head"]}))
    with pytest.raises(AdapterError, match=r"modules to save \(lm_head\)"):
        quailora.freeze_correction(base_of(start), saving)


def test_the_correction_stays_active_and_frozen_whatever_switches_adapters(tuned: Tuned) -> None:
    model = quailora.freeze_correction(base_of(tuned.start), tuned.start.adapter, tuned.adapter)
    expected = logits_of(model)
    model.set_adapter("default")  # as TRL's preference trainers do
    with model.disable_adapter():
        assert not torch.equal(logits_of(model), expected)
    assert model.active_adapters == ["default", "correction"]
    assert torch.equal(logits_of(model), expected)
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".default." not in name)


def test_an_adapter_of_fewer_modules_leaves_the_correction_whole(tuned: Tuned, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules="all-linear", exclude_modules=["down_proj"], task_type="CAUSAL_LM")
    model = quailora.freeze_correction(base_of(tuned.start), tuned.start.adapter, config)
    model.save_pretrained(tmp_path / "some", True)
    quailora.convert(tuned.start.adapter, tmp_path / "some", tmp_path / "both", combine=True)
    both = PeftModel.from_pretrained(base_of(tuned.start), str(tmp_path / "both"))
    torch.testing.assert_close(logits_of(both), logits_of(model), rtol=1e-4, atol=1e-4)
    again = quailora.freeze_correction(base_of(tuned.start), tmp_path / "both")  # one adapter, which can be frozen too
    torch.testing.assert_close(logits_of(again), logits_of(model), rtol=1e-4, atol=1e-4)


def test_the_checkpoint_is_named_where_the_model_does_not(tuned: Tuned) -> None:
    model = base_of(tuned.start)
    model.name_or_path = "elsewhere"
    with pytest.raises(QuailoraError, match="elsewhere"):
        quailora.freeze_correction(model, tuned.start.adapter)
    assert quailora.freeze_correction(model, tuned.start.adapter, checkpoint=tuned.start.checkpoint).active_adapters


def test_embeddings_of_another_size_are_saved(tuned: Tuned, tmp_path: Path) -> None:
    base = base_of(tuned.start)
    base.resize_token_embeddings(160, mean_resizing=False)
    quailora.freeze_correction(base, tuned.start.adapter).save_pretrained(tmp_path / "wider")
    assert load_file(tmp_path / "wider" / WEIGHTS)["base_model.model.model.embed_tokens.weight"].shape[0] == 160
    quailora.merge(tuned.start.checkpoint, tmp_path / "wider", tmp_path / "dense")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "dense").config.vocab_size == 160


@pytest.mark.slow
def test_two_processes_train_it(tuned: Tuned, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(f"""
from pathlib import Path
import quailora
from tests.integration.test_frozen_correction import Start, base_of, trainer_of

start = Start(Path({str(tuned.start.checkpoint)!r}), Path({str(tuned.start.adapter)!r}))
trainer = trainer_of(quailora.freeze_correction(base_of(start), start.adapter), Path({str(tmp_path / "trained")!r}), 4)
trainer.train()
trainer.save_model()
""")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, cwd=tmp_path, env=environment, capture_output=True, timeout=500)
    assert Correction.read(tmp_path / "trained") == Correction.of(tuned.start.adapter)
    model = quailora.freeze_correction(base_of(tuned.start), tuned.start.adapter, tmp_path / "trained")
    assert not torch.equal(logits_of(model), logits_of(load(tuned.start, torch.float32)))
