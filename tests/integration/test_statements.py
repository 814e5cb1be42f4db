"""What a run says of a model is so."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import quailora
from quailora.errors import QuailoraError
from quailora.modeling.checkpoint import Checkpoint
from tests.helpers import tiny
from tests.integration.test_pipeline import DATA, build, lora

JAMBA: dict[str, Any] = {
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_dt_rank": 64,
    "use_mamba_kernels": False,
}


def test_convolutions_are_no_experts_and_unused_forwards_are_said(tmp_path: Path) -> None:
    """Jamba multiplies with the weight of dt_proj itself, and its conv1d has a weight of three dimensions."""
    folder = tiny.checkpoint(tmp_path / "model", "jamba", **JAMBA)
    report = build(folder, tmp_path / "out", lora(r=4))
    assert not any("conv1d" in note for note in report.notes), report.notes
    [reason] = {why for name, why in report.left.items() if name.endswith("dt_proj")}
    assert "did not call it in its forward pass" in reason and "no calibration token" not in reason


def test_after_an_overflow_in_fp16_another_dtype_is_suggested(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model", dtype=torch.float16)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"].fill_(6e4)  # in the second block: the first is kept
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QuailoraError, match=r"--dtype bfloat16.*--no-resume.*in float16 it would fail again") as caught:
        build(folder, tmp_path / "out")
    assert "continues from there" not in str(caught.value)


def test_the_card_of_a_base_with_code_of_its_own_says_so(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    config = lora(target_modules=["q_proj"])
    for trusted in (False, True):
        source = Checkpoint(folder, trust_remote_code=trusted)
        quailora.build_adapter(source, config, DATA, tmp_path / str(trusted), progress=False)
        card = (tmp_path / str(trusted) / "README.md").read_text()
        assert ("    trust_remote_code=True,\n" in card) is trusted
