"""Adapters as a trainer leaves them, and the checkpoints that `merge` writes."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

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
