"""The tables of the studies, in Markdown, from the cells on disk. Every figure in docs/results.md comes from here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from quailora.evaluate import gap_closed

Record = dict[str, Any]  # one cell: see study.py
NAMES = {
    "zero": "zero (QLoRA)",
    "quailora": "QuAILoRA, ours",
    "als": "QuAILoRA, als",
    "random": "random, of the same norms",
    "closed-form": "closed form (CLoQ, QERA)",
    "svd": "SVD of E",
    "loftq": "LoftQ, PEFT's",
    "loftq-scaled": "LoftQ, scaling put right",
    "eva": "EVA",
    "corda": "CorDA",
}
BITS = {"nf4": "4", "int8": "8", "bf16": "16"}


def read(results: Path, experiment: str) -> list[Record]:
    """The cells of an experiment that have run, in its order: see `study.Study.save_index`."""
    index = results / f"{experiment}.json"
    if not index.is_file():
        return []
    paths = [results / "cells" / f"{slug}.json" for slug in json.loads(index.read_text(encoding="utf-8"))]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]


def slug(cell: Mapping[str, Any]) -> str:
    """The name of a cell's files, from its settings."""
    parts = (
        Path(cell["model"]).name,
        cell["train"],
        cell["base"],
        cell["start"],
        cell["calibrate"] or "none",
        f"r{cell['rank']}",
        f"lr{cell['learning_rate']:g}",
        f"steps{cell['steps']}x{cell['length']}",
        f"seed{cell['seed']}",
    )
    return "_".join(parts)


# ---- Gaps: what a start gives back, by three measures


def start_gap(records: Sequence[Record], adapted: Record) -> float | None:
    """Start gap closed: of what quantisation costs in perplexity before training, against full precision."""
    cell = adapted["cell"]
    same = {"train": cell["train"], "length": cell["length"], "model": cell["model"]}
    full = one(records, base="bf16", start="zero", **same)
    zero = one(records, base=cell["base"], start="zero", **same)
    if any(failed(each) for each in (full, zero, adapted)):
        return None
    return gap_closed(*(each["start"]["perplexity"] for each in (full, zero, adapted)))  # type: ignore[index]


def paper_gap(zero: Sequence[float], adapted: Sequence[float], eight: Sequence[float]) -> float | None:
    """Paper's gap closed (tables 2b, 3b, 3d): after training, of what 4 bits cost against 8, capped at 1.

    Of one model: a perplexity for each set it was trained on, from zero and from the start in question on 4 bits, and
    from zero on 8; they are averaged over the sets first. None where 8 bits are no better than 4.
    """
    gap = mean(zero) - mean(eight)
    return min(1.0, (mean(zero) - mean(adapted)) / gap) if gap > 0 else None


def sixteen_bit_gap(zero: Sequence[float], adapted: Sequence[float], sixteen: Sequence[float]) -> float | None:
    """16-bit gap closed: after training, of what 4 bits cost against LoRA on 16 bits, not capped. As `paper_gap`."""
    gap = mean(zero) - mean(sixteen)
    return (mean(zero) - mean(adapted)) / gap if gap > 0 else None


# ---- Cells


def select(records: Iterable[Record], **wanted: Any) -> list[Record]:
    """Those whose cell has all of these settings; a callable is a condition on one."""
    return [
        record
        for record in records
        if all(
            value(record["cell"][name]) if callable(value) else record["cell"][name] == value
            for name, value in wanted.items()
        )
    ]


def one(records: Iterable[Record], **wanted: Any) -> Record | None:
    """The first of `select`."""
    found = select(records, **wanted)
    return found[0] if found else None


def failed(record: Record | None) -> bool:
    return record is None or "error" in record


def values(records: Sequence[Record], when: str, what: str = "perplexity") -> list[float]:
    """What was measured "start" or "end", of the cells that did not fail."""
    return [record[when][what] for record in records if not failed(record) and when in record]


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Markdown; the first `left` columns are text, the others numbers."""
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * left}{' ---: |' * (len(heads) - left)}"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean, and the standard deviation over seeds where there are several."""
    if not values:
        return "–"
    shown = f"{mean(values):.{digits}f}"
    return f"{shown} ± {stdev(values):.{digits}f}" if len(values) > 1 else shown


def percent(values: Sequence[float | None]) -> str:
    """As `spread`, of shares; "–" for none, "n/a" where a gap is not there."""
    found = [100 * value for value in values if value is not None]
    if values and not found:
        return "n/a"
    return spread(found, 0) + (" %" if found else "")


