"""What a run did, as JSON and Markdown; the record that goes beside an adapter; the adapter's model card."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.text import Text

from quailora.errors import AdapterError, QuailoraError
from quailora.quantization.bitsandbytes import Quantization

RECORD = "quailora.json"
REPORT = "report.json"
SECTIONS = ("base", "calibration", "lora", "solver", "versions")  # of the record, each a dict
BASE = ("checkpoint", "revision", "fingerprint", "dtype", "quantization")  # in the record's section of that name
NAMES_SHOWN = 3


@dataclass(frozen=True)
class LayerReport:
    """One linear. An output error is the root mean square of ‖(E - A Bᵀ) x‖ over the calibration tokens x."""

    name: str
    outputs: int
    inputs: int
    rank: int
    tokens: int  # that reached the layer
    weight_error: float  # ‖E‖_F, E = W - Q
    weight_error_after: float  # ‖E - A Bᵀ‖_F
    output_error: float  # with A Bᵀ = 0
    output_error_after: float
    jitter: float  # what a singular system needed added, relative to its diagonal; 0 ordinarily
    seconds: float  # to quantize and solve

    @property
    def kind(self) -> str:
        """The last part of the name, which linears of one kind share across blocks: "q_proj"."""
        return self.name.rpartition(".")[2]


@dataclass
class Report:
    """What a run did.

    layers: the linears that were initialized.
    left: the targeted modules that keep the LoRA default, each with why.
    notes: what else a person should know.
    record: plain JSON; what the adapter was made for and how. See `quailora.pipeline.build.make_record`.
    stages: seconds by stage.
    memory: bytes: the budget, the plan's peak, and the peak measured. See `quailora.memory.budget.Meter`.
    """

    layers: list[LayerReport]
    left: dict[str, str]
    notes: list[str]
    record: dict[str, Any]
    stages: dict[str, float]
    memory: dict[str, int] = field(default_factory=dict)

    @property
    def error_left(self) -> float:
        """Geometric mean over layers of output_error_after / output_error; see `error_left`."""
        return error_left(self.layers)

    @property
    def seconds(self) -> float:
        """The whole run's."""
        return sum(self.stages.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def to_markdown(self) -> str:
        """The report for a person: settings, each kind of layer, every layer, what was left alone, notes, time."""
        kinds: dict[str, list[LayerReport]] = {}
        for layer in self.layers:
            kinds.setdefault(layer.kind, []).append(layer)
        by_kind = [
            {
                "kind": kind,
                "layers": len(group),
                "output error, mean": _mean(x.output_error for x in group),
                "after": _mean(x.output_error_after for x in group),
                "left": _left(group),
            }
            for kind, group in kinds.items()
        ]
        by_layer = [
            {
                "layer": x.name,
                "m × n": f"{x.outputs} × {x.inputs}",
                "rank": x.rank,
                "tokens": x.tokens,
                "‖E‖": x.weight_error,
                "‖E - A Bᵀ‖": x.weight_error_after,
                "output error": x.output_error,
                "after": x.output_error_after,
                "left": _left([x]),
                "jitter": x.jitter,
                "seconds": x.seconds,
            }
            for x in self.layers
        ]
        stages = [
            {"stage": name, "time": _duration(spent), "share": f"{spent / (self.seconds or 1):.0%}"}
            for name, spent in (self.stages | {"all": self.seconds}).items()
        ]
        left = [f"- {why}: {', '.join(names)}" for why, names in _by_reason(self.left).items()]
        parts = [
            "# QuAILoRA report",
            f"{self._headline()}. The output error of a linear is the root mean square of ‖(E - A Bᵀ) x‖ over the "
            "calibration tokens x, with E = W - Q; before, A Bᵀ is 0.",
            _settings(self.record),
            "## By kind of layer",
            _table(by_kind),
            "## Every layer",
            _table(by_layer),
            *(["## Left at the LoRA default", "\n".join(left)] if left else []),
            *(["## Notes", "\n".join(f"- {note}" for note in self.notes)] if self.notes else []),
            "## Time",
            _table(stages),
            *(
                ["## Memory", _table([{"of": k, "GiB": v / 2**30} for k, v in self.memory.items()])]
                if self.memory
                else []
            ),
        ]
        return "\n\n".join(parts) + "\n"

    def summary(self) -> Text:
        """A few lines for the end of a run, that `print` and rich show alike."""
        calibration = self.record["calibration"]
        lines = [
            self._headline(),
            f"{calibration['tokens']} tokens of {calibration['source']}, {_duration(self.seconds)}",
        ]
        for why, names in _by_reason(self.left).items():
            more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
            lines.append(f"left at the LoRA default: {', '.join(names[:NAMES_SHOWN])}{more} ({why})")
        return Text("\n".join(lines + self.notes))

    def _headline(self) -> str:
        left = _left(self.layers)
        return (
            f"{len(self.layers)} linears initialized; {left} of their output error on the calibration tokens is left "
            "(geometric mean)"
        )

    def save(self, folder: str | Path) -> None:
        """Write report.json, report.md and quailora.json (the record) into `folder`; on failure what stood there stays.

        Raises:
            QuailoraError: the disk is full, or the folder may not be written.
        """
        files = {REPORT: to_json(self.to_dict()), "report.md": self.to_markdown(), RECORD: to_json(self.record)}
        write_files(Path(folder), files)

    @classmethod
    def load(cls, folder: str | Path) -> Report:
        """The inverse of `save`.

        Raises:
            AdapterError: `folder` has no report.json, or not one that `save` wrote.
        """
        path = Path(folder) / REPORT
        values = _read_json(path)
        if values is None:
            raise AdapterError(f"{folder} has no {REPORT}: is it a folder that quailora wrote?")
        try:
            return cls(**values | {"layers": [LayerReport(**layer) for layer in values["layers"]]})
        except (TypeError, KeyError) as error:
            raise AdapterError(f"{path} is no report of quailora: {error!r}") from error


def error_left(layers: Iterable[LayerReport]) -> float:
    """Geometric mean of output_error_after / output_error, over the layers with an output error; 1 if none has one."""
    ratios = [layer.output_error_after / layer.output_error for layer in layers if layer.output_error > 0]
    if 0.0 in ratios:
        return 0.0
    return math.exp(math.fsum(map(math.log, ratios)) / max(1, len(ratios)))


def read_record(folder: str | Path) -> dict[str, Any] | None:
    """The record beside an adapter; None where there is none, as beside an adapter of another origin.

    Raises:
        AdapterError: it is damaged.
    """
    path = Path(folder) / RECORD
    record = _read_json(path)
    if record is not None:
        missing = [name for name in SECTIONS if not isinstance(record.get(name), dict)]
        missing = missing or [f"base.{name}" for name in BASE if name not in record["base"]]
        if missing:
            raise AdapterError(
                f"{path} is damaged: it lacks {', '.join(missing)}. Restore it or make the adapter again"
            )
    return record


def write_files(folder: Path, texts: dict[str, str]) -> None:
    """Write text files by name into `folder`, made if need be. All are on the disk before the first takes its name: a
    failure to write one changes none.

    Raises:
        QuailoraError: the disk is full, or the folder may not be written.
    """
    partial = {folder / name: folder / f".{name}.{os.getpid()}" for name in texts}
    path = folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            for path, text in zip(partial, texts.values(), strict=True):
                with partial[path].open("w", encoding="utf-8") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
            for path in partial:
                os.replace(partial[path], path)
        finally:
            for temporary in partial.values():
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise QuailoraError(
            f"{path} cannot be written: {error.strerror or error}; make room there or give another folder"
        ) from error


def model_card(record: dict[str, Any], report: Report, folder: str = "path/to/this/folder") -> str:
    """README.md for an adapter's folder, as Hugging Face renders it.

    record: of the adapter, `report.record` ordinarily.
    folder: what the example of use calls the adapter's folder.

    Raises:
        AdapterError: no BitsAndBytesConfig gives the recorded quantization, so no code could load the base.
    """
    base = record["base"]
    quantization = Quantization.from_dict(base["quantization"])
    arguments = {
        name: value
        for name, value in quantization.to_config().to_diff_dict().items()
        if not name.startswith("_") and name != "quant_method"
    }
    revision = f"    revision={base['revision']!r},\n" if base["revision"] else ""
    return f"""---
library_name: peft
base_model: {json.dumps(base["checkpoint"], ensure_ascii=False)}
base_model_relation: adapter
pipeline_tag: text-generation
tags:
- quailora
- qlora
- lora
- bitsandbytes
- {quantization.method}
---

# A starting point for QLoRA fine-tuning of {base["checkpoint"]}

This LoRA adapter has not been trained on a task. Its factors undo what quantization does to the outputs of the base's
linears: they minimize ‖(W - Q - A Bᵀ) X‖ for the full-precision weight W, its quantized value Q and the inputs X of
each linear on calibration data (QuAILoRA, [arXiv 2410.14713](https://arxiv.org/abs/2410.14713)). {len(report.layers)}
linears were initialized, and {_left(report.layers)} of their output error on that data is left (geometric mean).
Fine-tuning starts from here instead of from A Bᵀ = 0. Every layer is in `report.md`.

{_settings(record)}

## Use

Only on the quantized base named here, loaded so:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

quantization = BitsAndBytesConfig(
{"".join(f"    {name}={value!r},{chr(10)}" for name, value in arguments.items())})
model = AutoModelForCausalLM.from_pretrained(
    {base["checkpoint"]!r},
{revision}    dtype={base["dtype"]!r},
    quantization_config=quantization,
)
model = PeftModel.from_pretrained(model, {folder!r}, is_trainable=True)
```

Nothing of quailora is needed to train or to serve it.

## Do not merge it into the full-precision weights

A Bᵀ approximates W - Q. The full-precision weights have no such error: added to them, the adapter puts one in, and so
it does on a base quantized in another way. For serving, before or after training, there are

- `quailora merge`: the dense checkpoint Q + scaling · B A, and
- `quailora convert`: what training has learned, as an adapter for the full-precision weights. It needs this folder as
  it is now, so keep a copy before training.
"""


def _settings(record: dict[str, Any]) -> str:
    base, solver, calibration, lora = (record[name] for name in ("base", "solver", "calibration", "lora"))
    revision = f", revision {base['revision']}" if base["revision"] else ""
    iterations = "" if solver["iterations"] is None else f", {solver['iterations']} iterations"
    rows = {
        "base": f"{base['checkpoint']}{revision}, loaded in {base['dtype']}, fingerprint `{base['fingerprint']}`",
        "quantization": Quantization.from_dict(base["quantization"]).describe(),
        "LoRA": _pairs(lora),
        "solver": f"{solver['name']}{iterations}, damping {solver['damping']:g}, seed {solver['seed']}",
        "calibration data": f"{calibration['source']}: {calibration['tokens']} tokens in {calibration['samples']} "
        f"sequences of at most {calibration['sequence_length']}, seed {calibration['seed']}",
        "made with": _pairs({"quailora": record["quailora"]} | record["versions"]),
    }
    return _table([{"setting": name, "value": value} for name, value in rows.items()])


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _left(layers: Iterable[LayerReport]) -> str:
    return f"{error_left(layers):.1%}"


def _table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of rows that have the same columns."""
    columns = list(rows[0]) if rows else []
    lines = [columns, ["---"] * len(columns), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", r"\|").replace("\n", " ")


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


def _by_reason(left: dict[str, str]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for name, why in left.items():
        reasons.setdefault(why, []).append(name)
    return reasons


def _duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def to_json(values: dict[str, Any]) -> str:
    """Strict JSON, for people too: indented, without NaN."""
    return json.dumps(values, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no file. Raises AdapterError where it holds anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise AdapterError(f"{path} is damaged: it holds a {type(values).__name__}, not an object")
    return values
