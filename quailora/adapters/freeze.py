"""`freeze_correction`: the initialized adapter stays as it is, and a fresh one is trained on top of it."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from quailora.adapters.base_record import check_base
from quailora.adapters.correction import FILE, NAME, Correction
from quailora.adapters.saved_adapter import check_weights, read_config
from quailora.adapters.targets import check_config
from quailora.errors import AdapterError
from quailora.files import to_json, write_files
from quailora.reporting.record import RECORD, read_record

ALPHA = 16  # QLoRA's


def freeze_correction(
    model: PreTrainedModel, correction: str | Path, adapter: LoraConfig | str | Path | None = None
) -> PeftModel:
    """Put an initialized adapter on its base, frozen, and on top of it an adapter to train, which begins at zero.

    Both are active. The trainable one is PEFT's "default"; `save_pretrained`, which trainers call too, saves it alone,
    with a file that names the frozen one. `merge`, `convert` and `compare` take its folder as they take any other.
    Trainers that resume from their checkpoints load it in place. The learning rate is QLoRA's, for the trained adapter
    begins as QLoRA's does. The frozen one takes r (m + n) numbers a linear, and neither gradients nor optimizer state.

    Args:
        model: the quantized base, as transformers loaded it.
        correction: the folder of the initialized adapter.
        adapter: the configuration of the adapter to train; the folder of one that was trained over this correction, to
            use it or to train it further; None is LoRA with the correction's ranks and modules, and alpha 16
            at its rank.

    Raises:
        MismatchError: the correction was made for another base, or the adapter was trained over another correction.
        AdapterError: `model` has an adapter already; there is no adapter in a folder; the correction has modules to
            save, which cannot be frozen beneath others; or a variant of LoRA that is not supported.
    """
    frozen = Path(correction)
    if isinstance(model, PeftModel):
        raise AdapterError("the model has an adapter already: give the base as transformers loaded it")
    its = read_config(frozen)
    check_weights(frozen)
    if its.modules_to_save:
        raise AdapterError(
            f"{frozen} has modules to save ({', '.join(its.modules_to_save)}), which would be frozen too: make it "
            "without modules_to_save (--modules-to-save), and name them in the configuration of the adapter to train"
        )
    check_base(model, frozen)
    this = Correction.of(frozen)
    if isinstance(adapter, str | Path):
        trained_over = Correction.read(Path(adapter))
        if trained_over is None:
            raise AdapterError(f"{adapter} was not trained over a frozen adapter: it has no {FILE}")
        trained_over.found(Path(adapter), frozen)
    config = adapter
    if config is None:
        config = LoraConfig(
            r=its.r,
            lora_alpha=ALPHA,
            target_modules=its.target_modules,
            exclude_modules=its.exclude_modules,
            rank_pattern=its.rank_pattern,
            alpha_pattern={name: ALPHA * rank / its.r for name, rank in (its.rank_pattern or {}).items()},
            task_type=its.task_type,
        )
    with warnings.catch_warnings():
        # PEFT calls deprecated functions of transformers.
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        both = PeftModel.from_pretrained(model, str(frozen), adapter_name=NAME)
        if isinstance(config, LoraConfig):
            both.add_adapter("default", check_config(config))
        else:
            both.load_adapter(str(config), "default", is_trainable=True)
    both.set_adapter("default")  # what PEFT's own methods go by
    both.base_model.set_adapter(["default", NAME])  # type: ignore[operator]
    both.set_requires_grad(NAME, requires_grad=False)
    if model.dtype in (torch.bfloat16, torch.float16):
        for parameter in _frozen(both):  # PEFT loads them in fp32, which only training needs
            parameter.data = parameter.data.to(model.dtype)
    saving: Any = both
    saving.save_pretrained = partial(_save, both, both.save_pretrained, this, _digest(both))
    return both


def _frozen(model: PeftModel) -> list[Tensor]:
    return [parameter for name, parameter in model.named_parameters() if f".{NAME}." in name]


def _digest(model: PeftModel) -> str:
    """Of the frozen adapter's weights in memory, as bf16, which trainers may cast them to."""
    sha = hashlib.sha256()
    for parameter in _frozen(model):
        sha.update(parameter.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _save(
    model: PeftModel,
    save: Callable[..., None],
    correction: Correction,
    digest: str,
    save_directory: str,
    **options: Any,
) -> None:
    """`PeftModel.save_pretrained` for the trained adapter alone, and the file that names the frozen one. Where
    training changed that one all the same, nothing is lost: it is saved too."""
    changed = _digest(model) != digest
    save(save_directory, **({"selected_adapters": ["default", NAME] if changed else ["default"]} | options))
    if not options.get("is_main_process", True):
        return
    folder = Path(save_directory)
    if changed:
        warnings.warn(
            f"the adapter {correction.folder} was to stay frozen, and training changed it: what it is now is saved in "
            f"{folder / NAME}. Trainers must not enable the gradients of all adapters",
            stacklevel=2,
        )
        if (record := read_record(correction.folder)) is not None:
            write_files(folder / NAME, {RECORD: to_json(record)})
        correction = Correction.of(folder / NAME, trained=True)
    write_files(folder, {FILE: correction.to_json()})
