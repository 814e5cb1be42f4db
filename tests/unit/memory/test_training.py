"""What a fine-tune holds: against the tensors of real ones, and for Llama-2 by hand."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from typer.testing import CliRunner

from quailora.cli.app import app
from quailora.errors import QuailoraError
from quailora.memory.sizes import block_sizes
from quailora.memory.training import backward_row, training_memory
from quailora.quantization.gptq import GPTQ, GPTQWeight
from tests.helpers import tiny
from tests.helpers.footprint import Footprint
from tests.unit.memory.test_planner import streamed, targets_of, write_headers

LLAMA_7B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
LLAMA_70B: dict[str, Any] = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}


def plan(folder: Path, *options: str) -> list[dict[str, Any]]:
    run = CliRunner().invoke(app, ["plan", str(folder), "--training", "--json", *options])
    assert run.exit_code == 0, run.output
    found: list[dict[str, Any]] = json.loads(run.stdout)
    return found


# ---- real tensors


@pytest.mark.parametrize("kind", ["nf4", "nf4 without double quantization", "int8"])
def test_a_base_of_bitsandbytes_is_what_transformers_loads(kind: str, tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path, dtype=torch.bfloat16, hidden_size=128, intermediate_size=320)
    double = kind == "nf4"
    quantization = BitsAndBytesConfig(
        load_in_8bit=kind == "int8",
        load_in_4bit=kind != "int8",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=quantization, device_map="cpu"
    )
    held = sum(parameter.nbytes for parameter in loaded.parameters())
    for parameter in loaded.parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            tensors = [state.absmax, state.code]
            tensors += [state.offset, state.state2.absmax, state.state2.code] if double else []
            held += sum(tensor.nbytes for tensor in tensors)
        elif (absmax := getattr(parameter, "SCB", None)) is not None:
            held += absmax.nbytes
    rows = plan(folder, "--rank", "4", *([] if double else ["--no-double-quant"]))
    assert {row["base"] for row in rows if row["bits"] == (8 if kind == "int8" else 4)} == {held}


@pytest.mark.parametrize("group", [32, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_linear_of_gptq_is_what_its_checkpoint_has(bits: int, group: int) -> None:
    base, (m, n) = GPTQ(bits, group), (64, 96)
    groups = 1 if group == -1 else n // group
    codes, zeros = torch.zeros(m, n, dtype=torch.uint8), torch.ones(m, groups, dtype=torch.uint8)
    weight = GPTQWeight(codes, torch.ones(m, groups, dtype=torch.float16), zeros, bits, torch.bfloat16)
    assert base.loaded(m, n) == sum(tensor.nbytes for tensor in base.tensors(weight, torch.bfloat16).values())


def test_the_adapter_and_its_optimizer_are_what_training_holds(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path)
    model: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder),
        LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    model(input_ids=torch.arange(2, 22)[None], labels=torch.arange(2, 22)[None]).loss.backward()
    optimizer.step()
    moments = [t for state in optimizer.state.values() for t in state.values() if t.dim() > 0]  # others count steps
    for row in plan(folder, "--rank", "4", "--target-modules", "q_proj,down_proj", "--group-size", "32"):
        assert row["adapter"] == sum(parameter.nbytes for parameter in trained)
        assert row["gradients"] == sum(parameter.grad.nbytes for parameter in trained)
        assert row["optimizer"] == sum(moment.nbytes for moment in moments)


def fake_adapter(vocabulary: int, tokens: int, shape: dict[str, Any]) -> PeftModel:
    """A Llama with an adapter, ready to be trained, whose tensors have no memory."""
    config = AutoConfig.for_model("llama", vocab_size=vocabulary, tie_word_embeddings=False, use_cache=False, **shape)
    with torch.device("meta"):
        plain: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        lora = LoraConfig(r=64, target_modules="all-linear", task_type="CAUSAL_LM")
        model: Any = get_peft_model(plain, lora, low_cpu_mem_usage=True)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            trained = parameter.requires_grad
            made = torch.empty(parameter.shape, dtype=torch.float32 if trained else parameter.dtype)
            setattr(module, name, nn.Parameter(made, requires_grad=trained))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    found: PeftModel = model.train()
    return found


@pytest.mark.parametrize(
    ("vocabulary", "shape"), [(32000, LLAMA_7B), (512, LLAMA_7B), (512, LLAMA_70B)], ids=["logits", "7B", "70B"]
)
def test_activations_of_a_training_step(vocabulary: int, shape: dict[str, Any], tmp_path: Path) -> None:
    """Every tensor that a forward and a backward pass make, of four blocks in their true sizes."""
    shape = shape | {"num_hidden_layers": 4}
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = fake_adapter(vocabulary, 2048, shape)
        ids = torch.zeros(1, 2048, dtype=torch.long)
        with Footprint() as footprint:
            model(input_ids=ids, labels=ids).loss.backward()
    stream = streamed(write_headers(tmp_path, vocab_size=vocabulary, **shape))
    found = training_memory(
        stream, block_sizes(stream, {}), None, (), targets_of(stream), batch_size=1, sequence_length=2048
    )
    seen = footprint.peak - found.gradients  # they are made in the backward pass
    assert seen <= found.activations < 1.3 * seen


# ---- by hand


def arithmetic(row: dict[str, Any], shape: dict[str, Any], linears: float, base: float, dequantized: float) -> None:
    """One row of a plan in bf16 with rank 64 and 2048 tokens. linears: the weights of a block's; base: their bytes."""
    d, ffn, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    key_value = d * shape["num_key_value_heads"] // shape["num_attention_heads"]
    rest = 2 * (2 * 32000 * d + (2 * layers + 1) * d)  # embeddings and head, norms
    assert row["base"] == pytest.approx(layers * base + rest, rel=1e-4)
    factors = layers * 64 * (2 * 2 * d + 2 * (d + key_value) + 3 * (d + ffn))
    assert row["adapter"] == row["gradients"] == 4 * factors and row["optimizer"] == 8 * factors
    states = 2048 * layers * d * 2
    # Of a block: inputs (6 d + ffn) in bf16 and fp32, outputs (3 d + 2 kv + 2 ffn), x A; norms; the widest in fp32.
    kept = 6 * (6 * d + ffn) + 2 * (3 * d + 2 * key_value + 2 * ffn) + 4 * 7 * 64 + 16 * d + 4 * (d + ffn)
    block = 2048 * (kept + 4 * shape["num_attention_heads"]) + dequantized
    assert row["activations"] == states + max(block, 2048 * 32000 * 12)
    parts = ("base", "adapter", "gradients", "optimizer", "activations")
    assert row["total"] == sum(row[part] for part in parts)


