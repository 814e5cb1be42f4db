"""What a run did, as JSON and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS
from rich.text import Text

from quailora.errors import AdapterError
from quailora.files import read_json, to_json, write_files
from quailora.reporting import markdown
from quailora.reporting.record import RECORD, settings_table, weights_digest

REPORT = "report.json"
NAMES_SHOWN = 3


@dataclass(frozen=True)
class LayerReport:
    """One linear layer. Output errors are root mean squares of ‖(E - A Bᵀ) x‖ over the calibration tokens x."""

    name: str
    outputs: int
    inputs: int
    rank: int
    tokens: int  # calibration tokens that reached the layer
    weight_error: float  # ‖E‖_F, E = W - Q
    weight_error_after: float  # ‖E - A Bᵀ‖_F
    output_error: float  # with A Bᵀ = 0, as QLoRA has it before training
    output_error_after: float
    jitter: float  # what als added to a singular system, relative to its diagonal; usually 0
    seconds: float  # to quantize and solve
    nuclear_norm: float = 0.0  # of A Bᵀ: the sum of its singular values
    digest: str = ""  # of the codes and scales of Q; see `quantization.verify`
    more_damping: float | None = None  # λ of error feedback, where H took more than was asked for
    # Where Q and the factors were found in turn: output_error and output_error_after of each alternation.
    alternations: list[list[float]] = field(default_factory=list)
    # Whether x is what it receives behind quantized layers, and W the target that undoes part of what those left.
    quantized_inputs: bool = False

    @property
    def kind(self) -> str:
        """The last part of the name, such as "q_proj"."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class BlockReport:
    """A block whose factors were refined. Errors are root mean squares of ‖f̂(x̂) - f(x)‖ / ‖f(x)‖ over held-out tokens:
    the output of the deployed block on what the quantized blocks before it give, against the full-precision model."""

    name: str
    tokens: int  # held-out
    error: float  # with the factors found layer by layer
    error_after: float  # with those that were kept
    steps: int  # after which they were taken; 0 where none did better
    stopped: str  # why refinement could not go on; "" if it could
    seconds: float


@dataclass(frozen=True)
class ModelReport:
    """What refining the whole model did: KL(full precision || quantized + factors), in nats, the mean over held-out
    tokens."""

    tokens: int  # held-out
    kl: float  # with the factors as they were
    kl_after: float  # with those that were kept
    steps: int  # after which they were taken; 0 where none did better
    stopped: str  # why refinement could not go on; "" if it could
    seconds: float  # with the full-precision model's pass and the loading of the base


