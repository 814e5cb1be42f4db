"""The tables of the studies, in Markdown, from the recorded runs. Every figure in docs/results.md comes from here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, NamedTuple

from quailora.evaluate import gap_closed

Record = dict[str, Any]  # one fine-tuning run: see study.py
NAMES = {
    "zero": "zero (QLoRA)",
    "quailora": "QuAILoRA (Krylov)",
    "als": "QuAILoRA (ALS)",
    "random": "random, same norms",
    "closed-form": "closed form (CLoQ, QERA)",
    "svd": "SVD of E",
    "loftq": "LoftQ (PEFT)",
    "loftq-scaled": "LoftQ (PEFT, scaling fixed)",
    "eva": "EVA",
    "corda": "CorDA",
}
BY_LAYER = {"base": "nf4", "initialization": "quailora", "rank": 64}  # the run of `initial` shown layer by layer
PAPER_TASKS = ("arc_challenge", "arc_easy", "boolq", "hellaswag", "openbookqa", "piqa", "winogrande")
BITS = {"nf4": "4", "int8": "8", "bf16": "16"}


def read(results: Path, experiment: str, what: str = "runs") -> list[Record]:
    """The records in folder `what` for the runs of an experiment, in its order: see `study.Study.save_index`."""
    slugs = read_json(results / f"{experiment}.json") or []
    return [found for slug in slugs if (found := read_json(results / what / f"{slug}.json")) is not None]


def read_json(path: Path) -> Any:
    """None where there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def slug(run: Mapping[str, Any]) -> str:
    """The name of a run's files, from its settings."""
    parts = (
        Path(run["model"]).name,
        run["train"],
        run["base"],
        run["initialization"],
        run["calibrate"] or "none",
        f"r{run['rank']}",
        f"lr{run['learning_rate']:g}",
        f"steps{run['steps']}x{run['length']}",
        f"seed{run['seed']}",
    )
    return "_".join(parts)


# ---- Gap closed, by three measures


def initial_gap(records: Sequence[Record], adapted: Record) -> float | None:
    """Initial gap closed: the share of the gap in perplexity to full precision that is closed before training."""
    run = adapted["run"]
    same = {"train": run["train"], "length": run["length"], "model": run["model"]}
    full = one(records, base="bf16", initialization="zero", **same)
    zero = one(records, base=run["base"], initialization="zero", **same)
    if any(failed(each) for each in (full, zero, adapted)):
        return None
    return gap_closed(*(each["before"]["perplexity"] for each in (full, zero, adapted)))  # type: ignore[index]


def eight_bit_gap(zero: Sequence[float], adapted: Sequence[float], eight: Sequence[float]) -> float | None:
    """8-bit gap closed, the paper's measure (tables 2b, 3b, 3d): after training, the share of the gap between 4 and 8
    bits that the initialization closes, capped at 1.

    Each argument has one perplexity per training set, all of one model: 4 bits from zero, 4 bits from the
    initialization in question, 8 bits from zero. They are averaged over the sets first. None where 8 bits are no better
    than 4.
    """
    gap = mean(zero) - mean(eight)
    return min(1.0, (mean(zero) - mean(adapted)) / gap) if gap > 0 else None


def sixteen_bit_gap(zero: Sequence[float], adapted: Sequence[float], sixteen: Sequence[float]) -> float | None:
    """16-bit gap closed: as `eight_bit_gap`, against LoRA on 16 bits, and not capped."""
    gap = mean(zero) - mean(sixteen)
    return (mean(zero) - mean(adapted)) / gap if gap > 0 else None


# ---- Runs


