"""After training: a dense checkpoint to serve (`merge`), or what training learned as an adapter for the full-precision
weights (`convert`)."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from quailora.adapters.base_record import as_recorded, base_of, for_full_precision, loading
from quailora.adapters.lora import adapted_skeleton, put, quantized_skeleton, unfilled
from quailora.adapters.new_tokens import resize_to
from quailora.calibration.tokenizer import load_tokenizer
from quailora.errors import AdapterError
from quailora.files import check_new_folder, new_folder, to_json, write_files
from quailora.modeling.checkpoint import INDEX, SINGLE, Checkpoint
from quailora.modeling.devices import default_device
from quailora.modeling.streamed_model import StreamedModel
from quailora.quantization.registry import base_for, from_config, is_quantized
from quailora.quantization.verify import NEAREST, verify
from quailora.reporting.record import RECORD, lora_record, read_record

WEIGHTS = "adapter_model.safetensors"


def merge(
    checkpoint: str | Path | Checkpoint,
    adapter: str | Path,
    output_dir: str | Path,
    *,
    initial: str | Path | None = None,
    quantization: BitsAndBytesConfig | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> None:
    """Write the dense checkpoint W' = Q + scaling B A: what the quantized base with its adapter computes, as ordinary
    weights.

    Every linear that the base holds quantized becomes its Q, adapted or not; all else is copied. The tokenizer is that
    beside the adapter, where training has saved one, or else the checkpoint's. Embeddings that were resized for new
    tokens are the adapter's, and `vocab_size` follows them. Shard by shard; the model is never in memory as a whole.

    Args:
        checkpoint: the full-precision checkpoint of the base.
        adapter: the folder of a trained, or just initialized, adapter.
        output_dir: new or empty.
        initial: the adapter that training started from, where `adapter` has no record of its base; without it, the
            folder above `adapter` is looked into.
        quantization: how the base is quantized, where there is no record at all; checked against a record that is
            there.
        dtype: of the weights written; None is the checkpoint's. Rounding Q + scaling B A to bf16 costs about 2⁻⁹ of
            each weight.

    Raises:
        MismatchError, AdapterError, CheckpointError: as `base_record.loading`; or weights that cannot be merged.
    """
    output, folder = Path(output_dir), Path(adapter)
    check_new_folder(output)
    source, place = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint), default_device(device)
    made_for = base_of(folder, Path(initial) if initial else None)
    if made_for and for_full_precision(made_for):
        raise AdapterError(
            f"{folder} was converted for the full-precision weights: there is no Q to merge it with. PEFT's "
            "merge_and_unload is right for it, on the full-precision model"
        )
    source = as_recorded(source, made_for)
    config, load_dtype = loading(made_for, source, quantization, folder)
    form, dtype = from_config(config), dtype or source.dtype
    base = quantized_skeleton(source, config, load_dtype)
    trained = _Adapter(folder)
    if tokens := next((key for key in trained.tensors if ".token_adapter." in key), None):
        raise AdapterError(f"{folder} has {tokens} (trainable_token_indices): rows of embeddings cannot be merged")
    rows = resize_to(base, folder)
    model = adapted_skeleton(base, trained.config, source)
    put(model, trained.tensors)
    if lacking := unfilled(model):
        raise AdapterError(f"{folder / WEIGHTS} lacks {lacking[0]}, which its configuration names: save it anew")
    stream = StreamedModel(source, place, load_dtype)
    merged = model.get_base_model()
    names: dict[str, list[str]] = {}
    for name in dict(stream.model.named_parameters()):
        if key := stream.source(name):
            names.setdefault(key, []).append(name)
    parameters = {key: tied[0] for key, tied in names.items()}
    _check_mergeable(merged, {tied[0] for tied in names.values() if len(tied) == 1})

    known = made_for or {}

    def dequantized(name: str, weight: Tensor) -> Tensor:
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
                tensor = source.tensor(key)
                if key in parameters:
                    tensor = _merged(merged, parameters[key], tensor, dequantized, load_dtype, place)
                tensors[key] = tensor.to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
            save_file(tensors, partial / (shard.name if len(shards) > 1 else SINGLE), metadata={"format": "pt"})
        if len(shards) > 1:
            total = sum(file.stat().st_size for file in partial.iterdir())
            index = {
                "metadata": {"total_size": total},
                "weight_map": {key: e.file.name for key, e in source.tensors.items()},
            }
            (partial / INDEX).write_text(json.dumps(index, indent=2))
        config_written, generation = copy.deepcopy(source.config), _generation_config(source)
        config_written.dtype = dtype
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
    """The weight that the quantized base with its adapter multiplies with, for one parameter of the plain model,
    oriented as stored. `dequantized` gives Q for a linear's name and W."""
    parent, _, leaf = name.rpartition(".")
    module: Any = model.get_submodule(parent)
    if hasattr(module, "modules_to_save"):
        saved: Tensor = getattr(module.modules_to_save["default"], leaf)
        return saved
    layer = module if isinstance(module, LoraLayer) else None
    base = module if layer is None else module.get_base_layer()
    own: Tensor = getattr(base, leaf)
    if own.device.type != "meta":
        return own  # The adapter brings this parameter itself: a bias that was trained.
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


