"""The record of the base that an adapter was made for, and whether a checkpoint, a quantization or a loaded model is
that base."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from quailora.adapters.correction import correction_folder
from quailora.adapters.skeleton import quantized_skeleton
from quailora.errors import AdapterError, MismatchError
from quailora.modeling.blocks import linear_weight
from quailora.modeling.checkpoint import Checkpoint
from quailora.modeling.devices import without_torch_modes
from quailora.modeling.model_class import CAUSAL_LM
from quailora.modeling.streamed_model import StreamedModel
from quailora.quantization.registry import from_config, from_dict, from_module, is_quantized, read
from quailora.quantization.verify import CALIBRATED, NEAREST, digest, digest_of, verify
from quailora.reporting.record import RECORD, read_record


def record_of(adapter: Path, initial: Path | None = None) -> dict[str, Any] | None:
    """The record of an adapter: next to it; next to `initial`, if given; next to the frozen adapter that it was trained
    over; or in the parent folder, which for a trainer's checkpoint is the output folder.

    Raises:
        AdapterError: `adapter` does not exist; or `initial` is looked into and has no record.
    """
    if not adapter.is_dir():
        raise AdapterError(f"{adapter} does not exist or is not a folder: give an adapter's folder")
    record = read_record(adapter) or read_record(initial or correction_folder(adapter) or adapter.parent)
    if record is None and initial is not None:
        raise AdapterError(
            f"{initial} {f'has no {RECORD}' if initial.is_dir() else 'does not exist'}: initial (--initial) is the "
            "folder that the initialized adapter was written to"
        )
    return record


def base_of(adapter: Path, initial: Path | None = None) -> dict[str, Any] | None:
    """The section of `record_of` about the base that an adapter was made for."""
    record = record_of(adapter, initial)
    return record["base"] if record else None


def for_full_precision(base: dict[str, Any]) -> bool:
    """Whether, by its record, an adapter is for the full-precision weights of its base: `convert` made it."""
    return base.get("full_precision") is True


def as_recorded(checkpoint: Checkpoint, base: dict[str, Any] | None) -> Checkpoint:
    """The checkpoint with the auto class that the adapter was made for: on another class it would be inactive. Without
    a record, the checkpoint unchanged."""
    return checkpoint if base is None else checkpoint.loaded_with(base.get("auto_class", CAUSAL_LM))


def loading(
    base: dict[str, Any] | None, checkpoint: Checkpoint, config: QuantizationConfigMixin | None, adapter: Path
) -> tuple[QuantizationConfigMixin, torch.dtype]:
    """How the base of `adapter` is quantized, and the dtype its weights are loaded in: from its record, else from
    `config` and the checkpoint.

    Raises:
        MismatchError: the record names another checkpoint, or another quantization than `config`.
        AdapterError: there is neither a record nor a `config`.
    """
    if base is None:
        if config is None:
            raise AdapterError(
                f"{adapter} has no {RECORD}, so the base it belongs to is not known: give the adapter that training "
                "started from as initial (--initial), or how the base is quantized as quantization (--quant)"
            )
        return config, checkpoint.dtype
    if base["fingerprint"] != checkpoint.fingerprint:
        raise MismatchError(
            f"{adapter} was made for {base['checkpoint']} (fingerprint {base['fingerprint']}), and {checkpoint.name} "
            f"has other weights (fingerprint {checkpoint.fingerprint}): the factors correct the quantization error "
            "of that checkpoint only"
        )
    recorded = from_dict(base["quantization"])
    if config is not None and (differences := recorded.differences(from_config(config))):
        raise MismatchError(
            f"{adapter} was made for a base in {recorded.describe()}, which is not the one given: "
            f"{'; '.join(differences)}. On another base, its factors make the model worse"
        )
    dtype = getattr(torch, str(base["dtype"]), None)
    if not isinstance(dtype, torch.dtype):
        raise AdapterError(f"dtype {base['dtype']!r} in the {RECORD} of {adapter} is not a dtype of torch")
    return recorded.to_config(), dtype


@without_torch_modes()
def check_base(
    model: nn.Module,
    adapter: str | Path,
    *,
    checkpoint: str | Path | Checkpoint | None = None,
    initial: str | Path | None = None,
) -> None:
    """Check that a loaded model is the base that an adapter was made for: one line before training.

    PEFT loads an adapter on any base. On the wrong one it makes the model worse, without an error. This compares which
    linears are quantized, the settings of each, and the digests of their codes and scales with those in the record. If
    some digests differ, or none are recorded, the first and the last of those linears are compared with the result of
    quantizing the checkpoint's weights.

    Args:
        model: as transformers loaded it, or a PeftModel around it; not yet sharded by a trainer.
        adapter: the folder of the initialized adapter, or of one trained from it.
        checkpoint: the full-precision checkpoint of the base; None is what the model was loaded from.
        initial: the adapter that training started from, if `adapter` has no record of its base.

    Raises:
        MismatchError: it is another base; names the linear, and what differs.
        AdapterError: `adapter` has no record, or weights of the model are not in memory.
        CheckpointError: the checkpoint cannot be read.
    """
    folder = Path(adapter)
    base = base_of(folder, Path(initial) if initial else None)
    if base is None:
        raise AdapterError(f"{folder} has no {RECORD}: give the adapter that training started from as initial")
    plain: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    held: dict[str, Any] = {
        name.removesuffix(".base_layer"): module for name, module in plain.named_modules() if is_quantized(module)
    }
    if for_full_precision(base):
        if held:
            raise MismatchError(f"{folder} was converted for the full-precision weights, and the model is quantized")
        return
    if "path" in base:
        _check_written(held, base, folder)
        _check_unquantized(plain, base, folder)
        return
    loaded_from = recorded_base(plain)
    calibrated = loaded_from is not None and loaded_from.get("rounding") == CALIBRATED
    if calibrated and base.get("rounding", NEAREST) == NEAREST:
        raise MismatchError(
            f"{folder} was made for a base that is quantized as it is loaded, and the codes of this model were "
            "chosen by calibration, with another adapter"
        )
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint(checkpoint or plain.name_or_path, revision=base["revision"])
    checkpoint = as_recorded(checkpoint, base)
    config, dtype = loading(base, checkpoint, None, folder)
    form = from_config(config)
    skeleton = quantized_skeleton(checkpoint, config, dtype)
    expected = [name for name, module in skeleton.named_modules() if is_quantized(module)]
    if type(plain) is not type(skeleton) and held and held.keys().isdisjoint(expected):
        raise MismatchError(
            f"{folder} was made for {type(skeleton).__name__}, which has {expected[0]}, and the model is a "
            f"{type(plain).__name__}, which has {next(iter(held))}: the adapter would be inactive. Load the model with "
            f"{checkpoint.auto_class}, or make an adapter for this class"
        )
    if odd := sorted(held.keys() ^ set(expected)):
        was, now = ("in full precision", "quantized") if odd[0] in held else ("quantized", "in full precision")
        raise MismatchError(
            f"{folder} was made for a base in {form.describe()} that has {odd[0]} {was}, and the model has it {now} "
            f"(and {len(odd) - 1} more such linears)"
        )
    for name, linear in held.items():
        if differences := form.differences(from_module(linear), layers=False):
            raise MismatchError(
                f"{folder} was made for a base in {form.describe()}, and {name} of the model is in another: "
                f"{'; '.join(differences)}"
            )
    digests = base.get("digests", {})
    suspects = [name for name, known in digests.items() if digest(read(held[name])) != known] if digests else expected
    if not suspects:
        return
    stream = StreamedModel(checkpoint, torch.device("cpu"), dtype)
    for name in dict.fromkeys((suspects[0], suspects[-1])):
        quantized = read(held[name])
        with stream.resident(f"{name}."):
            weight = linear_weight(stream.model.get_submodule(name)).to(device_of(held[name]))
            verify(
                name,
                quantized,
                form,
                lambda weight=weight: weight,  # type: ignore[misc]
                checkpoint.name,
                recorded=digests.get(name),
                rounding=base.get("rounding", NEAREST),
                advice=f". Was another checkpoint loaded, or the same in another dtype than {base['dtype']}?",
            )


def _check_written(held: dict[str, Any], base: dict[str, Any], folder: Path) -> None:
    """Of a base that was written, every linear's digest is known."""
    form, digests = from_dict(base["quantization"]), base["digests"]
    if odd := sorted(held.keys() ^ digests.keys()):
        what = "quantized, and was not" if odd[0] in held else "not quantized, and was"
        raise MismatchError(f"{folder} was made for the base {base['path']}, and in this model {odd[0]} is {what}")
    for name, linear in held.items():
        if differences := form.differences(from_module(linear), layers=False):
            raise MismatchError(
                f"{folder} was made for a base in {form.describe()}, and {name} of the model is in another: "
                f"{'; '.join(differences)}"
            )
        if digest(read(linear)) != digests[name]:
            raise MismatchError(
                f"{folder} was made for the base {base['path']}, and {name} of the model has other codes"
            )