def select(records: Iterable[Record], **wanted: Any) -> list[Record]:
    """The records whose run has all of these settings; a callable is a condition on one."""
    return [
        record
        for record in records
        if all(
            value(record["run"][name]) if callable(value) else record["run"][name] == value
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
    """What was measured "before" or "after" training, in the runs that did not fail."""
    return [record[when][what] for record in records if not failed(record) and when in record]


def shown(records: Sequence[Record], when: str, digits: int = 2, what: str = "perplexity") -> str:
    """`spread` of `values`, with the number of runs where some failed."""
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


def _escaped(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


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
    return list(dict.fromkeys(record["run"][setting] for record in records))


# ---- One table for each experiment


def initial(records: Sequence[Record]) -> str:
    """Before training: perplexity, KL and the initial gap closed, by rank and by solver."""
    rows = []
    for record in records:
        run = record["run"]
        plain = run["initialization"] == "zero"
        rows.append(
            (
                BITS[run["base"]],
                "" if plain else NAMES[run["initialization"]],
                "" if plain else str(run["rank"]),
                shown([record], "before"),
                shown([record], "before", 4, "kl"),
                "" if plain else percent(initial_gap(records, record)),
            )
        )
    return table(("bits", "initialization", "rank", "perplexity", "KL (nats)", "gap closed"), rows, left=2)


def initial_settings(records: Sequence[Record]) -> str:
    """How many tokens were used for calibration and for measuring."""
    tokens = {each.get("calibration_tokens") for each in records} - {None}
    measured = {each["tokens"] for each in records if not failed(each)}
    lengths = unique(records, "length")
    counts = f"{_listed(tokens)} calibration tokens and {_listed(measured)} measured tokens"
    return f"{counts}, in sequences of {_listed(lengths)}."


def _listed(numbers: Iterable[Any]) -> str:
    return ", ".join(map(str, sorted(numbers))) or "–"


def perplexity(records: Sequence[Record]) -> str:
    """Before and after the same fine-tuning, on every set, over seeds."""
    rows = []
    sets = unique(records, "train")
    for base, kind in dict.fromkeys((each["run"]["base"], each["run"]["initialization"]) for each in records):
        row = [BITS[base], NAMES[kind]]
        for name in sets:
            found = select(records, train=name, base=base, initialization=kind)
            row += [shown(found, "before"), shown(found, "after", 3)]
        rows.append(row)
    heads = [f"{name}, {when}" for name in sets for when in ("before", "after")]
    return table(("bits", "initialization", *heads), rows, left=2)


def below(records: Sequence[Record]) -> str:
    """Differences in perplexity after training between runs of the same seed, so that the noise they share cancels."""
    sets = unique(records, "train")
    rows = []
    for base, other, ours, name in (
        ("nf4", "zero", "quailora", "zero − QuAILoRA"),
        ("int8", "zero", "quailora", "zero − QuAILoRA"),
        ("nf4", "als", "quailora", "ALS − Krylov"),
    ):
        found = [differences(select(records, train=each, base=base), other, ours) for each in sets]
        if any(found):
            rows.append((BITS[base], name, *(spread(each, 3) for each in found)))
    return table(("bits", "difference in perplexity after training", *sets), rows, left=2)


def pairs(records: Sequence[Record], other: str, ours: str) -> list[tuple[float, float]]:
    """Perplexities after training from two initializations, where a set and seed has both. records: of one base."""
    found = []
    for record in select(records, initialization=ours):
        same = {name: record["run"][name] for name in ("train", "seed")}
        its, mine = values(select(records, initialization=other, **same), "after"), values([record], "after")
        found += [(its[0], mine[0])] if its and mine else []
    return found


def differences(records: Sequence[Record], other: str, ours: str) -> list[float]:
    """How far `ours` ends below `other`; see `pairs`."""
    return [its - mine for its, mine in pairs(records, other, ours)]


def noise(records: Sequence[Record]) -> float:
    """The noise of a single comparison: how far apart runs end that start from two solvers of the same problem, whose
    factors are nearly identical. The largest over all sets; 0 where als has not run. records: of `perplexity`, one
    model."""
    sets = [select(records, train=each, base="nf4") for each in unique(records, "train")]
    return max((abs(each) for found in sets for each in differences(found, "als", "quailora")), default=0.0)


def gaps(records: Sequence[Record]) -> str:
    """The three gaps, from the runs of `perplexity`."""
    rows = []
    for name, gap in closed_gaps(records).items():
        rows.append((name, percent(gap.share), ", ".join(map(percent, gap.seeds))))
    return table(("gap closed by QuAILoRA", "share", "by seed"), rows)


class Gap(NamedTuple):
    """share: of perplexities averaged over the seeds, since one seed's gap may be near zero. seeds: their shares."""

    share: float | None
    seeds: list[float | None]


def closed_gaps(records: Sequence[Record]) -> dict[str, Gap]:
    """Name of a gap -> its share, from the runs of `perplexity` of one model. Only seeds that have run on every set."""
    sets = unique(records, "train")
    kinds = [("nf4", "zero"), ("nf4", "quailora"), ("int8", "zero"), ("bf16", "zero")]
    whole: dict[
        tuple[str, str, str], list[list[float]]
    ] = {}  # when, base, initialization -> per seed, one value per set
    for seed in unique(records, "seed"):
        found = {
            (when, *kind): values(select(records, seed=seed, base=kind[0], initialization=kind[1]), when)
            for kind in kinds
            for when in ("before", "after")
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
        "initial gap": gap(sixteen_bit_gap, "before", "bf16"),
        "8-bit gap": gap(eight_bit_gap, "after", "int8"),
        "16-bit gap": gap(sixteen_bit_gap, "after", "bf16"),
    }


def rates(records: Sequence[Record]) -> str:
    """After training, by learning rate; the best of each row in bold, marked if no rate beyond it was tried."""
    rows = []
    every = sorted(unique(records, "learning_rate"))
    for base, kind in dict.fromkeys((each["run"]["base"], each["run"]["initialization"]) for each in records):
        found = [values(select(records, base=base, initialization=kind, learning_rate=rate), "after") for rate in every]
        tried = [number for number, each in enumerate(found) if each]
        best = min(tried, key=lambda number: found[number], default=None)
        shares = [spread(each, 3) for each in found]
        if best is not None:
            shares[best] = f"**{shares[best]}**" + ("" if tried[0] < best < tried[-1] else " (at the edge)")
        rows.append((BITS[base], NAMES[kind], *shares))
    return table(("bits", "initialization", *(f"{rate:g}" for rate in every)), rows, left=2)


def convergence(records: Sequence[Record]) -> str:
    """Perplexity during training, each initialization at its best learning rate."""
    rows = []
    steps: list[int] = []
    for base, kind in dict.fromkeys((each["run"]["base"], each["run"]["initialization"]) for each in records):
        record = best_rate(records, base, kind)
        if record is not None:
            steps = [step for step, _ in record["course"]]
            rate = record["run"]["learning_rate"]
            rows.append((BITS[base], NAMES[kind], f"{rate:g}", *(f"{value:.3f}" for _, value in record["course"])))
    return table(("bits", "initialization", "learning rate", *(f"step {step}" for step in steps)), rows, left=2)


def best_rate(records: Sequence[Record], base: str, kind: str) -> Record | None:
    """The run of `convergence` with the lowest perplexity after training."""
    found = [each for each in select(records, base=base, initialization=kind) if values([each], "after")]
    return min(found, key=lambda each: each["after"]["perplexity"], default=None)


def rank(records: Sequence[Record]) -> str:
    """After training, by rank."""
    rows = [
        (
            str(each),
            *(
                shown(select(records, rank=each, initialization=kind), when, 3)
                for kind in ("zero", "quailora")
                for when in ("before", "after")
            ),
        )
        for each in unique(records, "rank")
    ]
    heads = [f"{NAMES[kind]}, {when}" for kind in ("zero", "quailora") for when in ("before", "after")]
    return table(("rank", *heads), rows)


def calibration(records: Sequence[Record]) -> str:
    """After training, by calibration set; only seeds that have run with every set."""
    sets = unique(records, "train")
    whole = [record for each in sets for record in whole_seeds(select(records, train=each))]
    rows = []
    for source in unique(records, "calibrate"):
        found = select(whole, calibrate=source)
        tokens = ", ".join(sorted({str(each["calibration_tokens"]) for each in found if "calibration_tokens" in each}))
        name = f"QuAILoRA, calibrated on {source}" if source else NAMES["zero"]
        rows.append((name, tokens, *(shown(select(found, train=each), "after", 3) for each in sets)))
    return table(("initialization", "calibration tokens", *(f"trained on {each}" for each in sets)), rows)


def whole_seeds(records: Sequence[Record]) -> list[Record]:
    """The records of seeds that every initialization has run with, so that all are compared on the same seeds."""
    initializations = len(unique(records, "calibrate"))
    return [record for record in records if len(select(records, seed=record["run"]["seed"])) == initializations]


def by_model(draw: Callable[[Sequence[Record]], str]) -> Callable[[Sequence[Record]], str]:
    """A table for each model, under its name where there are several."""

    def all_of_them(records: Sequence[Record]) -> str:
        models = unique(records, "model")
        if len(models) < 2:
            return draw(records)
        return "\n\n".join(f"**{model}**\n\n{draw(select(records, model=model))}" for model in models)

    return all_of_them


TABLES: dict[str, Callable[[Sequence[Record]], str]] = {
    "initial": by_model(initial),
    "initial-settings": initial_settings,
    "perplexity": by_model(perplexity),
    "below": by_model(below),
    "gaps": by_model(gaps),
    "rates": by_model(rates),
    "convergence": by_model(convergence),
    "calibration": by_model(calibration),
    "rank": by_model(rank),
}
# The experiment that a table is of, where that has another name.
EXPERIMENTS = {"below": "perplexity", "gaps": "perplexity", "rates": "convergence", "initial-settings": "initial"}


def baselines(results: Path) -> str:
    """What each initialization costs to compute, and its perplexity and KL before and after the same fine-tuning. One
    forward pass serves all rows: the median of those measured beside each."""
    rows = []
    names = read_json(results / "baselines.json") or []
    costs = {name: read_json(results / "costs" / f"{name}.json") or {} for name in names}
    passes = [spent["forward_seconds"] for spent in costs.values() if "forward_seconds" in spent]
    for name, spent in costs.items():
        record = read_json(results / "runs" / f"{name}.json") or spent
        if not record:
            continue
        run = record["run"]
        made = ("–",) * 3 if spent else ("",) * 3
        if "seconds" in spent:
            ratio = spent["seconds"] / median(passes)
            made = (f"{spent['seconds']:.0f}", f"{ratio:.1f}", f"{spent['bytes'] / 2**30:.2f}")
        found = [
            shown([record], when, digits, what)
            for when in ("before", "after")
            for what, digits in (("perplexity", 3), ("kl", 4))
        ]
        if reason := spent.get("error") or record.get("error"):
            found = [f"failed: {reason}", "", "", ""]
        rows.append((NAMES[run["initialization"]], *made, *found))
    heads = (
        "initialization",
        "seconds",
        "× forward pass",
        "peak, GiB",
        "perplexity before",
        "KL before",
        "perplexity after",
        "KL after",
    )
    return table(heads, rows)


def scored(results: Path) -> list[Record]:
    """The records of `downstream` that have been scored, in its order."""
    return read(results, "downstream", "tasks")


def downstream(results: Path) -> str:
    """Accuracy on tasks before and after training, with lm-eval's standard error."""
    records = scored(results)
    tasks = list(dict.fromkeys(task for record in records for task in record.get("after", ())))
    rows = []
    for record in records:
        run = record["run"]
        if failed(record):
            found = [f"failed: {record['error']}"]
        else:
            scores = [record[when][task] for task in tasks for when in ("before", "after")]
            found = [f"{100 * each['acc']:.1f} ± {100 * each.get('acc_stderr', 0):.1f}" for each in scores]
        rows.append((BITS[run["base"]], NAMES[run["initialization"]], *found))
    heads = [f"{task.replace('_', ' ')}, {when}" for task in tasks for when in ("before", "after")]
    return table(("bits", "initialization", *heads), rows, left=2)


def serving(results: Path) -> str:
    """After training: on the base that was trained on, and on the full-precision model."""
    records = read(results, "serving")
    sets = unique(records, "train")
    rows = []
    for base, kind in dict.fromkeys((each["run"]["base"], each["run"]["initialization"]) for each in records):
        row = [NAMES[kind], BITS[base]]
        for name in sets:
            found = select(records, base=base, initialization=kind, train=name)
            served = [value for each in found if (value := read_json(results / "served" / f"{slug(each['run'])}.json"))]
            row.append(shown(found, "after", 3))
            if base == "bf16":
                row.append(shown(found, "after", 3))
            else:
                row.append("failed" if any(map(failed, served)) else spread([each["perplexity"] for each in served], 3))
        rows.append(row)
    heads = [head for name in sets for head in (f"{name}, as trained", f"{name}, full precision")]
    return table(("initialization", "bits trained on", *heads), rows)


# Tables that need more than the records of one experiment.
OF_RESULTS: dict[str, Callable[[Path], str]] = {"baselines": baselines, "downstream": downstream, "serving": serving}


def draw(name: str, results: Path) -> str:
    """A table of TABLES or OF_RESULTS, from what has run so far."""
    if name in OF_RESULTS:
        return OF_RESULTS[name](results)
    return TABLES[name](read(results, EXPERIMENTS.get(name, name)))


def circumstances(results: Path) -> str:
    """Versions and machine of the runs, and their sizes."""
    records = [read_json(path) for path in sorted((results / "runs").glob("*.json"))]
    made = [record["made_with"] for record in records]
    names = dict.fromkeys(name for each in made for name in each)
    found = {name: sorted({str(each.get(name, "unknown")) for each in made}) for name in names}
    lines = [f"- {name}: {', '.join(each)}" for name, each in found.items()]
    trained = select(records, steps=lambda steps: steps > 0)
    if trained:
        steps, lengths = unique(trained, "steps"), unique(trained, "length")
        lines += [
            f"- fine-tuning runs: {len(trained)}, of {', '.join(map(str, steps))} steps, "
            f"on sequences of {', '.join(map(str, lengths))} tokens",
            f"- tokens measured: {', '.join(sorted({str(each['tokens']) for each in trained if not failed(each)}))}",
        ]
    return "\n".join(lines)