@dataclass
class Report:
    """What a run did.

    layers: the linear layers that were initialized; where blocks were refined, as they were before.
    left: the targeted modules left at LoRA's default initialization, each with the reason.
    notes: what else the user should know.
    record: what the adapter was made for and how, as plain JSON. See `quailora.reporting.record.make_record`.
    stages: seconds spent in each stage.
    memory: bytes: the budget, the planned peak, and the measured peak where it is known.
    blocks: the blocks that were refined.
    model: how the whole model was refined; None where it was not.
    """

    layers: list[LayerReport]
    left: dict[str, str]
    notes: list[str]
    record: dict[str, Any]
    stages: dict[str, float]
    memory: dict[str, int] = field(default_factory=dict)
    blocks: list[BlockReport] = field(default_factory=list)
    model: ModelReport | None = None

    @property
    def error_left(self) -> float:
        """Geometric mean of output_error_after / output_error over the layers; see `error_left`."""
        return error_left(self.layers)

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return sum(self.stages.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def to_markdown(self) -> str:
        """The report for people: settings, kinds of layer, every layer, what was left alone, notes, time, memory."""
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
            {"stage": name, "time": markdown.duration(spent), "share": f"{spent / (self.seconds or 1):.0%}"}
            for name, spent in (self.stages | {"all": self.seconds}).items()
        ]
        by_block = [
            {
                "block": x.name,
                "held-out tokens": x.tokens,
                "error": x.error,
                "after": x.error_after,
                "steps": x.steps,
                "seconds": x.seconds,
            }
            for x in self.blocks
        ]
        left = [f"- {why}: {', '.join(names)}" for why, names in _by_reason(self.left).items()]
        parts = [
            "# QuAILoRA report",
            f"{self._headline()}. The output error of a layer is the root mean square of ‖(E - A Bᵀ) x‖ over the "
            f"calibration tokens x, where E = W - Q; before initialization A Bᵀ is 0.{self._inputs()}",
            settings_table(self.record),
            "## By kind of layer",
            markdown.table(by_kind),
            "## Every layer",
            markdown.table(by_layer),
            *(["## Blocks, refined", _REFINED, markdown.table(by_block)] if by_block else []),
            *(["## The whole model, refined", _refined_model(self.model)] if self.model else []),
            *(["## Left at the LoRA default", "\n".join(left)] if left else []),
            *(["## Notes", "\n".join(f"- {note}" for note in self.notes)] if self.notes else []),
            "## Time",
            markdown.table(stages),
            *(
                ["## Memory", markdown.table([{"of": k, "GiB": v / 2**30} for k, v in self.memory.items()])]
                if self.memory
                else []
            ),
        ]
        return "\n\n".join(parts) + "\n"

    def summary(self) -> Text:
        """A few lines for the end of a run, which `print` and rich show alike."""
        calibration = self.record["calibration"]
        refined = 0.0 if self.model is None else self.model.seconds
        lines = [
            self._headline(),
            f"{markdown.count(calibration['tokens'], 'token')} of {calibration['source']}, "
            f"{markdown.duration(self.seconds - refined)}",
        ]
        if self.model is not None:
            settings = self.record["model_refinement"]
            lines.append(
                f"the whole model: {markdown.count(settings['drawn_tokens'], 'token')} of {settings['data']}, "
                f"{markdown.duration(refined)}"
            )
        for why, names in _by_reason(self.left).items():
            more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
            lines.append(f"left at the LoRA default: {', '.join(names[:NAMES_SHOWN])}{more} ({why})")
        return Text("\n".join(lines + self.notes))

    def _inputs(self) -> str:
        return _QUANTIZED_INPUTS if any(layer.quantized_inputs for layer in self.layers) else ""

    def _headline(self) -> str:
        layers, left = markdown.count(len(self.layers), "linear layer"), _left(self.layers)
        refined = ""
        if self.blocks:
            share = _geometric_mean([x.error_after / x.error for x in self.blocks if x.error > 0])
            blocks = markdown.count(len(self.blocks), "block")
            refined = f". {blocks} refined; {share:.1%} of the error on held-out tokens is left"
        if self.model is not None:
            kl, after = self.model.kl, self.model.kl_after
            refined += f". The whole model refined; KL divergence on held-out tokens {kl:.4f} before, {after:.4f} after"
        return (
            f"{layers} initialized; {left} of their output error on the calibration tokens is left (geometric mean)"
            f"{refined}"
        )

    def save(self, folder: str | Path) -> None:
        """Write report.json, report.md and quailora.json (the record) into `folder`, all three or none.

        The record gets the digest of the adapter's weights in `folder`, if it has none yet, so that they are told from
        trained ones: save the initialized adapter there first.

        Raises:
            QuailoraError: the disk is full, or the folder is not writable.
        """
        if "weights" not in self.record and (Path(folder) / WEIGHTS).is_file():
            self.record["weights"] = weights_digest(Path(folder))
        files = {REPORT: to_json(self.to_dict()), "report.md": self.to_markdown(), RECORD: to_json(self.record)}
        write_files(Path(folder), files)

    @classmethod
    def load(cls, folder: str | Path) -> Report:
        """Read what `save` wrote.

        Raises:
            AdapterError: `folder` has no report.json, or `save` did not write it.
        """
        path = Path(folder) / REPORT
        values = read_json(path)
        if values is None:
            raise AdapterError(f"{folder} has no {REPORT}: give a folder that quailora wrote")
        try:
            layers = [LayerReport(**layer) for layer in values["layers"]]
            blocks = [BlockReport(**block) for block in values.get("blocks", [])]
            model = ModelReport(**values["model"]) if values.get("model") else None
            return cls(**values | {"layers": layers, "blocks": blocks, "model": model})
        except (TypeError, KeyError) as error:
            raise AdapterError(f"{path} is not a report that quailora wrote: {error!r}") from error


_QUANTIZED_INPUTS = (
    " Here x are inputs behind quantized layers with their factors, and W is the target that undoes part of what those "
    "left."
)
_REFINED = (
    "Errors of a block's output are relative to that of the full-precision model, root mean squares over held-out "
    "tokens. The tables above have the factors as they were before."
)


def _refined_model(row: ModelReport) -> str:
    kept = f"those of step {row.steps}" if row.steps else "those from before: none did better"
    stopped = f" It ended early: {row.stopped}." if row.stopped else ""
    return (
        f"KL(full precision || quantized + factors) on {markdown.count(row.tokens, 'held-out token')} is {row.kl:.4f} "
        f"nats before and {row.kl_after:.4f} after; the factors are {kept}.{stopped} It took "
        f"{markdown.duration(row.seconds)}. The tables above have the factors as they were before."
    )


def error_left(layers: Iterable[LayerReport]) -> float:
    """Geometric mean of output_error_after / output_error over the layers that have an output error; 1 if none has."""
    return _geometric_mean([x.output_error_after / x.output_error for x in layers if x.output_error > 0])


def _geometric_mean(ratios: list[float]) -> float:
    if 0.0 in ratios:
        return 0.0
    return math.exp(math.fsum(map(math.log, ratios)) / max(1, len(ratios)))


def _left(layers: Iterable[LayerReport]) -> str:
    return f"{error_left(layers):.1%}"


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


def _by_reason(left: dict[str, str]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for name, why in left.items():
        reasons.setdefault(why, []).append(name)
    return reasons