def _check_unquantized(model: Any, base: dict[str, Any], folder: Path) -> None:
    """Of a base that was written, norms, embeddings and whatever else is not quantized, where the model is loaded in
    the dtype that they are recorded in. Embeddings may have been resized."""
    if str(getattr(model.config, "dtype", None)) != f"torch.{base['dtype']}":
        return
    tensors = {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): tensor
        for name, tensor in chain(model.named_parameters(), model.named_buffers())
    }
    for name, recorded in base.get("unquantized", {}).items():
        if (tensor := tensors.get(name)) is None or tensor.is_meta:
            continue
        found = digest_of(tensor)
        if found != recorded and found.partition("-")[0] == recorded.partition("-")[0]:
            raise MismatchError(
                f"{folder} was made for the base {base['path']}, and {name} of the model, which is not quantized, has "
                "other values"
            )


def device_of(linear: nn.Module) -> torch.device:
    """Where the weight of a quantized linear is."""
    return next(chain(linear.parameters(), linear.buffers())).device


def recorded_base(model: nn.Module) -> dict[str, Any] | None:
    """The record in the folder that a model was loaded from, if it was saved quantized together with one."""
    folder = Path(getattr(model, "name_or_path", ""))
    record = read_record(folder) if folder.is_dir() else None
    return record["base"] if record else None
