"""A GPTQ base exported in compressed-tensors' form, and loaded by transformers and compressed-tensors."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPTQConfig
from typer.testing import CliRunner

import quailora
from quailora.adapters.quantized_checkpoint import QuantizedCheckpoint
from quailora.cli.app import app
from quailora.errors import AdapterError, CheckpointError, MismatchError, QuailoraError
from quailora.quantization.gptq import unpack
from quailora.reporting.record import read_record
from tests.helpers import tiny

# bits, symmetric, group size, dtype, model: qwen2's linears have biases, and those of one key head are too narrow to be
# quantized
CASES: list[tuple[int, bool, int, torch.dtype, dict[str, Any]]] = [
    (2, True, 32, torch.bfloat16, {}),
    (3, True, 32, torch.bfloat16, {}),
    (4, True, 64, torch.bfloat16, {}),
    (8, True, 32, torch.bfloat16, {}),
    (3, True, -1, torch.float16, {}),
    (2, False, 32, torch.bfloat16, {}),
    (3, False, -1, torch.bfloat16, {}),
    (8, False, 64, torch.float16, {}),
    (3, True, 32, torch.bfloat16, {"family": "qwen2", "num_key_value_heads": 1}),
]


def build(folder: Path, bits: int, symmetric: bool, group: int, dtype: torch.dtype, changes: dict[str, Any]) -> None:
    model = tiny.checkpoint(folder / "model", dtype=dtype, **changes)
    quailora.build_adapter(
        model,
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        tiny.sequences(),
        folder / "start",
        quantization=GPTQConfig(bits=bits, group_size=group, sym=symmetric, desc_act=False),
        base_output=folder / "base",
        alternations=0,
        device="cpu",
        progress=False,
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of 3 bits, and its export."""
    folder = tmp_path_factory.mktemp("export")
    build(folder, *CASES[1])
    (folder / "base" / "tokenizer.json").write_text("{}")
    quailora.export(folder / "base", folder / "exported")
    return folder


def quantized_weights(folder: Path) -> dict[str, Any]:
    record = read_record(folder / "base")
    assert record is not None
    written = QuantizedCheckpoint.recorded(record["base"])
    assert written is not None
    return {name: written.stored(name, name) for name in written.names}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loaded_it_is_q_to_the_bit(case: Any, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from transformers import CompressedTensorsConfig

    build(tmp_path, *case)
    quailora.export(tmp_path / "base", tmp_path / "exported")
    weights = quantized_weights(tmp_path)
    full = load_file(tmp_path / "model" / "model.safetensors")
    narrow = [name for name in full if name.endswith(("k_proj.weight", "v_proj.weight"))] if case[-1] else []
    assert len(weights) == 14 - len(narrow)
    dense: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "exported", dtype=case[3], quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    state = dense.state_dict()
    for name, weight in weights.items():
        assert torch.equal(state[f"{name}.weight"], weight.dequantize())
    for name in {*full} - {f"{name}.weight" for name in weights}:
        assert torch.equal(state[name], full[name])
    if not case[1]:  # compressed-tensors 0.20 makes no room for packed zeros in a model that stays compressed
        return
    ids = torch.arange(2, 22)[None]
    held: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=case[3])
    packed = {name.removesuffix(".weight_packed") for name in held.state_dict() if name.endswith("weight_packed")}
    assert packed == weights.keys()
    with torch.no_grad():
        assert torch.equal(held(ids).logits, dense(ids).logits)


def test_negative_scales_are_among_those_compared(made: Path) -> None:
    scales = torch.cat([weight.scales.flatten() for weight in quantized_weights(made).values()])
    assert (scales < 0).any() and (scales > 0).any()


