"""QLoRA fine-tuning from an adapter that quailora made: gradients, TRL's SFTTrainer, and what is served afterwards."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, prepare_model_for_kbit_training
from peft.tuners.lora import LoraLayer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import quailora
import tiny
from quailora.quantized import is_quantized, read
from quailora.serving import read_config

LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
TEXTS = [" ".join(f"w{(start + 3 * step) % 100}" for step in range(20)) for start in range(16)]
TOKENS = torch.stack(tiny.sequences(4, longest=16)[:1]).expand(1, -1)


class Trained(NamedTuple):
    checkpoint: Path
    initial: Path
    adapter: Path
    model: PeftModel
    before: dict[str, Tensor]
    losses: list[float]


def write_tokenizer(folder: Path) -> None:
    """One token to a word, <eos> and <pad> where tiny's models have them."""
    words = ["<eos>", "<pad>", "<unk>", *(f"w{number}" for number in range(tiny.VOCABULARY - 3))]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    special = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def four_bit(dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def make_start(folder: Path, dtype: torch.dtype) -> tuple[Path, Path]:
    """A tiny checkpoint and the adapter that quailora makes for it."""
    checkpoint, adapter = tiny.checkpoint(folder / "model", dtype=dtype), folder / "initial"
    write_tokenizer(checkpoint)
    quailora.build_adapter(checkpoint, LORA, TEXTS, adapter, quantization=four_bit(dtype), progress=False)
    return checkpoint, adapter


def load(
    checkpoint: Path, adapter: Path, dtype: torch.dtype, prepare: Callable[[Any], Any] = lambda model: model
) -> PeftModel:
    """As users of transformers and PEFT do."""
    base = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=dtype, quantization_config=four_bit(dtype), device_map={"": "cpu"}
    )
    return PeftModel.from_pretrained(prepare(base), str(adapter), is_trainable=True)


class Dense(nn.Linear):
    """Multiplies with Q as a matrix, where bitsandbytes multiplies with it packed: input and output cast likewise."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def dequantize(model: nn.Module) -> None:
    """Turn a model into its twin without bitsandbytes, in place."""
    for name, module in list(model.named_modules()):
        if is_quantized(module):
            dense = Dense(module.in_features, module.out_features, bias=False)
            dense.weight = nn.Parameter(read(module).dequantize(), requires_grad=False)
            model.set_submodule(name, dense)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.train()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    return {name: parameter.grad.double() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("prepare", [lambda model: model, prepare_model_for_kbit_training], ids=["as loaded", "kbit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_those_of_the_dequantised_twin(
    tmp_path: Path, dtype: torch.dtype, prepare: Callable[[Any], Any]
) -> None:
    start = make_start(tmp_path, dtype)
    models = [load(*start, dtype, prepare) for _ in range(3)]
    for twin in models[1:]:
        dequantize(twin)
    models[2].double()
    found, of_twin, exact = map(gradients, models)

    assert found.keys() == exact.keys()
    assert sorted(found) == sorted(name for name, _ in models[0].named_parameters() if ".lora_" in name)
    for name, gradient in exact.items():
        error, of_rounding = (float((g[name] - gradient).norm() / gradient.norm()) for g in (found, of_twin))
        print(name, error, of_rounding)