def _check_mergeable(model: nn.Module, stored: set[str]) -> None:
    for name, module in model.named_modules():
        adapted = isinstance(module, LoraLayer) or hasattr(module, "modules_to_save")
        if adapted and f"{name}.weight" not in stored:
            raise AdapterError(
                f"{name} is adapted, and the checkpoint does not store its weight as one tensor of its own (it is "
                "tied or fused): it cannot be merged into this checkpoint"
            )
        if isinstance(module, LoraLayer) and any(module.lora_variant.values()):
            raise AdapterError(f"{name} uses a variant of LoRA whose product is not B A: it cannot be merged")


def convert(initial: str | Path, trained: str | Path, output_dir: str | Path, *, rank: int | None = None) -> None:
    """Write what training learned, scaling (B A - B₀ A₀), as an adapter for the *full-precision* weights.

    An adapter that starts at W - Q holds the quantization error besides what it learned; on the full-precision weights
    only the second is wanted. The difference has rank at most r + r₀; its factors come from thin QRs and a small SVD in
    fp64, so that two large, nearly equal products do not have to cancel in bf16 later.

    The record in `output_dir` says that it belongs on the full-precision weights: `quailora eval` puts it there, and
    `merge` refuses it.

    Args:
        initial: the adapter that training started from.
        trained: the adapter after training.
        output_dir: new or empty.
        rank: truncate to the best approximation of this rank; None keeps all, r + r₀.

    Raises:
        AdapterError: the two do not adapt the same modules, are one and the same, seem to be swapped, or are no plain
            LoRA adapters.
    """
    output, before, after = Path(output_dir), Path(initial), Path(trained)
    check_new_folder(output)
    if rank is not None and rank < 1:
        raise AdapterError(f"rank {rank}: it must be at least 1")
    old, new = _Adapter(before), _Adapter(after)
    record = read_record(before)
    if record is None and read_record(after) is not None:
        raise AdapterError(
            f"{after} has a {RECORD}, as an initialized adapter does, and {before} has none: give the initialized "
            f"adapter first. If {before} is that adapter, move the {RECORD} into it"
        )
    if different := set(old.modules) ^ set(new.modules):
        raise AdapterError(
            f"{before} and {after} adapt different modules, {sorted(different)[0]} for one: they do not belong together"
        )
    embedding = next((key for key in new.tensors if ".lora_embedding_" in key), None)
    if embedding is not None:
        raise AdapterError(f"{after} has {embedding}: only what linears learned can be converted")
    if new.config.target_parameters:
        raise AdapterError(
            f"{after} adapts parameters, {new.config.target_parameters[0]} for one, and not only linears "
            "(target_parameters): only what linears learned can be converted"
        )
    if old.tensors.keys() == new.tensors.keys() and all(torch.equal(v, new.tensors[k]) for k, v in old.tensors.items()):
        raise AdapterError(
            f"{before} and {after} hold the same factors: nothing was learned, or training was saved over its start"
        )
    tensors = {key: value for key, value in new.tensors.items() if ".lora_A." not in key and ".lora_B." not in key}
    ranks = {}
    for module in new.modules:
        (a0, b0), (a1, b1) = old.factors(module), new.factors(module)
        if a0.shape[1] != a1.shape[1] or b0.shape[0] != b1.shape[0]:
            raise AdapterError(f"{module} has other shapes in {before} than in {after}: they do not belong together")
        lora_b, lora_a = _compressed(torch.cat([b1, -b0], dim=1), torch.cat([a1, a0]), rank)
        tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = lora_a, lora_b
        ranks[module.removeprefix("base_model.model.")] = lora_a.shape[0]
    config = new.config
    config.r = max(ranks.values())
    config.rank_pattern = {name: r for name, r in ranks.items() if r != config.r}
    config.alpha_pattern = dict(config.rank_pattern)  # alpha = r: the scaling is in the factors
    config.lora_alpha, config.use_rslora, config.init_lora_weights = config.r, False, True
    with new_folder(output) as partial:
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(str(partial))
        if record is not None:
            record["base"]["full_precision"] = True
            record["lora"] = lora_record(config)
            write_files(partial, {RECORD: to_json(record)})