def test_the_files(made: Path) -> None:
    exported = made / "exported"
    names = {path.name for path in exported.iterdir()}
    shards = {path.name for path in (made / "base").glob("*.safetensors")}
    others = {"README.md", "config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json"}
    assert names == shards | others
    tensors = {name: tensor for path in exported.glob("*.safetensors") for name, tensor in load_file(path).items()}
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    # The codes, read by hand: value = code - 4.
    for name, weight in quantized_weights(made).items():
        assert tensors[f"{name}.weight_shape"].tolist() == list(weight.shape)
        assert torch.equal(unpack(tensors[f"{name}.weight_packed"].T.contiguous(), 3).T, weight.codes)
        assert torch.equal(tensors[f"{name}.weight_scale"], weight.scales.to(torch.bfloat16))
    full = load_file(made / "model" / "model.safetensors")
    assert all(torch.equal(tensors[name], full[name]) for name in full if "proj" not in name)
    mine = json.loads((exported / "config.json").read_text())
    theirs = json.loads((made / "base" / "config.json").read_text())
    settings = mine.pop("quantization_config")
    assert theirs.pop("quantization_config")["quant_method"] == "gptq" and mine == theirs
    assert settings == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 3,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": 32,
                },
            }
        },
        "ignore": ["lm_head"],
    }


def test_the_card(made: Path) -> None:
    _, front, body = (made / "exported" / "README.md").read_text().split("---\n", 2)
    data = yaml.safe_load(front)
    assert (data["base_model"], data["base_model_relation"]) == (str(made / "model"), "quantized")
    assert data["tags"] == ["quailora", "compressed-tensors", "3-bit"]
    assert "GPTQ int3, groups of 32, symmetric, in the format of compressed-tensors" in body
    assert "served on this one as it is" in " ".join(body.split())


def test_a_mixture_of_experts_is_refused(tmp_path: Path) -> None:
    build(tmp_path, 3, True, 32, torch.bfloat16, {"family": "mixtral"})
    with pytest.raises(AdapterError, match=r"fused expert weights \(model.layers.0.mlp.experts.* cannot load them"):
        quailora.export(tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(made: Path, tmp_path: Path) -> None:
    arguments = ["export", str(made / "base"), "--format", "compressed-tensors", "--output", str(tmp_path / "out")]
    run = CliRunner().invoke(app, arguments)
    assert (run.exit_code, run.stdout) == (0, f"base in compressed-tensors: {tmp_path / 'out'}\n"), run.output
    for path in (made / "exported").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_bad_input(made: Path, tmp_path: Path) -> None:
    def fails(message: str, base: Path, output: Path = tmp_path / "out", **settings: Any) -> None:
        with pytest.raises(QuailoraError, match=message):
            quailora.export(base, output, **settings)
        assert not (tmp_path / "out").exists() and list(tmp_path.glob(".*")) == []

    fails("'gguf' is not known; use compressed-tensors", made / "base", format="gguf")
    fails("is not empty", made / "base", made / "model")
    fails("not a base that quailora wrote: it has no quailora.json", made / "model")
    fails("gone is not a base", tmp_path / "gone")
    fails(f"is an adapter: give the folder of its base, {made / 'base'}", made / "start")
    quailora.build_adapter(
        made / "model",
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        tiny.sequences(),
        tmp_path / "start",
        quantization=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        base_output=tmp_path / "nf4",
        device="cpu",
        progress=False,
    )
    fails("is in NF4.*only a base in GPTQ's format", tmp_path / "nf4")


def test_a_damaged_base_is_refused(made: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(made / "base", base)
    shard = base / "model-block-0001.safetensors"
    tensors = load_file(shard)
    tensors["model.layers.1.mlp.up_proj.qweight"][0, 0] ^= 1
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(MismatchError, match=r"layers.1.mlp.up_proj.* is not the weight"):
        quailora.export(base, tmp_path / "out")
    del tensors["model.layers.1.mlp.up_proj.scales"]
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"has no model.layers.1.mlp.up_proj.scales"):
        quailora.export(base, tmp_path / "out")
    shard.unlink()
    with pytest.raises(CheckpointError, match="model-block-0001"):
        quailora.export(base, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base"}