@pytest.mark.parametrize(("shape", "kv", "weights"), [(LLAMA_7B, 4096, 6.74e9), (LLAMA_70B, 1024, 68.98e9)])
def test_llama_2(shape: dict[str, Any], kv: int, weights: float, tmp_path: Path) -> None:
    folder = write_headers(tmp_path, vocab_size=32000, max_position_embeddings=4096, **shape)
    d, ffn = shape["hidden_size"], shape["intermediate_size"]
    m = 2 * d * d + 2 * d * kv + 3 * d * ffn  # weights of a block's linears
    rows = {row["bits"]: row for row in plan(folder)}
    assert list(rows) == [16, 8, 4, 3, 2]
    assert rows[16]["base"] == pytest.approx(2 * weights, rel=1e-3)  # as published: 6.74 and 68.98 billion
    largest = 2 * d * ffn
    arithmetic(rows[16], shape, m, 2 * m, 0)
    arithmetic(rows[8], shape, m, m + 4 * (2 * d + 2 * kv + 2 * ffn + d), largest)
    # 8 bits of absmax for 64 weights, with 4 bytes for each 256 of them; tables of 16 and 256 numbers, and an offset.
    arithmetic(rows[4], shape, m, m * (1 / 2 + 1 / 64 + 4 / 64 / 256) + 7 * 4 * 273, largest)
    for bits in (3, 2):  # scales and zeros for each 64 weights, an index for each input
        each = m * (bits / 8 + (2 + bits / 8) / 64) + 4 * (6 * d + ffn)
        arithmetic(rows[bits], shape, m, each, 2 * m)  # autograd keeps a block's Q


