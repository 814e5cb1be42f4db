"""The tables of the studies, in Markdown, from the cells on disk. Every figure in docs/results.md comes from here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

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
BY_LAYER = {"base": "nf4", "start": "quailora", "rank": 64}  # the cell of `start` that is shown linear by linear
PAPER_TASKS = ("arc_challenge", "arc_easy", "boolq", "hellaswag", "openbookqa", "piqa", "winogrande")
BITS = {"nf4": "4", "int8": "8", "bf16": "16"}


def read(results: Path, experiment: str, what: str = "cells") -> list[Record]:
    """What the folder `what` has of the cells of an experiment, in its order: see `study.Study.save_index`."""
    slugs = read_json(results / f"{experiment}.json") or []
    return [found for slug in slugs if (found := read_json(results / what / f"{slug}.json")) is not None]


def read_json(path: Path) -> Any:
    """None where there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


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
    """Start gap closed: of what quantization costs in perplexity before training, against full precision."""
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


def shown(records: Sequence[Record], when: str, digits: int = 2, what: str = "perplexity") -> str:
    """`spread` of `values`, and how many of the cells those are, where some failed."""
    found = values(records, when, what)
    if not found:
        return "failed" if any(map(failed, records)) else "–"
    return spread(found, digits) + (f" ({len(found)} of {len(records)})" if len(found) < len(records) else "")


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Markdown; the first `left` columns are text, the others numbers."""
    rows = list(rows)
    if not rows:
        return "Not run yet."
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * left}{' ---: |' * (len(heads) - left)}"]
    return "\n".join(lines + [f"| {' | '.join(map(_escaped, row))} |" for row in rows])


def _escaped(cell: str) -> str:
    return " ".join(cell.replace("|", "\\|").replace("<", "&lt;").split())


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean, and the standard deviation over seeds where there are several."""
    if not values:
        return "–"
    shown = f"{mean(values):.{digits}f}"
    return f"{shown} ± {stdev(values):.{digits}f}" if len(values) > 1 else shown


def percent(share: float | None) -> str:
    """ "n/a" where there is no gap to have a share of."""
    return "n/a" if share is None else f"{100 * share:.0f} %"


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
                shown([record], "start"),
                shown([record], "start", 4, "kl"),
                "" if plain else percent(start_gap(records, record)),
            )
        )
    return table(("bits", "start", "rank", "perplexity", "KL, nats", "start gap closed"), rows, left=2)


def start_settings(records: Sequence[Record]) -> str:
    """How many tokens those were."""
    tokens = {each.get("calibration_tokens") for each in records} - {None}
    measured = {each["tokens"] for each in records if not failed(each)}
    lengths = unique(records, "length")
    return f"{_listed(tokens)} and {_listed(measured)} tokens, in sequences of {_listed(lengths)}."


def _listed(numbers: Iterable[Any]) -> str:
    return ", ".join(map(str, sorted(numbers))) or "–"


def perplexity(records: Sequence[Record]) -> str:
    """Before and after the same fine-tuning, on every set, over seeds."""
    rows = []
    sets = unique(records, "train")
    for base, kind in dict.fromkeys((each["cell"]["base"], each["cell"]["start"]) for each in records):
        row = [BITS[base], NAMES[kind]]
        for name in sets:
            found = select(records, train=name, base=base, start=kind)
            row += [shown(found, "start"), shown(found, "end", 3)]
        rows.append(row)
    heads = [f"{name}, {when}" for name in sets for when in ("before", "after")]
    return table(("bits", "start", *heads), rows, left=2)


def below(records: Sequence[Record]) -> str:
    """By how much perplexities after training are apart, of the same seed: what the seeds share does not count."""
    sets = unique(records, "train")
    rows = []
    for base, other, ours, name in (
        ("nf4", "zero", "quailora", "QuAILoRA below zero"),
        ("int8", "zero", "quailora", "QuAILoRA below zero"),
        ("nf4", "als", "quailora", "ours below als"),
    ):
        found = [differences(select(records, train=each, base=base), other, ours) for each in sets]
        if any(found):
            rows.append((BITS[base], name, *(spread(each, 3) for each in found)))
    return table(("bits", "perplexity after training", *sets), rows, left=2)


def pairs(records: Sequence[Record], other: str, ours: str) -> list[tuple[float, float]]:
    """Perplexities at the end from two starts, of each set and seed that has run with both. records: of one base."""
    found = []
    for record in select(records, start=ours):
        same = {name: record["cell"][name] for name in ("train", "seed")}
        its, mine = values(select(records, start=other, **same), "end"), values([record], "end")
        found += [(its[0], mine[0])] if its and mine else []
    return found


def differences(records: Sequence[Record], other: str, ours: str) -> list[float]:
    """By how much `ours` ends below `other`; see `pairs`."""
    return [its - mine for its, mine in pairs(records, other, ours)]


