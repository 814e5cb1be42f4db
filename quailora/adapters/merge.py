"""After training: a dense checkpoint to serve, with the adapter merged into the dequantized base."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils.quantization_config import QuantizationConfigMixin

from quailora.adapters.base_record import as_recorded, base_of, for_full_precision, loading
from quailora.adapters.correction import saved_adapter
from quailora.adapters.new_tokens import resize_to
from quailora.adapters.quantized_checkpoint import QuantizedCheckpoint
from quailora.adapters.save_and_load import put, unfilled
from quailora.adapters.skeleton import adapted_skeleton, quantized_skeleton
from quailora.calibration.tokenizer import load_tokenizer
from quailora.errors import AdapterError
from quailora.files import check_new_folder, new_folder
from quailora.modeling.checkpoint import INDEX, SINGLE, Checkpoint, index_of
from quailora.modeling.devices import default_device, without_torch_modes
from quailora.modeling.streamed_model import StreamedModel
from quailora.quantization.registry import base_for, from_config, is_quantized
from quailora.quantization.verify import NEAREST, verify


@without_torch_modes()
def merge(
    checkpoint: str | Path | Checkpoint,
    adapter: str | Path,
    output_dir: str | Path,
    *,
    initial: str | Path | None = None,
    quantization: QuantizationConfigMixin | None = None,
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> None:
    """Write the dense checkpoint W' = Q + scaling B A: what the quantized base with its adapter computes, as ordinary
    weights.

    Every linear that is quantized in the base becomes its Q, adapted or not; everything else is copied. The tokenizer
    is the one next to the adapter, if training saved one there, else the checkpoint's. Embeddings that were resized for
    new tokens are the adapter's, and `vocab_size` is set to match. It works shard by shard; the whole model is never in
    memory.

    Args:
        checkpoint: the full-precision checkpoint of the base.
        adapter: the folder of a trained, or just initialized, adapter.
        output_dir: new or empty.
        initial: the adapter that training started from, or that was kept frozen, if it is not where the file beside
            `adapter` says; None looks in the parent folder of `adapter` too.
        quantization: how the base is quantized, such as a BitsAndBytesConfig, if there is no record; if there is one,
            it must agree.
        base: the folder of the quantized base, if it is not where the record says, or Q does not follow from the
            checkpoint, as of a GPTQ base that was found.
        dtype: of all weights written; None is the checkpoint's for those that change, and what is copied stays as it
            is stored. Rounding Q + scaling B A to bf16 changes each weight by up to 2⁻⁹ of it.

    Raises:
        MismatchError, AdapterError, CheckpointError: as for `base_record.loading`; or weights that cannot be merged.
    """
    output, folder = Path(output_dir), Path(adapter)
    check_new_folder(output)
    source, place = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint), default_device(device)
    made_for = base_of(folder, Path(initial) if initial else None)
    if made_for and for_full_precision(made_for):
        raise AdapterError(
            f"{folder} was converted for the full-precision weights: there is no Q to merge it with. use "
            "PEFT's merge_and_unload on the full-precision model"
        )
    source = as_recorded(source, made_for)
    config, load_dtype = loading(made_for, source, quantization, folder)
    form, written_in = from_config(config), dtype or source.dtype
    skeleton = quantized_skeleton(source, config, load_dtype)
    written = QuantizedCheckpoint.recorded(made_for or {}, base, trust_remote_code=source.trust_remote_code)
    trained = saved_adapter(folder, Path(initial) if initial else None)
    if tokens := next((key for key in trained.tensors if ".token_adapter." in key), None):
        raise AdapterError(f"{folder} has {tokens} (trainable_token_indices): single rows cannot be merged")
    rows = resize_to(skeleton, folder)
    model = adapted_skeleton(skeleton, trained.config, source)
    put(model, trained.tensors)
    if lacking := unfilled(model):
        raise AdapterError(f"{folder / WEIGHTS} lacks {lacking[0]}, which its configuration names: save it again")
    stream = StreamedModel(source, place, load_dtype)
    merged = model.get_base_model()
    parameters = {key: tied[0] for key, tied in _by_key(stream).items()}
    if why := obstacle(merged, stored_alone(stream)):
        raise AdapterError(f"{why}: it cannot be merged into this checkpoint")

    known = made_for or {}

    def dequantized(name: str, weight: Tensor) -> Tensor:
        if written is not None:
            return written.weight(name, stream).to(weight.device).dequantize().float()
        quantized, recorded = form.quantize(weight), known.get("digests", {}).get(name)
        rounding = known.get("rounding", NEAREST)
        verify(name, quantized, form, lambda: weight, source.name, recorded=recorded, rounding=rounding)
        return quantized.dequantize().float()

    shards: dict[Path, list[str]] = {}
    for key, entry in source.tensors.items():
        shards.setdefault(entry.file, []).append(key)
    with new_folder(output) as partial:
        for shard, keys in shards.items():
            tensors = {}
            for key in keys:
                tensor = stored = source.tensor(key)
                if key in parameters:
                    tensor = _merged(merged, parameters[key], stored, dequantized, load_dtype, place)
                cast = tensor.is_floating_point() and (tensor is not stored or dtype is not None)
                tensors[key] = tensor.to("cpu", written_in if cast else tensor.dtype).contiguous()
            save_file(tensors, partial / (shard.name if len(shards) > 1 else SINGLE), metadata={"format": "pt"})
        if len(shards) > 1:
            (partial / INDEX).write_text(index_of(partial), encoding="utf-8")
        config_written, generation = copy.deepcopy(source.config), generation_config(source)
        config_written.dtype = written_in
        if rows is not None:
            config_written.get_text_config(decoder=True).vocab_size = rows
            if hasattr(config_written, "vocab_size"):  # of some models with a text configuration, too
                config_written.vocab_size = rows
        if (tokenizer := load_tokenizer(source, folder)) is not None:
            tokenizer.save_pretrained(partial)
            if tokenizer.name_or_path == str(folder):
                _end_with(tokenizer, config_written, generation)
        config_written.save_pretrained(partial)
        if generation is not None:
            generation.save_pretrained(partial)


def _merged(
    model: nn.Module,
    name: str,
    tensor: Tensor,
    dequantized: Callable[[str, Tensor], Tensor],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """One parameter of the plain model as the quantized base with its adapter has it, in the stored orientation.
    `dequantized` gives Q for a linear's name and W."""
    parent, _, leaf = name.rpartition(".")
    module: Any = model.get_submodule(parent)
    if hasattr(module, "modules_to_save"):
        saved: Tensor = getattr(module.modules_to_save["default"], leaf)
        return saved
    layer = module if isinstance(module, LoraLayer) else None
    base = module if layer is None else module.get_base_layer()
    own: Tensor = getattr(base, leaf)
    if own.device.type != "meta":
        return own  # The adapter has this parameter itself: a bias that was trained.
    if leaf != "weight":
        return tensor
    quantized = is_quantized(base)
    transposed = quantized and base_for(base).transposed(base)
    if quantized:
        weight = tensor.to(device, dtype)
        weight = dequantized(parent, weight.T.contiguous() if transposed else weight)
    elif layer is not None:
        weight = tensor.to(device, torch.float32)
    else:
        return tensor
    if layer is not None:
        weight = weight + module.get_delta_weight("default").to(device, torch.float32)
    return weight.T if transposed else weight


