"""The plots of the documentation, as SVG, drawn from the recorded runs by `results.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from benchmarks.common import tables
from benchmarks.common.tables import best_rate, failed, one, select
from benchmarks.paper import bases
from benchmarks.paper.bases import CALIBRATED_DEFAULT, Choice

COLORS = {"zero": "#888888", "quailora": "#0b6e4f", "random": "#c1666b", "bf16": "#222222", "svd": "#3a6ea5"}
# The same bytes on every machine, and text that stays text.
STYLE: dict[Any, Any] = {"svg.hashsalt": "quailora", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False}


def overview(results: Path) -> Figure | None:
    """The idea, W ≈ Q + A Bᵀ, and what it gains in perplexity before training: the README's picture."""
    records = tables.read(results, "initial")
    wanted = {"full precision": ("bf16", "zero"), "NF4": ("nf4", "zero"), "NF4 + QuAILoRA": ("nf4", "quailora")}
    bars = {}
    for name, (base, kind) in wanted.items():
        record = one(records, base=base, initialization=kind, rank=tables.BY_LAYER["rank"])
        if record is None or failed(record):
            return None
        bars[name] = record["before"]["perplexity"]
    figure = _figure(8.6, 2.2)
    idea, axes = figure.subplots(1, 2, width_ratios=(1.15, 1))
    idea.set(xlim=(0, 11.8), ylim=(-1.6, 3.6), aspect="equal")
    idea.axis("off")
    for left, bottom, width, height, color, letter in (
        (0, 0, 3, 3, COLORS["bf16"], "W"),
        (4, 0, 3, 3, COLORS["zero"], "Q"),
        (8, 0, 0.55, 3, COLORS["quailora"], "A"),
        (8.75, 2.45, 3, 0.55, COLORS["quailora"], "Bᵀ"),
    ):
        idea.add_patch(Rectangle((left, bottom), width, height, color=color, alpha=0.9, linewidth=0))
        middle = (left + width / 2, bottom + height / 2)
        idea.annotate(letter, middle, color="white", ha="center", va="center", size=11)
    idea.annotate("≈", (3.5, 1.5), ha="center", va="center", size=14)
    idea.annotate("+", (7.5, 1.5), ha="center", va="center", size=14)
    for x, label in ((1.5, "full precision"), (5.5, "4 bits, frozen"), (9.9, "LoRA, trained")):
        idea.annotate(label, (x, -0.35), ha="center", va="top", size=8)
    idea.annotate("so that W X ≈ (Q + A Bᵀ) X on real inputs X", (5.9, -1.5), ha="center", va="bottom", size=9)
    axes.barh(list(bars), list(bars.values()), color=(COLORS["bf16"], COLORS["zero"], COLORS["quailora"]), height=0.6)
    for row, value in enumerate(bars.values()):
        axes.annotate(f"{value:.1f}", (value, row), xytext=(4, 0), textcoords="offset points", va="center")
    axes.invert_yaxis()
    axes.set(xlabel="perplexity before training", xlim=(0, 1.12 * max(bars.values())))
    axes.spines["right"].set_visible(False)
    axes.tick_params(left=False)
    return figure


def errors(results: Path) -> Figure | None:
    """Output error of every linear layer before and after, by block, one panel per kind of layer."""
    record = one(tables.read(results, "initial"), **tables.BY_LAYER)
    if record is None or failed(record):
        return None
    kinds: dict[str, list[tuple[float, float]]] = {}
    for name, before, after in record["layers"]:
        kinds.setdefault(name.rpartition(".")[2], []).append((before, after))
    figure = _figure(9.5, 2.4)
    (panels,) = figure.subplots(1, len(kinds), sharey=True, squeeze=False)
    for axes, (kind, pairs) in zip(panels, kinds.items(), strict=True):
        axes.plot([before for before, _ in pairs], color=COLORS["zero"], label="zero")
        axes.plot([after for _, after in pairs], color=COLORS["quailora"], label="QuAILoRA")
        axes.set(title=kind, xlabel="block", yscale="log")
    panels[0].set_ylabel("output error")
    panels[0].legend(frameon=False, fontsize=7)
    return figure


def ranks(results: Path) -> Figure | None:
    """Start gap closed against rank."""
    records = tables.read(results, "initial")
    found = [
        (record["run"]["rank"], share)
        for record in select(records, base="nf4", initialization="quailora")
        if (share := tables.initial_gap(records, record)) is not None
    ]
    if len(found) < 2:
        return None
    figure = _figure(4.2, 2.6)
    axes = figure.subplots()
    axes.plot(*zip(*found, strict=True), "o-", color=COLORS["quailora"])
    axes.set(xlabel="rank", ylabel="initial gap closed", ylim=(0, 1), xscale="log")
    axes.set_xticks([rank for rank, _ in found], [str(rank) for rank, _ in found])
    axes.minorticks_off()
    return figure