def _compressed(left: Tensor, right: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
    """Balanced factors (m, k), (k, n) of left @ right, for left (m, 2r) and right (2r, n)."""
    q_left, r_left = torch.linalg.qr(left.double())
    q_right, r_right = torch.linalg.qr(right.double().T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T)
    k = min(len(s), rank or len(s))
    root = s[:k].sqrt()
    return (q_left @ (u[:, :k] * root)).float().contiguous(), ((q_right @ (vh[:k].T * root)).T).float().contiguous()


def read_config(folder: Path) -> LoraConfig:
    """The LoRA configuration of an adapter folder. Raises AdapterError where there is none."""
    if not (folder / "adapter_config.json").is_file():  # or PEFT would look for it on the hub
        raise AdapterError(f"{folder} {'holds no adapter_config.json' if folder.is_dir() else 'does not exist'}")
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError) as error:
        raise AdapterError(f"{folder} holds no LoRA adapter: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(config, LoraConfig) or config.use_dora:
        raise AdapterError(f"{folder} is not a plain LoRA adapter")
    return config


def check_weights(folder: Path) -> None:
    """Raises AdapterError where the weights of an adapter are a pickle, or are saved empty."""
    if not (folder / WEIGHTS).is_file() and (folder / "adapter_model.bin").is_file():
        raise AdapterError(
            f"{folder} has its weights in adapter_model.bin, a pickle, which can run code when it is read: load the "
            "adapter with PEFT where you trust it, and save it with save_pretrained(..., safe_serialization=True)"
        )
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            empty = [key for key in file.keys() if 0 in file.get_slice(key).get_shape()]  # noqa: SIM118  (no dict)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{folder / WEIGHTS} cannot be read: {error}") from error
    if empty:
        raise AdapterError(
            f"{empty[0]} in {folder / WEIGHTS} is empty (and {len(empty) - 1} more tensors), as DeepSpeed ZeRO-3 saves "
            "them where it does not gather the weights: set stage3_gather_16bit_weights_on_model_save, or make the "
            "weights whole with zero_to_fp32.py, and save the adapter again"
        )


class _Adapter:
    """The tensors of an adapter on disk, with the scaling PEFT would apply taken into B."""

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
            raise AdapterError(f"{folder / WEIGHTS} lacks {lacking}: save it anew")
        if not a:
            raise AdapterError(f"{folder} adapts no linear")
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
        """(r, n) and (m, r) whose product in reverse order is scaling B A."""
        a, b = self.tensors[f"{module}.lora_A.weight"].double(), self.tensors[f"{module}.lora_B.weight"].double()
        name = module.removeprefix("base_model.model.")
        pattern = self.config.alpha_pattern or {}
        alpha = pattern.get(get_pattern_key(list(pattern), name), self.config.lora_alpha)
        scaling = alpha / math.sqrt(a.shape[0]) if self.config.use_rslora else alpha / a.shape[0]
        return a, b * scaling


def _end_with(
    tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, generation: GenerationConfig | None
) -> None:
    """Training may have given the tokenizer another end of a sequence than the checkpoint's: a server stops at that
    too."""
    end, both = tokenizer.eos_token_id, [config] if generation is None else [config, generation]
    each: Any
    for each in both:
        found = getattr(each, "eos_token_id", None)
        known = found if isinstance(found, list) else [found]
        if end is not None and end not in known:
            each.eos_token_id = [end, *(token for token in known if token is not None)]


def _generation_config(source: Checkpoint) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(source.name, revision=source.revision or "main")
    except OSError:
        return None
