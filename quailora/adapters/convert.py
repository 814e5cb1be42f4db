"""After training: what training learned, as an adapter for the full-precision weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS
from safetensors.torch import save_file
from torch import Tensor

from quailora.adapters.correction import Correction, combined
from quailora.adapters.saved_adapter import SavedAdapter, set_ranks
from quailora.errors import AdapterError
from quailora.files import check_new_folder, new_folder, to_json, write_files
from quailora.modeling.devices import without_torch_modes
from quailora.reporting.record import RECORD, lora_record, read_record, was_trained


@without_torch_modes()
def convert(
    initial: str | Path,
    trained: str | Path,
    output_dir: str | Path,
    *,
    rank: int | None = None,
    combine: bool = False,
) -> None:
    """Write what training learned, scaling (B A - B₀ A₀), as an adapter for the *full-precision* weights.

    An adapter initialized to W - Q contains the quantization error besides what it learned, and on the full-precision
    weights only the latter is wanted. The difference has rank at most r + r₀. Its factors are computed with thin QRs
    and a small SVD in fp64, so that two large, nearly equal products do not have to cancel in bf16 later.

    An adapter that was trained over a frozen correction (`freeze_correction`) is what training learned, so it is copied
    as it is. With `combine` it is written together with the correction, as one adapter of the summed rank for the
    quantized base, which any server takes.

    The record in `output_dir` says that the adapter is for the full-precision weights: `quailora eval` applies it to
    those, and `merge` refuses it.

    Args:
        initial: the adapter that training started from, or that was kept frozen.
        trained: the adapter after training.
        output_dir: new or empty.
        rank: truncate to the best approximation of this rank; None keeps the full rank, at most r + r₀. Not for an
            adapter that was trained over a frozen one.
        combine: see above.

    Raises:
        AdapterError: the two do not adapt the same modules, are identical, seem to be swapped, or are not plain LoRA
            adapters.
    """
    output, before, after = Path(output_dir), Path(initial), Path(trained)
    check_new_folder(output)
    if rank is not None and rank < 1:
        raise AdapterError(f"rank (--rank) must be at least 1, got {rank}")
    old, new = SavedAdapter(before), SavedAdapter(after)
    record = read_record(before)
    if (correction := Correction.read(after)) is not None:
        frozen = correction.found(after, before)
        if rank is not None:
            raise AdapterError(
                f"{after} was trained over a frozen adapter and is copied as it is: leave out rank (--rank)"
            )
        if correction.trained and not combine:
            raise AdapterError(
                f"the frozen adapter of {after} was changed by training, so {after} is not all that was learned: "
                "`quailora merge` gives the dense weights, and combine (--combine) both as one adapter"
            )
        both = combined(SavedAdapter(frozen), new) if combine else new
        _write(output, both.config, both.tensors, record, full_precision=not combine)
        return
    if combine:
        raise AdapterError(f"{after} was not trained over a frozen adapter: there is nothing to combine (--combine)")
    if record is None and read_record(after) is not None:
        raise AdapterError(
            f"{after} has a {RECORD}, as an initialized adapter does, and {before} has none: give the initialized "
            f"adapter first. If {before} is that adapter, move the {RECORD} into it"
        )
    if different := set(old.modules) ^ set(new.modules):
        raise AdapterError(
            f"{before} and {after} adapt different modules, such as {sorted(different)[0]}: they do not belong together"
        )
    embedding = next((key for key in new.tensors if ".lora_embedding_" in key), None)
    if embedding is not None:
        raise AdapterError(f"{after} has {embedding}: only adapters of linears can be converted")
    if new.config.target_parameters:
        raise AdapterError(
            f"{after} adapts parameters (target_parameters), such as {new.config.target_parameters[0]}, and not only "
            "linears: only adapters of linears can be converted"
        )
    if old.tensors.keys() == new.tensors.keys() and all(torch.equal(v, new.tensors[k]) for k, v in old.tensors.items()):
        raise AdapterError(
            f"{before} and {after} hold the same factors: nothing was learned, or training overwrote the initial one"
        )
    own = read_record(after)
    if own is not None and "weights" in own and not was_trained(after, own):
        raise AdapterError(
            f"{after} was not trained: it has the weights that quailora gave it, so nothing was learned. Give the "
            "adapter after training second"
        )
    tensors = {key: value for key, value in new.tensors.items() if ".lora_A." not in key and ".lora_B." not in key}
    ranks = {}
    for module in new.modules:
        (a0, b0), (a1, b1) = old.factors(module), new.factors(module)
        if a0.shape[1] != a1.shape[1] or b0.shape[0] != b1.shape[0]:
            raise AdapterError(f"{module} has different shapes in {before} and {after}: they do not belong together")
        lora_b, lora_a = _compressed(torch.cat([b1, -b0], dim=1), torch.cat([a1, a0]), rank)
        tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = lora_a, lora_b
        ranks[module] = lora_a.shape[0]
    config = new.config
    set_ranks(config, ranks)
    _write(output, config, tensors, record, full_precision=True)


def _write(
    output: Path, config: LoraConfig, tensors: dict[str, Tensor], record: dict[str, Any] | None, *, full_precision: bool
) -> None:
    """An adapter; if the record of its base is known, with a record of what it is for."""
    if record is not None:
        base = record["base"]
        if full_precision:
            base["full_precision"] = True
            config.base_model_name_or_path, config.revision = base["checkpoint"], base["revision"]
        record |= {"lora": lora_record(config), "trained": True}
    with new_folder(output) as partial:
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(str(partial))
        if record is not None:
            write_files(partial, {RECORD: to_json(record)})


def _compressed(left: Tensor, right: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
    """Balanced factors (m, k), (k, n) of left @ right, for left (m, 2r) and right (2r, n)."""
    q_left, r_left = torch.linalg.qr(left.double())
    q_right, r_right = torch.linalg.qr(right.double().T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T)
    k = min(len(s), rank or len(s))
    root = s[:k].sqrt()
    return (q_left @ (u[:, :k] * root)).float().contiguous(), ((q_right @ (vh[:k].T * root)).T).float().contiguous()