def chance(records: Sequence[Record]) -> float:
    """How far fine-tunings end apart for no reason: those from the starts of two solvers of the same problem, which
    are next to the same. The most of all sets; 0 where als has not run. records: of `perplexity`, one model."""
    sets = [select(records, train=each, base="nf4") for each in unique(records, "train")]
    return max((abs(each) for found in sets for each in differences(found, "als", "quailora")), default=0.0)


def gaps(records: Sequence[Record]) -> str:
    """The three gaps, of the cells of `perplexity`."""
    rows = []
    for name, gap in closed_gaps(records).items():
        rows.append((name, percent(gap.share), ", ".join(map(percent, gap.seeds))))
    return table(("gap closed by QuAILoRA", "share", "by seed"), rows)


class Gap(NamedTuple):
    """share: of perplexities averaged over the seeds, for in one the gap may be next to none. seeds: each apart."""

    share: float | None
    seeds: list[float | None]


def closed_gaps(records: Sequence[Record]) -> dict[str, Gap]:
    """Name of a gap -> its share, of the cells of `perplexity` of one model. Only seeds that have run on every set."""
    sets = unique(records, "train")
    kinds = [("nf4", "zero"), ("nf4", "quailora"), ("int8", "zero"), ("bf16", "zero")]
    whole: dict[tuple[str, str, str], list[list[float]]] = {}  # when, base, start -> for each seed a value for each set
    for seed in unique(records, "seed"):
        found = {
            (when, *kind): values(select(records, seed=seed, base=kind[0], start=kind[1]), when)
            for kind in kinds
            for when in ("start", "end")
        }
        if all(len(each) == len(sets) for each in found.values()):
            for key, each in found.items():
                whole.setdefault(key, []).append(each)

    def gap(measure: Callable[..., float | None], when: str, other: str) -> Gap:
        series = [whole.get((when, *kind), []) for kind in (("nf4", "zero"), ("nf4", "quailora"), (other, "zero"))]
        seeds = [measure(*each) for each in zip(*series, strict=True)]
        means = [[mean(each) for each in zip(*one, strict=True)] for one in series]
        return Gap(measure(*means) if seeds else None, seeds)

    return {
        "start gap": gap(sixteen_bit_gap, "start", "bf16"),
        "paper's gap": gap(paper_gap, "end", "int8"),
        "16-bit gap": gap(sixteen_bit_gap, "end", "bf16"),
    }


def rates(records: Sequence[Record]) -> str:
    """After training, by learning rate; the best of each start in bold, and whether others were tried on both sides."""
    rows = []
    every = sorted(unique(records, "learning_rate"))
    for base, kind in dict.fromkeys((each["cell"]["base"], each["cell"]["start"]) for each in records):
        found = [values(select(records, base=base, start=kind, learning_rate=rate), "end") for rate in every]
        tried = [number for number, each in enumerate(found) if each]
        best = min(tried, key=lambda number: found[number], default=None)
        cells = [spread(each, 3) for each in found]
        if best is not None:
            cells[best] = f"**{cells[best]}**" + ("" if tried[0] < best < tried[-1] else " (at the edge)")
        rows.append((BITS[base], NAMES[kind], *cells))
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
                shown(select(records, rank=each, start=kind), when, 3)
                for kind in ("zero", "quailora")
                for when in ("start", "end")
            ),
        )
        for each in unique(records, "rank")
    ]
    heads = [f"{NAMES[kind]}, {when}" for kind in ("zero", "quailora") for when in ("before", "after")]
    return table(("rank", *heads), rows)


def calibration(records: Sequence[Record]) -> str:
    """After training, by what the start was made from; of the seeds that have run with every one."""
    sets = unique(records, "train")
    whole = [record for each in sets for record in whole_seeds(select(records, train=each))]
    rows = []
    for source in unique(records, "calibrate"):
        found = select(whole, calibrate=source)
        tokens = ", ".join(sorted({str(each["calibration_tokens"]) for each in found if "calibration_tokens" in each}))
        name = f"QuAILoRA from {source}" if source else NAMES["zero"]
        rows.append((name, tokens, *(shown(select(found, train=each), "end", 3) for each in sets)))
    return table(("start", "calibration tokens", *(f"trained on {each}" for each in sets)), rows)


def whole_seeds(records: Sequence[Record]) -> list[Record]:
    """Those of the seeds that every start has run with: what differs between starts is then not the seed."""
    starts = len(unique(records, "calibrate"))
    return [record for record in records if len(select(records, seed=record["cell"]["seed"])) == starts]


def by_model(draw: Callable[[Sequence[Record]], str]) -> Callable[[Sequence[Record]], str]:
    """A table for each model, under its name where there are several."""

    def all_of_them(records: Sequence[Record]) -> str:
        models = unique(records, "model")
        if len(models) < 2:
            return draw(records)
        return "\n\n".join(f"**{model}**\n\n{draw(select(records, model=model))}" for model in models)

    return all_of_them


