"""quailora.json, the record beside an adapter: the base that the adapter was made for, and how it was made."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS

import quailora
from quailora.calibration.data import Calibration
from quailora.errors import AdapterError
from quailora.files import read_json
from quailora.modeling.checkpoint import Checkpoint
from quailora.quantization.protocol import QuantizedBase
from quailora.quantization.registry import LIBRARIES, from_dict
from quailora.quantization.rounding import RoundingConfig
from quailora.quantization.verify import CALIBRATED, NEAREST
from quailora.refinement.config import RefinementConfig
from quailora.reporting import markdown
from quailora.solvers.config import SolverConfig

RECORD = "quailora.json"
SECTIONS = ("base", "calibration", "lora", "solver", "versions")  # each a dict
BASE = ("checkpoint", "revision", "fingerprint", "dtype", "quantization")  # the keys of section "base"


def make_record(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    quantization: QuantizedBase,
    solver: SolverConfig,
    data: Calibration,
    config: LoraConfig,
    rounding: RoundingConfig | str = NEAREST,
    base_output: str | Path | None = None,
    refinement: RefinementConfig | None = None,
) -> dict[str, Any]:
    """The record as plain JSON.

    dtype: what the weights of the base are loaded as before they are quantized.
    rounding: how the codes of the base were chosen.
    refinement: how factors were refined.
    base_output: the folder that the base is written to, where it is; the adapter loads it from there.
    """
    given = rounding if quantization.nearest else CALIBRATED  # of a base that was found
    chosen = rounding.rounding if isinstance(rounding, RoundingConfig) else given
    written: dict[str, Any] = {} if base_output is None else {"path": str(Path(base_output).resolve())}
    if isinstance(rounding, RoundingConfig) and chosen == CALIBRATED:
        written["rounding_settings"] = rounding.settings()
    return ({} if refinement is None else {"refinement": asdict(refinement)}) | {
        "quailora": quailora.__version__,
        "base": {
            "checkpoint": checkpoint.name,
            "revision": checkpoint.revision,
            "fingerprint": checkpoint.fingerprint,
            "trust_remote_code": checkpoint.trust_remote_code,
            "auto_class": checkpoint.auto_class,
            "dtype": str(dtype).removeprefix("torch."),
            "quantization": quantization.to_dict(),
            "rounding": chosen,
        }
        | written,
        "solver": asdict(solver),
        "calibration": {
            "source": data.source,
            "samples": len(data),
            "tokens": data.tokens,
            "sequence_length": data.longest,
            "seed": data.seed,
            "fingerprint": data.fingerprint(),
        },
        "lora": lora_record(config),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "peft", *LIBRARIES)},
    }


def lora_record(config: LoraConfig) -> dict[str, Any]:
    return {"r": config.r, "alpha": config.lora_alpha, "use_rslora": config.use_rslora}


def read_record(folder: str | Path) -> dict[str, Any] | None:
    """The record in an adapter's folder; None if there is none, as beside an adapter that quailora did not write.

    Raises:
        AdapterError: the file is damaged.
    """
    path = Path(folder) / RECORD
    record = read_json(path)
    if record is not None:
        missing = [name for name in SECTIONS if not isinstance(record.get(name), dict)]
        missing = missing or [f"base.{name}" for name in BASE if name not in record["base"]]
        if missing:
            raise AdapterError(
                f"{path} is damaged: it lacks {', '.join(missing)}. Restore it or make the adapter again"
            )
    return record


def weights_digest(folder: Path) -> str:
    """SHA-256 of an adapter's weights, which records have as `weights`. Raises AdapterError if they cannot be read."""
    try:
        with (folder / WEIGHTS).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise AdapterError(f"{folder / WEIGHTS} cannot be read: {error}") from error


def was_trained(folder: Path, record: dict[str, Any]) -> bool:
    """Whether an adapter with this record beside it was trained: the record says so, or has the digest of other
    weights. False where it has none, as older ones do."""
    return bool(record.get("trained")) or ("weights" in record and record["weights"] != weights_digest(folder))


def settings_table(record: dict[str, Any]) -> str:
    """The settings of a run as a Markdown table."""
    base, solver, calibration, lora = (record[name] for name in ("base", "solver", "calibration", "lora"))
    revision = f", revision {base['revision']}" if base["revision"] else ""
    iterations = "" if solver["iterations"] is None else f", {markdown.count(solver['iterations'], 'iteration')}"
    of_model, rounding = record.get("model_refinement"), base.get("rounding_settings")
    sequences = markdown.count(calibration["samples"], "sequence")
    rows = {
        "base": f"{base['checkpoint']}{revision}, loaded in {base['dtype']}, fingerprint `{base['fingerprint']}`",
        "quantization": from_dict(base["quantization"]).describe(),
        **({"rounding": f"calibrated, {markdown.pairs(rounding)}"} if rounding else {}),
        "LoRA": markdown.pairs(lora),
        "solver": f"{solver['name']}{iterations}, damping {solver['damping']:g}, seed {solver['seed']}",
        **({"refinement": markdown.pairs(record["refinement"])} if "refinement" in record else {}),
        **({"refinement of the model": markdown.pairs(of_model)} if of_model else {}),
        "calibration data": f"{calibration['source']}: {markdown.count(calibration['tokens'], 'token')} in {sequences} "
        f"of at most {calibration['sequence_length']}, seed {calibration['seed']}",
        "made with": markdown.pairs({"quailora": record["quailora"]} | record["versions"]),
    }
    return markdown.table([{"setting": name, "value": value} for name, value in rows.items()])
