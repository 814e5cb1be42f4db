"""`freeze_correction`: the initialized adapter stays as it is, and a fresh one is trained on top of it."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from quailora.adapters.base_record import check_base
from quailora.adapters.correction import FILE, NAME, Correction
from quailora.adapters.save_and_load import loading_by_peft
from quailora.adapters.saved_adapter import check_weights, read_config
from quailora.adapters.targets import check_config
from quailora.errors import AdapterError
from quailora.files import to_json, write_files
from quailora.modeling.checkpoint import Checkpoint
from quailora.reporting.record import RECORD, read_record

ALPHA = 16  # QLoRA's


def freeze_correction(
    model: PreTrainedModel,
    correction: str | Path,
    adapter: LoraConfig | str | Path | None = None,
    *,
    checkpoint: str | Path | Checkpoint | None = None,
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
            use it or to train it further; None is LoRA with the correction's ranks and modules, and alpha 16 at its
            rank.
        checkpoint: the full-precision checkpoint of the base; None is what the model was loaded from. See
            `check_base`.

    Raises:
        MismatchError: the correction was made for another base, or the adapter was trained over another correction.
        AdapterError: `model` has an adapter already; there is no adapter in a folder; or one of the two is not plain
            LoRA on linears, or could not be used together.
    """
    frozen = Path(correction)
    if isinstance(model, PeftModel):
        raise AdapterError("the model has an adapter already: give the base as transformers loaded it")
    if not isinstance(adapter, LoraConfig | str | Path | None):
        raise AdapterError(f"adapter is a {type(adapter).__name__}: give a LoraConfig, or the folder of an adapter")
    its = read_config(frozen)
    check_weights(frozen)
    if Correction.read(frozen) is not None:
        raise AdapterError(
            f"{frozen} was itself trained over a frozen adapter: make one of both with combine (quailora convert "
            "--combine), and freeze that"
        )
    if read_record(frozen) is None:
        raise AdapterError(f"{frozen} has no {RECORD}, so the base it belongs to is not known: was it trained?")
    _check(its, frozen)
    if its.modules_to_save:
        raise AdapterError(
            f"{frozen} has modules to save ({', '.join(its.modules_to_save)}), which would be frozen too: make it "
            "without modules_to_save (--modules-to-save), and name them in the configuration of the adapter to train"
        )
    if isinstance(adapter, str | Path):
        trained = Path(adapter)
        _check(read_config(trained), trained)
        check_weights(trained)
        trained_over = Correction.read(trained)
        if trained_over is None:
            raise AdapterError(f"{trained} was not trained over a frozen adapter: it has no {FILE}")
        trained_over.found(trained, frozen)
        this = replace(trained_over, folder=str(frozen.resolve()))
    else:
        this, config = Correction.of(frozen), _to_train(its) if adapter is None else copy.deepcopy(adapter)
        check_config(config)
        _check(config, "the configuration of the adapter to train")
        if config.init_lora_weights is False:
            raise AdapterError("init_lora_weights=False begins at random: leave it at True, for zero")
        # PEFT looks there to see whether embeddings were resized, and saves them if so.
        config.base_model_name_or_path, config.revision = model.name_or_path, its.revision
    check_base(model, frozen, checkpoint=checkpoint)
    with loading_by_peft():
        both: Any = PeftModel.from_pretrained(model, str(frozen), adapter_name=NAME)
        if isinstance(adapter, str | Path):
            both.load_adapter(str(adapter), "default", is_trainable=True)
        else:
            try:
                both.add_adapter("default", config)
            except (ValueError, TypeError) as error:
                both.unload()
                raise AdapterError(f"PEFT refuses this LoRA configuration: {error}") from error
    tuner = both.base_model
    # What trainers and contexts of PEFT call to switch adapters: whatever they choose is over the correction.
    tuner.set_adapter = partial(_set_adapter, both, tuner.set_adapter)
    tuner.enable_adapter_layers = partial(_enable, both, tuner.enable_adapter_layers)
    both.set_adapter("default")
    if model.dtype in (torch.bfloat16, torch.float16):
        for parameter in _frozen(both):  # PEFT loads them in fp32, which only training needs
            parameter.data = parameter.data.to(model.dtype)
    both.save_pretrained = partial(_save, both, both.save_pretrained, this, _digest(both))
    return both


def _check(config: LoraConfig, of: object) -> None:
    """Raises AdapterError for what could not be trained, merged or saved together with another adapter."""
    for setting in ("target_parameters", "lora_bias", "use_qalora"):
        if value := getattr(config, setting, None):
            raise AdapterError(f"{of} has {setting}={value!r}: only plain LoRA on linears can be combined")


def _to_train(correction: LoraConfig) -> LoraConfig:
    """The modules and ranks of the correction."""
    return LoraConfig(
        r=correction.r,
        lora_alpha=ALPHA,
        target_modules=correction.target_modules,
        exclude_modules=correction.exclude_modules,
        layers_to_transform=correction.layers_to_transform,
        layers_pattern=correction.layers_pattern,
        rank_pattern=correction.rank_pattern,
        alpha_pattern={name: ALPHA * rank / correction.r for name, rank in (correction.rank_pattern or {}).items()},
        task_type=correction.task_type,
    )


def _set_adapter(
    model: PeftModel, set_adapter: Callable[..., None], names: str | list[str], *rest: Any, **options: Any
) -> None:
    """`LoraModel.set_adapter`, with the frozen adapter beneath those named."""
    chosen = [names] if isinstance(names, str) else list(names)
    set_adapter([*(name for name in chosen if name != NAME), NAME], *rest, **options)
    model.set_requires_grad(NAME, requires_grad=False)


def _enable(model: PeftModel, enable_adapter_layers: Callable[[], None]) -> None:
    """`LoraModel.enable_adapter_layers`, which would let all active adapters have gradients."""
    enable_adapter_layers()
    model.set_requires_grad(NAME, requires_grad=False)


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
    save_directory: str | Path,
    *positional: Any,
    **options: Any,
) -> None:
    """`PeftModel.save_pretrained` for the trained adapter alone, and the file that names the frozen one. Where
    training changed that one all the same, nothing is lost: it is saved too."""
    folder = Path(save_directory)
    if folder.resolve() == Path(correction.folder):
        raise AdapterError(f"{folder} holds the frozen adapter, which saving would overwrite: save to another folder")
    changed = _digest(model) != digest
    selected = {"selected_adapters": ["default", NAME] if changed else ["default"]}
    save(str(folder), *positional, **(selected | options))
    if not options.get("is_main_process", True):
        return
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