def stored_alone(stream: StreamedModel) -> set[str]:
    """The parameters that the checkpoint stores as one tensor, and no other with them."""
    return {names[0] for names in _by_key(stream).values() if len(names) == 1}


def _by_key(stream: StreamedModel) -> dict[str, list[str]]:
    """The checkpoint's tensors that are parameters as they are, each with the names of those."""
    names: dict[str, list[str]] = {}
    for name in dict(stream.model.named_parameters()):
        if key := stream.source(name):
            names.setdefault(key, []).append(name)
    return names


def obstacle(model: nn.Module, stored: set[str]) -> str | None:
    """Why an adapter cannot be merged into its checkpoint; None if it can.

    model: the plain model with the adapter's layers. stored: see `stored_alone`.
    """
    for name, module in model.named_modules():
        adapted = isinstance(module, LoraLayer) or hasattr(module, "modules_to_save")
        if adapted and f"{name}.weight" not in stored:
            return (
                f"{name} is adapted, and the checkpoint does not store its weight as one tensor of its own (it is "
                "tied or fused)"
            )
        if isinstance(module, LoraLayer) and any(module.lora_variant.values()):
            return f"{name} uses a variant of LoRA whose product is not B A"
    return None


def _end_with(
    tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, generation: GenerationConfig | None
) -> None:
    """Make a server stop at the tokenizer's end-of-sequence token too: training may have changed it."""
    end, both = tokenizer.eos_token_id, [config] if generation is None else [config, generation]
    each: Any
    for each in both:
        found = getattr(each, "eos_token_id", None)
        known = found if isinstance(found, list) else [found]
        if end is not None and end not in known:
            each.eos_token_id = [end, *(token for token in known if token is not None)]


def generation_config(source: Checkpoint) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(source.name, revision=source.revision or "main")
    except OSError:
        return None