def unique(records: Iterable[Record], setting: str) -> list[Any]:
    """In the order of their first appearance."""
    return list(dict.fromkeys(record["cell"][setting] for record in records))


# ---- One table for each experiment


def start(records: Sequence[Record]) -> str:
    """Before training: perplexity, KL and the start gap closed, by rank and by solver."""
    rows = []
    for record in records:
        cell = record["cell"]
        plain = cell["start"] == "zero"
        rows.append(
            (
                BITS[cell["base"]],
                "" if plain else NAMES[cell["start"]],
                "" if plain else str(cell["rank"]),
                spread(values([record], "start")),
                spread(values([record], "start", "kl"), 4),
                "" if plain else percent([start_gap(records, record)]),
            )
        )
    return table(("bits", "start", "rank", "perplexity", "KL, nats", "start gap closed"), rows, left=2)


def perplexity(records: Sequence[Record]) -> str:
    """Before and after the same fine-tuning, on every set, over seeds."""
    rows = []
    sets = unique(records, "train")
    for base, kind in dict.fromkeys((each["cell"]["base"], each["cell"]["start"]) for each in records):
        row = [BITS[base], NAMES[kind]]
        for name in sets:
            found = select(records, train=name, base=base, start=kind)
            row += [spread(values(found, "start")), spread(values(found, "end"), 3)]
        rows.append(row)
    heads = [f"{name}, {when}" for name in sets for when in ("before", "after")]
    return table(("bits", "start", *heads), rows, left=2)


def gaps(records: Sequence[Record]) -> str:
    """The three gaps, of the cells of `perplexity`, over seeds."""
    closed = closed_gaps(records)
    return table(("gap closed by QuAILoRA", "share"), [(name, percent(found)) for name, found in closed.items()])


def closed_gaps(records: Sequence[Record]) -> dict[str, list[float | None]]:
    """Name of a gap -> its share in each seed where every set has run; the start gap in each set besides."""
    found: dict[str, list[float | None]] = {"start gap": [], "paper's gap": [], "16-bit gap": []}
    sets = unique(records, "train")
    for seed in unique(records, "seed"):
        ours = select(records, seed=seed, base="nf4", start="quailora")
        found["start gap"] += [start_gap(records, each) for each in ours]
        ended = {
            (base, kind): values(select(records, seed=seed, base=base, start=kind), "end")
            for base, kind in (("nf4", "zero"), ("nf4", "quailora"), ("int8", "zero"), ("bf16", "zero"))
        }
        if all(len(each) == len(sets) for each in ended.values()):
            both = ended["nf4", "zero"], ended["nf4", "quailora"]
            found["paper's gap"].append(paper_gap(*both, ended["int8", "zero"]))
            found["16-bit gap"].append(sixteen_bit_gap(*both, ended["bf16", "zero"]))
    return found


def rates(records: Sequence[Record]) -> str:
    """After training, by learning rate; the best of each start in bold."""
    rows = []
    every = sorted(unique(records, "learning_rate"))
    for base, kind in dict.fromkeys((each["cell"]["base"], each["cell"]["start"]) for each in records):
        found = [values(select(records, base=base, start=kind, learning_rate=rate), "end") for rate in every]
        best = min((each for each in found if each), default=None)
        shown = [f"**{spread(each, 3)}**" if each and each == best else spread(each, 3) for each in found]
        rows.append((BITS[base], NAMES[kind], *shown))
    return table(("bits", "start", *(f"{rate:g}" for rate in every)), rows, left=2)


def convergence(records: Sequence[Record]) -> str:
    """Perplexity in the course of training, each start at the learning rate where it ends best."""
    rows = []
    steps: list[int] = []
    for base, kind in dict.fromkeys((each["cell"]["base"], each["cell"]["start"]) for each in records):
        record = best_rate(records, base, kind)
        if record is not None:
            steps = [step for step, _ in record["course"]]
            rate = record["cell"]["learning_rate"]
            rows.append((BITS[base], NAMES[kind], f"{rate:g}", *(f"{value:.3f}" for _, value in record["course"])))
    return table(("bits", "start", "learning rate", *(f"step {step}" for step in steps)), rows, left=2)