TABLES: dict[str, Callable[[Sequence[Record]], str]] = {
    "start": by_model(start),
    "start-settings": start_settings,
    "perplexity": by_model(perplexity),
    "below": by_model(below),
    "gaps": by_model(gaps),
    "rates": by_model(rates),
    "convergence": by_model(convergence),
    "calibration": by_model(calibration),
    "rank": by_model(rank),
}
# The experiment that a table is of, where that has another name.
EXPERIMENTS = {"below": "perplexity", "gaps": "perplexity", "rates": "convergence", "start-settings": "start"}


def peers(results: Path) -> str:
    """What each start costs to make, and what it gives before and after the same fine-tuning."""
    rows = []
    for name in read_json(results / "peers.json") or []:
        spent = read_json(results / "costs" / f"{name}.json") or {}
        record = read_json(results / "cells" / f"{name}.json") or spent
        if not record:
            continue
        cell = record["cell"]
        made = ("–",) * 3 if spent else ("",) * 3
        if "seconds" in spent:
            ratio = spent["seconds"] / spent["forward_seconds"]
            made = (f"{spent['seconds']:.0f}", f"{ratio:.1f}", f"{spent['bytes'] / 2**30:.2f}")
        found = [
            shown([record], when, digits, what)
            for when in ("start", "end")
            for what, digits in (("perplexity", 3), ("kl", 4))
        ]
        if reason := spent.get("error") or record.get("error"):
            found = [f"failed: {reason}", "", "", ""]
        rows.append((NAMES[cell["start"]], *made, *found))
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


def scored(results: Path) -> list[Record]:
    """The cells of `downstream` whose tasks have been solved, in its order."""
    return read(results, "downstream", "tasks")


def downstream(results: Path) -> str:
    """Accuracy on tasks before and after training, with the harness's standard error."""
    records = scored(results)
    tasks = list(dict.fromkeys(task for record in records for task in record.get("after", ())))
    rows = []
    for record in records:
        cell = record["cell"]
        if failed(record):
            found = [f"failed: {record['error']}"]
        else:
            scores = [record[when][task] for task in tasks for when in ("before", "after")]
            found = [f"{100 * each['acc']:.1f} ± {100 * each.get('acc_stderr', 0):.1f}" for each in scores]
        rows.append((BITS[cell["base"]], NAMES[cell["start"]], *found))
    heads = [f"{task.replace('_', ' ')}, {when}" for task in tasks for when in ("before", "after")]
    return table(("bits", "start", *heads), rows, left=2)


def serving(results: Path) -> str:
    """After training: on the base that was trained on, and on full precision."""
    records = read(results, "serving")
    sets = unique(records, "train")
    rows = []
    for base, kind in dict.fromkeys((each["cell"]["base"], each["cell"]["start"]) for each in records):
        row = [NAMES[kind], BITS[base]]
        for name in sets:
            found = select(records, base=base, start=kind, train=name)
            served = [
                value for each in found if (value := read_json(results / "served" / f"{slug(each['cell'])}.json"))
            ]
            row.append(shown(found, "end", 3))
            if base == "bf16":
                row.append(shown(found, "end", 3))
            else:
                row.append("failed" if any(map(failed, served)) else spread([each["perplexity"] for each in served], 3))
        rows.append(row)
    heads = [head for name in sets for head in (f"{name}, as trained", f"{name}, full precision")]
    return table(("start", "bits trained on", *heads), rows)


# Tables of more than cells.
OF_RESULTS: dict[str, Callable[[Path], str]] = {"peers": peers, "downstream": downstream, "serving": serving}


def draw(name: str, results: Path) -> str:
    """A table of TABLES or OF_RESULTS, of what has run."""
    if name in OF_RESULTS:
        return OF_RESULTS[name](results)
    return TABLES[name](read(results, EXPERIMENTS.get(name, name)))


def circumstances(results: Path) -> str:
    """What the cells were made with, and how much of what they were given."""
    records = [read_json(path) for path in sorted((results / "cells").glob("*.json"))]
    made = [record["made_with"] for record in records]
    names = dict.fromkeys(name for each in made for name in each)
    found = {name: sorted({str(each.get(name, "unknown")) for each in made}) for name in names}
    lines = [f"- {name}: {', '.join(each)}" for name, each in found.items()]
    trained = select(records, steps=lambda steps: steps > 0)
    if trained:
        steps, lengths = unique(trained, "steps"), unique(trained, "length")
        lines += [
            f"- fine-tunings: {len(trained)}, of {', '.join(map(str, steps))} steps, "
            f"on sequences of {', '.join(map(str, lengths))} tokens",
            f"- tokens measured: {', '.join(sorted({str(each['tokens']) for each in trained if not failed(each)}))}",
        ]
    return "\n".join(lines)