def test_experts_and_the_scores_of_plain_attention_count() -> None:
    linears = {"q": (64, 64)}
    config: Any = type("Config", (), {"num_attention_heads": 4, "hidden_size": 64, "_attn_implementation": "sdpa"})
    sizes: Any = type("Sizes", (), {"experts": 0, "scan": 0})
    row = partial(backward_row, linears, {}, sizes, config, 2, 100)
    fused, scores = row("cuda"), 4 * (8 * 100 - 4)
    config._attn_implementation = "eager"
    assert row("cuda") - fused == scores
    sizes.experts = 10
    assert row("cuda") - fused == scores + 60
    config._attn_implementation, config.qk_nope_head_dim = "sdpa", 32  # as in DeepSeek: no fused kernel on a CPU
    assert [row(device) - fused - 60 for device in ("cuda", "cpu")] == [0, scores]


# ---- the command


def test_the_table_says_what_fits_and_what_is_counted(tmp_path: Path) -> None:
    folder = write_headers(
        tmp_path, vocab_size=512, hidden_size=1024, intermediate_size=4096, num_hidden_layers=8,
        num_attention_heads=16, num_key_value_heads=4, max_position_embeddings=1024,
    )  # fmt: skip
    totals = [row["total"] for row in plan(folder, "--batch-size", "2", "--rank", "8")]
    options = ["--batch-size", "2", "--rank", "8", "--memory-budget", str(totals[2])]
    run = CliRunner().invoke(app, ["plan", str(folder), "--training", *options])
    assert run.exit_code == 0, run.output
    lines = [line.split() for line in run.stdout.splitlines()]
    cells = {line[0]: (line[1], line[-1]) for line in lines if len(line) == 9 and line[0].isdigit()}
    fits = ["yes" if total <= totals[2] else "no" for total in totals]
    assert fits[0] == "no" and fits[2] == fits[-1] == "yes"
    formats = ("bfloat16", "LLM.int8", "NF4", "int3", "int2")
    assert cells == dict(zip(["16", "8", "4", "3", "2"], zip(formats, fits, strict=True), strict=True))
    text = " ".join(run.stdout.split())
    assert "on the device" in text and "2 x 1024 tokens" in text and "8 bytes a parameter" in text


def test_a_format_that_does_not_hold_the_model_is_named(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path, "gpt2")
    run = CliRunner().invoke(app, ["plan", str(folder), "--training", "--rank", "4", "--sequence-length", "32"])
    assert run.exit_code == 0, run.output
    notes = [line for line in run.stdout.splitlines() if " bits: " in line]
    assert len(notes) == 2 and all("can be quantized so" in note for note in notes)
    assert "NF4" in run.stdout and "int3" not in run.stdout.split("LoRA of")[0]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_fused_experts_are_no_linears(family: str, tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path, family)
    run = CliRunner().invoke(app, ["plan", str(folder), "--training", "--rank", "4", "--sequence-length", "32"])
    assert run.exit_code == 0, run.output
    assert "int3" in run.stdout


def test_linears_that_a_format_does_not_hold_count_in_full(tmp_path: Path) -> None:
    """k_proj and v_proj, of 16 outputs, in GPTQ's format."""
    folder = tiny.checkpoint(tmp_path, "qwen2", dtype=torch.bfloat16, num_key_value_heads=1)
    full = load_file(folder / "model.safetensors")
    linears = {name: tensor for name, tensor in full.items() if "proj.weight" in name}
    narrow = [tensor for tensor in linears.values() if tensor.shape[0] == 16]
    assert len(narrow) == 4
    held = sum(tensor.nbytes for tensor in full.values())
    for tensor in linears.values():
        if tensor.shape[0] != 16:
            held += GPTQ(3, 32).loaded(*tensor.shape) - tensor.nbytes
    rows = plan(folder, "--rank", "4", "--group-size", "32")
    assert [row["base"] for row in rows if row["bits"] == 3] == [held]


def test_bad_input(tmp_path: Path) -> None:
    folder = str(tiny.checkpoint(tmp_path))

    def fails(*options: str) -> str:
        run = CliRunner().invoke(app, ["plan", folder, "--training", *options])
        assert isinstance(run.exception, QuailoraError), run.output
        return str(run.exception)

    assert "--quant is not for --training" in fails("--quant", "nf4")
    assert "--host-memory-budget is not for" in fails("--host-memory-budget", "1GiB")
    assert "nearest: q_proj" in fails("--target-modules", "q_prj", "--rank", "4")
    assert "lower r (--rank)" in fails("--rank", "1000")