def best_rate(records: Sequence[Record], base: str, kind: str) -> Record | None:
    """Of the cells of `convergence`, that with the lowest perplexity at the end."""
    found = [each for each in select(records, base=base, start=kind) if values([each], "end")]
    return min(found, key=lambda each: each["end"]["perplexity"], default=None)


def rank(records: Sequence[Record]) -> str:
    """After training, by rank."""
    rows = [
        (
            str(each),
            *(
                spread(values(select(records, rank=each, start=kind), when), 3)
                for kind in ("zero", "quailora")
                for when in ("start", "end")
            ),
        )
        for each in unique(records, "rank")
    ]
    heads = [f"{NAMES[kind]}, {when}" for kind in ("zero", "quailora") for when in ("before", "after")]
    return table(("rank", *heads), rows)


def calibration(records: Sequence[Record]) -> str:
    """After training, by what the start was made from."""
    sets = unique(records, "train")
    rows = []
    for source in unique(records, "calibrate"):
        name = f"QuAILoRA from {source}" if source else NAMES["zero"]
        rows.append((name, *(spread(values(select(records, train=each, calibrate=source), "end"), 3) for each in sets)))
    return table(("start", *(f"trained on {each}" for each in sets)), rows)


TABLES: dict[str, Callable[[Sequence[Record]], str]] = {
    "start": start,
    "perplexity": lambda records: f"{perplexity(records)}\n\n{gaps(records)}",
    "convergence": lambda records: f"{rates(records)}\n\n{convergence(records)}",
    "calibration": calibration,
    "rank": rank,
}


def peers(records: Sequence[Record], results: Path) -> str:
    """What each start costs to make, and what it gives before and after the same fine-tuning."""
    rows = []
    for record in records:
        cell = record["cell"]
        file = results / "costs" / f"{slug(cell)}.json"
        spent = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        made = ("–",) * 3 if spent else ("",) * 3
        if "seconds" in spent:
            ratio = spent["seconds"] / spent["forward_seconds"]
            made = (f"{spent['seconds']:.0f}", f"{ratio:.1f}", f"{spent['bytes'] / 2**30:.2f}")
        shown = [
            spread(values([record], when, what), digits)
            for when in ("start", "end")
            for what, digits in (("perplexity", 3), ("kl", 4))
        ]
        if reason := spent.get("error") or record.get("error"):
            shown = [f"failed: {reason}", "", "", ""]
        rows.append((NAMES[cell["start"]], *made, *shown))
    heads = (
        "start",
        "seconds",
        "of a forward pass",
        "peak, GiB",
        "perplexity before",
        "KL before",
        "after",
        "KL after",
    )
    return table(heads, rows)


def downstream(results: Path) -> str:
    """Accuracy on tasks before and after training, with the harness's standard error."""
    records = (
        [
            json.loads(path.read_text(encoding="utf-8"))
            for slug in json.loads(index.read_text(encoding="utf-8"))
            if (path := results / "tasks" / f"{slug}.json").is_file()
        ]
        if (index := results / "downstream.json").is_file()
        else []
    )
    tasks = list(dict.fromkeys(task for record in records for task in record["after"]))
    rows = []
    for record in records:
        cell = record["cell"]
        scores = [record[when][task] for task in tasks for when in ("before", "after")]
        shown = (f"{100 * each['acc']:.1f} ± {100 * each.get('acc_stderr', 0):.1f}" for each in scores)
        rows.append((BITS[cell["base"]], NAMES[cell["start"]], *shown))
    heads = [f"{task.replace('_', ' ')}, {when}" for task in tasks for when in ("before", "after")]
    return table(("bits", "start", *heads), rows, left=2)


def circumstances(results: Path) -> str:
    """What the cells were made with, and how much of what they were given."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((results / "cells").glob("*.json"))]
    made = [record["made_with"] for record in records]
    shown = {name: sorted({str(each[name]) for each in made}) for name in (made[0] if made else ())}
    lines = [f"- {name}: {', '.join(found)}" for name, found in shown.items()]
    trained = select(records, steps=lambda steps: steps > 0)
    if trained:
        steps, lengths = unique(trained, "steps"), unique(trained, "length")
        lines += [
            f"- fine-tunings: {len(trained)}, of {', '.join(map(str, steps))} steps, "
            f"on sequences of {', '.join(map(str, lengths))} tokens",
            f"- tokens measured: {', '.join(sorted({str(each['tokens']) for each in trained if not failed(each)}))}",
        ]
    return "\n".join(lines)
