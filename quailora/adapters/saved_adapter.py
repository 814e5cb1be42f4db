"""An adapter in a folder, as PEFT and trainers save it: its configuration and its checked tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from quailora.errors import AdapterError


class SavedAdapter:
    """The tensors of an adapter on disk. `factors` has PEFT's scaling in B."""

    def __init__(self, folder: Path) -> None:
        self.config = read_config(folder)
        check_weights(folder)
        try:
            self.tensors = load_file(folder / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise AdapterError(f"{folder / WEIGHTS} cannot be read: {error}") from error
        a, b = (
            {key.removesuffix(side) for key in self.tensors if key.endswith(side)}
            for side in (".lora_A.weight", ".lora_B.weight")
        )
        if lone := sorted(a ^ b):
            lacking = f"{lone[0]}.lora_{'B' if lone[0] in a else 'A'}.weight"
            raise AdapterError(f"{folder / WEIGHTS} lacks {lacking}: save the adapter again")
        if not a:
            raise AdapterError(f"{folder} does not adapt any linear")
        self.modules = sorted(a)
        for key, tensor in self.tensors.items():
            if not tensor.isfinite().all():
                raise AdapterError(
                    f"{key} in {folder / WEIGHTS} is not finite: training diverged, or the file is damaged"
                )
        biased = next((key for key in self.tensors if key.endswith(".lora_B.bias")), None)
        if biased is not None:
            raise AdapterError(f"{folder} has {biased} (lora_bias=True): only W' = Q + scaling B A is written, no bias")

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """A (r, n) and scaling B (m, r)."""
        a, b = self.tensors[f"{module}.lora_A.weight"].double(), self.tensors[f"{module}.lora_B.weight"].double()
        name = module.removeprefix("base_model.model.")
        pattern = self.config.alpha_pattern or {}
        alpha = pattern.get(get_pattern_key(list(pattern), name), self.config.lora_alpha)
        scaling = alpha / math.sqrt(a.shape[0]) if self.config.use_rslora else alpha / a.shape[0]
        return a, b * scaling


def set_ranks(config: LoraConfig, ranks: Mapping[str, int]) -> None:
    """Make a configuration that of factors with these ranks, by module, and with scaling 1: it is in the factors."""
    by_name = {module.removeprefix("base_model.model."): rank for module, rank in ranks.items()}
    config.r = max(by_name.values())
    config.rank_pattern = {name: rank for name, rank in by_name.items() if rank != config.r}
    config.alpha_pattern = dict(config.rank_pattern)  # alpha = r, so PEFT's scaling is 1
    config.lora_alpha, config.use_rslora, config.init_lora_weights = config.r, False, True


def read_config(folder: Path) -> LoraConfig:
    """The LoRA configuration of an adapter folder. Raises AdapterError if there is none."""
    if not (folder / "adapter_config.json").is_file():  # or PEFT would look for it on the hub
        raise AdapterError(f"{folder} {'holds no adapter_config.json' if folder.is_dir() else 'does not exist'}")
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError) as error:
        raise AdapterError(f"{folder} does not hold a LoRA adapter: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(config, LoraConfig) or config.use_dora:
        raise AdapterError(f"{folder} is not a plain LoRA adapter")
    return config


def check_weights(folder: Path) -> None:
    """Raises AdapterError if the weights of an adapter are a pickle or were saved empty."""
    if not (folder / WEIGHTS).is_file() and (folder / "adapter_model.bin").is_file():
        raise AdapterError(
            f"{folder} has its weights in adapter_model.bin, a pickle, which can run code when it is read: if "
            "you trust it, load the adapter with PEFT and save it with save_pretrained(..., safe_serialization=True)"
        )
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            empty = [key for key in file.keys() if 0 in file.get_slice(key).get_shape()]  # noqa: SIM118  (no dict)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{folder / WEIGHTS} cannot be read: {error}") from error
    if empty:
        raise AdapterError(
            f"{empty[0]} in {folder / WEIGHTS} is empty (and {len(empty) - 1} more tensors), as DeepSpeed ZeRO-3 saves "
            "them if it does not gather the weights: set stage3_gather_16bit_weights_on_model_save, or gather the "
            "weights with zero_to_fp32.py, and save the adapter again"
        )