def convergence(results: Path) -> Figure | None:
    """Held-out perplexity during training, each initialization at its best learning rate."""
    records = tables.read(results, "convergence")
    lines = [("nf4", "zero"), ("nf4", "random"), ("nf4", "svd"), ("nf4", "quailora"), ("bf16", "zero")]
    figure = _figure(4.6, 3.0)
    axes = figure.subplots()
    for base, kind in lines:
        record = best_rate(records, base, kind)
        if record is None:
            return None
        rate = record["run"]["learning_rate"]
        name = f"{tables.BITS[base]} bits, {tables.NAMES[kind]} ({rate:g})"
        color = COLORS[base if base in COLORS else kind]
        axes.plot(*zip(*record["course"], strict=True), "o-", ms=3, color=color, label=name)
    axes.set(xlabel="step", ylabel="perplexity", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.legend(frameon=False, fontsize=7, title="initialization (learning rate)", title_fontsize=7)
    return figure


def bits(results: Path) -> Figure | None:
    """What is left after training, against LoRA on 16 bits, by the bits of the base."""
    found = ("nf4", "int3", "int2")
    lines = {
        "zero (QLoRA)": ("zero", [Choice(base, "zero") for base in found]),
        "QuAILoRA": ("svd", [Choice(base) for base in found]),
        "QuAILoRA, calibrated codes": ("quailora", [replace(CALIBRATED_DEFAULT, base=base) for base in found]),
    }
    figure = _figure(4.6, 3.0)
    axes = figure.subplots()
    for name, (color, choices) in lines.items():
        ends = bases.excess(results.parent / "bases", choices, "roleplay")
        above = [each for each in ends if each is not None]
        if len(above) < len(ends):
            return None
        axes.plot([bases.BITS[base] for base in found], above, "o-", ms=4, color=COLORS[color], label=name)
    axes.set(xlabel="bits", ylabel="nats above LoRA on 16 bits", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.legend(frameon=False, fontsize=7, title="initialization", title_fontsize=7)
    return figure


def tokens(results: Path) -> Figure | None:
    """Seconds of an initialization by number of calibration tokens and stage, next to a bare forward pass."""
    record = tables.read_json(results.parent / "speed" / "initialize.json")
    if record is None or len(record["runs"]) < 2:
        return None
    runs = sorted(record["runs"], key=lambda run: run["samples"])
    sizes = [run["samples"] * run["length"] for run in runs]
    shown = {
        "forward": ["forward"],
        "H": ["H"],
        "solve": ["solve"],
        "load, quantize, write": ["load", "quantize", "write"],
    }
    seconds = {
        name: [median(sum(stages.get(each, 0.0) for each in parts) for stages in run["stages"]) for run in runs]
        for name, parts in shown.items()
    }
    figure = _figure(4.6, 3.0)
    axes = figure.subplots()
    axes.stackplot(
        sizes, *seconds.values(), labels=list(seconds), colors=("#b7d3c6", "#5aa384", COLORS["quailora"], "#dddddd")
    )
    axes.plot(
        sizes, [median(run["forward"]) for run in runs], "o--", ms=3, color=COLORS["bf16"], label="bare forward pass"
    )
    axes.set(xlabel="calibration tokens", ylabel="seconds", xlim=(sizes[0], sizes[-1]), ylim=(0, None))
    axes.legend(frameon=False, fontsize=7, loc="upper left")
    return figure


PLOTS: dict[str, Callable[[Path], Figure | None]] = {
    "overview": overview,
    "errors": errors,
    "rank": ranks,
    "convergence": convergence,
    "bits": bits,
    "tokens": tokens,
}


def draw(results: Path) -> dict[str, Callable[[Path], None]]:
    """Name of a plot's file -> what writes it to a path; of those whose runs are there."""
    with matplotlib.rc_context(STYLE):
        figures = {f"{name}.svg": figure for name, plot in PLOTS.items() if (figure := plot(results)) is not None}

    def saving(figure: Figure) -> Callable[[Path], None]:
        def save(path: Path) -> None:
            options: Any = {"metadata": {"Date": None}, "bbox_inches": "tight"}
            with matplotlib.rc_context(STYLE):
                figure.savefig(path, **options)

        return save

    return {name: saving(figure) for name, figure in figures.items()}


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")
