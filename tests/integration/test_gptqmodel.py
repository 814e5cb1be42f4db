"""Written GPTQ bases, loaded by transformers and gptqmodel, as a fine-tune does. Needs `gptqmodel` and `optimum`."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor
from transformers import AutoModelForCausalLM, GPTQConfig
from trl import SFTConfig, SFTTrainer

import quailora
from quailora.adapters.quantized_checkpoint import QuantizedCheckpoint
from quailora.errors import MismatchError
from quailora.modeling.checkpoint import Checkpoint
from quailora.modeling.streamed_model import StreamedModel
from quailora.quantization.registry import is_quantized, read
from quailora.quantization.verify import digest
from quailora.reporting.record import read_record
from tests.helpers import tiny
from tests.integration import test_training

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # minutes of compilation for tiny layers
pytest.importorskip("gptqmodel", reason="gptqmodel is not installed")
pytest.importorskip("optimum", reason="optimum is not installed")

IDS = torch.stack([torch.arange(2, 22), torch.arange(30, 50)])
# Of 4 bits with whole rows gptqmodel 7.7 computes something else on a CPU than its own dequantized weight.
CASES = [
    (2, True, 32),
    (2, False, 64),
    (3, True, 32),
    (3, False, 64),
    (3, True, -1),
    (4, True, 64),
    (4, False, 32),
    (8, True, 32),
    (8, False, 32),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("gptqmodel") / "model", dtype=torch.bfloat16)


def build(model: Path, folder: Path, bits: int, symmetric: bool = True, group: int = 32) -> None:
    quailora.build_adapter(
        model,
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        tiny.sequences(),
        folder / "start",
        quantization=GPTQConfig(bits=bits, group_size=group, sym=symmetric, desc_act=False),
        base_output=folder / "base",
        device="cpu",
        progress=False,
    )


def load(folder: Path, bits: int, dtype: torch.dtype = torch.bfloat16) -> Any:
    config = GPTQConfig(bits=bits, backend="auto_trainable")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config, device_map="cpu")


def dense(model: Path, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The full-precision model with the Q that quailora reads."""
    record = read_record(folder / "start")
    assert record is not None
    written = QuantizedCheckpoint.recorded(record["base"])
    assert written is not None
    found: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    stream = StreamedModel(Checkpoint(model), torch.device("cpu"), torch.bfloat16)
    for name in written.names:
        found.get_submodule(name).weight.data = written.weight(name, stream).dequantize().to(dtype)
    return found


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(IDS).logits.float()
    return found


@pytest.mark.parametrize("bits, symmetric, group", CASES)
def test_the_loaded_base_computes_with_our_q(
    bits: int, symmetric: bool, group: int, model: Path, tmp_path: Path
) -> None:
    build(model, tmp_path, bits, symmetric, group)
    loaded = load(tmp_path / "base", bits)
    record = read_record(tmp_path / "start")
    assert record is not None
    held = {name: module for name, module in loaded.named_modules() if is_quantized(module)}
    assert held.keys() == record["base"]["digests"].keys()
    for name, module in held.items():
        q = read(module)
        assert torch.equal(q.dequantize(), module.dequantize_weight().T)  # what its forward pass multiplies with
        assert digest(q) == record["base"]["digests"][name]
    expected = logits(dense(model, tmp_path))
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=2e-2 * expected.abs().max().item())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gradients_are_those_of_dense_q(bits: int, model: Path, tmp_path: Path) -> None:
    build(model, tmp_path, bits)

    def gradients(base: Any) -> dict[str, Tensor]:
        adapted = PeftModel.from_pretrained(base, tmp_path / "start", is_trainable=True)
        adapted.train()
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        return {name: p.grad.float() for name, p in adapted.named_parameters() if p.grad is not None}

    found = gradients(load(tmp_path / "base", bits))
    expected = gradients(dense(model, tmp_path))
    assert found.keys() == expected.keys() and len(found) == 28
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= 0.03 * expected[name].norm(), name  # two computations in bf16


def test_the_adapter_alone_loads_its_base(model: Path, tmp_path: Path) -> None:
    build(model, tmp_path, 4)
    config = GPTQConfig(bits=4, backend="auto_trainable")
    adapted = AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / "start", dtype=torch.bfloat16, quantization_config=config, device_map="cpu"
    )
    quailora.check_base(adapted, tmp_path / "start")
    other = tmp_path / "other"
    build(model, other, 3)
    with pytest.raises(MismatchError, match="bits 4 against 3"):
        quailora.check_base(load(other / "base", 3), tmp_path / "start")


def test_an_existing_gptq_base_is_initialized(model: Path, tmp_path: Path) -> None:
    build(model, tmp_path, 3)
    base = prepare_model_for_kbit_training(load(tmp_path / "base", 3), use_gradient_checkpointing=False)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    report = quailora.initialize(adapted, tiny.sequences(), checkpoint=model, device="cpu", progress=False)
    assert len(report.layers) == 4 and report.error_left < 0.9
    assert report.record["base"]["rounding"] == "calibrated"


def test_it_trains_with_trl(tmp_path: Path) -> None:
    checkpoint = tiny.checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    test_training.tokenizer().save_pretrained(checkpoint)
    build(checkpoint, tmp_path, 3)
    adapted = PeftModel.from_pretrained(load(tmp_path / "base", 3), tmp_path / "start", is_trainable=True)
    arguments = SFTConfig(
        output_dir=str(tmp_path / "trained"),
        max_steps=10,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    data = Dataset.from_dict({"text": test_training.TEXTS})
    trainer = SFTTrainer(model=adapted, args=arguments, train_dataset=data, processing_class=test_training.tokenizer())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
