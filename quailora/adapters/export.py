"""A written base in the format of a server; the adapter that was made for it serves on it as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from quailora.adapters.quantized_checkpoint import QuantizedCheckpoint
from quailora.errors import AdapterError, CheckpointError
from quailora.files import LazyTensor, check_new_folder, new_folder, to_json, write_files, write_tensors
from quailora.modeling.checkpoint import INDEX, Checkpoint, index_of
from quailora.modeling.devices import without_torch_modes
from quailora.modeling.model_class import CAUSAL_LM
from quailora.modeling.streamed_model import skeleton
from quailora.quantization.compressed_tensors import METHOD, checkpoint_config, packed
from quailora.quantization.gptq import GPTQ, TENSORS
from quailora.quantization.registry import from_dict
from quailora.reporting.markdown import count
from quailora.reporting.model_card import exported_card
from quailora.reporting.record import RECORD, read_record

FORMATS = (METHOD,)

_CODES = "qweight"
_CONFIG = "config.json"
_OF_GPTQ = (_CONFIG, INDEX, "README.md", RECORD)  # files that speak of the other format


@without_torch_modes()
def export(base: str | Path, output_dir: str | Path, *, format: str = METHOD) -> None:
    """Write a GPTQ base in another format, for servers: the same integers and scales, so the same Q to the bit.

    compressed-tensors, in its pack-quantized form, is how vLLM takes 2 and 3 bits. An adapter for `base` is served on
    the new folder as it is. It works shard by shard, a block of quantized weights in memory at a time.

    Args:
        base: the folder of a base that `build_adapter` wrote in GPTQ's format (base_output).
        output_dir: new or empty.
        format: "compressed-tensors".

    Raises:
        AdapterError: an unknown format; a base that quailora did not write or that is not in GPTQ's format; a mixture
            of experts.
        CheckpointError, MismatchError: its files are missing or damaged.
    """
    folder, output = Path(base), Path(output_dir)
    check_new_folder(output)
    if format not in FORMATS:
        raise AdapterError(f"format (--format) '{format}' is not known; use {', '.join(FORMATS)}")
    record = read_record(folder)
    if (folder / "adapter_config.json").is_file():
        path = (record or {"base": {}})["base"].get("path")
        raise AdapterError(f"{folder} is an adapter: give the folder of its base{f', {path}' if path else ''}")
    if record is None:
        raise AdapterError(f"{folder} is not a base that quailora wrote: it has no {RECORD}")
    form = from_dict(record["base"]["quantization"])
    if not isinstance(form, GPTQ):
        raise AdapterError(f"{folder} is in {form.describe()}: only a base in GPTQ's format (--bits) is exported")
    if output.resolve().is_relative_to(folder.resolve()):
        raise AdapterError(f"{output} is in the base's own folder: give another one")
    digests = record["base"].get("digests", {})
    if not digests:
        raise AdapterError(f"the {RECORD} of {folder} has no digests of its weights: it is not whole")
    written = QuantizedCheckpoint(folder, form, digests)
    source = written.checkpoint.loaded_with(record["base"].get("auto_class", CAUSAL_LM))
    stems = {name.removesuffix(f".{_CODES}") for name in source.tensors if name.endswith(f".{_CODES}")}
    if len(stems) != len(digests):
        raise CheckpointError(
            f"{folder} holds {count(len(stems), 'quantized linear')}, and its record {len(digests)}: copy it anew"
        )
    model = skeleton(source, form.dtype)
    if fused := next((name for name, p in model.named_parameters() if p.dim() == 3 and ".experts." in name), None):
        raise AdapterError(
            f"{folder} has fused expert weights ({fused}), which stay in full precision, and transformers cannot load "
            f"them beside weights in {format}: serve the base as it is, or what quailora merge makes of it"
        )
    settings = checkpoint_config(form, _in_full_precision(source, model, set(digests)))
    with new_folder(output) as partial_output:
        for path in folder.iterdir():
            if path.is_file() and path.name not in _OF_GPTQ and path.suffix != ".safetensors":
                shutil.copyfile(path, partial_output / path.name)
        for file in dict.fromkeys(entry.file for entry in source.tensors.values()):
            write_tensors(partial_output / file.name, _exported(written, form, file))
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8")) | {"quantization_config": settings}
        texts = {INDEX: index_of(partial_output), "README.md": exported_card(record, format)}
        write_files(partial_output, {_CONFIG: to_json(config), **texts})


def _exported(written: QuantizedCheckpoint, form: GPTQ, file: Path) -> dict[str, LazyTensor]:
    """The tensors of a file in their new form; those of quantized linears are in memory, the others are not."""
    found: dict[str, LazyTensor] = {}
    for name, entry in written.checkpoint.tensors.items():
        stem, _, part = name.rpartition(".")
        if entry.file != file:
            continue
        if part == _CODES:
            weight: Any = written.stored(stem, stem)
            for new, tensor in packed(weight, form).items():
                found[f"{stem}.{new}"] = LazyTensor.of(tensor)
        elif part not in TENSORS:
            found[name] = LazyTensor(entry.shape, entry.torch_dtype, entry.read)
    return found


def _in_full_precision(source: Checkpoint, model: nn.Module, quantized: set[str]) -> set[str]:
    """The linears that are not quantized: by their names in the model, and, where these differ, in the files, which
    servers go by."""
    modules = dict(model.named_modules())
    linears = {name for name, module in modules.items() if isinstance(module, nn.Linear)}
    stored = {
        name.removesuffix(".weight")
        for name, entry in source.tensors.items()
        if name.endswith(".weight") and len(entry.shape) == 2
    }
    embeddings = {name for name, module in modules.items() if isinstance(module, nn.Embedding)}
    return (linears | stored) - quantized - embeddings
