"""The base that an adapter belongs on: its record, and whether a checkpoint, a quantization or a loaded model is that
base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import BitsAndBytesConfig

from quailora.adapters.lora import quantized_skeleton
from quailora.errors import AdapterError, MismatchError
from quailora.modeling.checkpoint import Checkpoint
from quailora.modeling.streamed_model import StreamedModel, linear_weight
from quailora.quantization.bitsandbytes import (
    Quantization,
    QuantizedLinear,
    is_quantized,
    quantization_of,
    quantize,
    read,
)
from quailora.reporting.record import RECORD, read_record

# By how much of ‖W - Q‖ the loaded Q may be off: more than an absmax rounded to bf16 makes, as bitsandbytes has it on
# some CPUs, and less than the codes that change where weights are off by little more than rounding.
_OFF = 0.05


def base_of(adapter: Path, initial: Path | None = None) -> dict[str, Any] | None:
    """The record of the base an adapter was made for: beside it; beside `initial`; or in the folder above, which is a
    trainer's output folder.

    Raises:
        AdapterError: `adapter` does not exist; or `initial` is asked, and has no record.
    """
    if not adapter.is_dir():
        raise AdapterError(f"{adapter} does not exist, or is no folder: give that of an adapter")
    record = read_record(adapter) or read_record(initial or adapter.parent)
    if record is None and initial is not None:
        raise AdapterError(
            f"{initial} {f'has no {RECORD}' if initial.is_dir() else 'does not exist'}: give the folder that the start "
            "was written to, or none"
        )
    return record["base"] if record else None


def for_full_precision(base: dict[str, Any]) -> bool:
    """Whether an adapter belongs on the full-precision weights of its base, by its record: `convert` made it."""
    return base.get("full_precision") is True


def loading(
    base: dict[str, Any] | None, checkpoint: Checkpoint, config: BitsAndBytesConfig | None, adapter: Path
) -> tuple[BitsAndBytesConfig, torch.dtype]:
    """How the base of `adapter` is quantized and what its weights are loaded as: by its record, or else by `config`.

    Raises:
        MismatchError: the record names another checkpoint, or another quantization than `config`.
        AdapterError: there is neither a record nor a `config`.
    """
    if base is None:
        if config is None:
            raise AdapterError(
                f"{adapter} has no {RECORD}, so the base it belongs to is not known: name the adapter that training "
                "started from (--initial), or the quantization (--quant)"
            )
        return config, checkpoint.dtype
    if base["fingerprint"] != checkpoint.fingerprint:
        raise MismatchError(
            f"{adapter} was made for {base['checkpoint']} (fingerprint {base['fingerprint']}), and {checkpoint.name} "
            f"has other weights (fingerprint {checkpoint.fingerprint}): the factors undo the quantization error of "
            "that checkpoint only"
        )
    recorded = Quantization.from_dict(base["quantization"])
    if config is not None and (differences := recorded.differences(Quantization.from_config(config))):
        raise MismatchError(
            f"{adapter} was made for a base in {recorded.describe()}; asked for is another: "
            f"{'; '.join(differences)}. On another base its factors do harm"
        )
    dtype = getattr(torch, str(base["dtype"]), None)
    if not isinstance(dtype, torch.dtype):
        raise AdapterError(f"dtype {base['dtype']!r} in the {RECORD} of {adapter} is no dtype of torch")
    return recorded.to_config(), dtype


@torch.inference_mode(False)
def check_base(
    model: nn.Module,
    adapter: str | Path,
    *,
    checkpoint: str | Path | Checkpoint | None = None,
    initial: str | Path | None = None,
) -> None:
    """Make sure that a loaded model is the base that an adapter was made for: one line before training.

    Whatever loads an adapter puts it on any base there is. On another than its own it does harm, and nothing fails.
    Compared are which linears are quantized, how each of them is, and the values of the first and the last with what
    the checkpoint's weight gives.

    Args:
        model: as transformers has loaded it, or a PeftModel over it; not yet sharded by a trainer.
        adapter: the folder of the start, or of what was trained from it.
        checkpoint: the full-precision checkpoint of the base; None is what the model was loaded from.
        initial: the adapter that training started from, where `adapter` has no record of its base.

    Raises:
        MismatchError: it is another base; with the linear, and what differs.
        AdapterError: `adapter` has no record, or weights of the model are not in memory.
        CheckpointError: the checkpoint cannot be read.
    """
    folder = Path(adapter)
    base = base_of(folder, Path(initial) if initial else None)
    if base is None:
        raise AdapterError(f"{folder} has no {RECORD}: name the adapter that training started from, as initial")
    plain: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    held: dict[str, QuantizedLinear] = {
        name.removesuffix(".base_layer"): module for name, module in plain.named_modules() if is_quantized(module)
    }
    if for_full_precision(base):
        if held:
            raise MismatchError(f"{folder} was converted for the full-precision weights, and the model is quantized")
        return
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint(checkpoint or plain.name_or_path, revision=base["revision"])
    config, dtype = loading(base, checkpoint, None, folder)
    form = Quantization.from_config(config)
    expected = [name for name, m in quantized_skeleton(checkpoint, config, dtype).named_modules() if is_quantized(m)]
    if odd := sorted(held.keys() ^ set(expected)):
        was, now = ("in full precision", "quantized") if odd[0] in held else ("quantized", "in full precision")
        raise MismatchError(
            f"{folder} was made for a base in {form.describe()} that has {odd[0]} {was}, and the model has it {now} "
            f"(and {len(odd) - 1} more such linears)"
        )
    for name, linear in held.items():
        if differences := replace(form, skip_modules=None).differences(quantization_of(linear)):
            raise MismatchError(
                f"{folder} was made for a base in {form.describe()}, and {name} of the model is in another: "
                f"{'; '.join(differences)}"
            )
    stream = StreamedModel(checkpoint, torch.device("cpu"), dtype)
    for name in dict.fromkeys((expected[0], expected[-1])):
        with stream.resident(f"{name}."):
            weight = linear_weight(stream.model.get_submodule(name))
            weight = weight.to(held[name].weight.device)
        q = quantize(weight, form).dequantize().float()
        off = float((read(held[name]).dequantize() - q).norm() / (weight - q).norm())
        if off > _OFF:
            raise MismatchError(
                f"{name} of the model is not the quantized weight of {checkpoint.name}: it is off by {off:.0%} of what "
                "quantization costs. Was another checkpoint loaded, or the same in another dtype than "
                f"{base['dtype']}?"
            )
