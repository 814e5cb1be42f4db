"""Which claims of QuAILoRA's paper, and of CLoQ's, were reproduced. The rule for each is in its docstring; the figures
come from the runs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from benchmarks.common import tables
from benchmarks.common.tables import PAPER_TASKS, best_rate, closed_gaps, one, select, values
from benchmarks.paper import bases
from benchmarks.paper.bases import Choice
from quailora.quantization.verify import CALIBRATED

REPRODUCED, NOT, PARTLY = "reproduced", "not reproduced", "in part"
UNTESTABLE, NOT_RUN = "not testable here", "not run yet"


class Finding(NamedTuple):
    claim: str
    where: str  # in the paper
    verdict: str
    found: str


def findings(results: Path) -> list[Finding]:
    """Every claim of QuAILoRA's paper, in its order."""
    return [finding(results) for finding in CLAIMS]


def table(results: Path, claims: Sequence[Callable[[Path], Finding]] | None = None) -> str:
    """Markdown."""
    found = findings(results) if claims is None else [finding(results) for finding in claims]
    rows = [(each.claim, each.where, f"**{each.verdict}**", each.found) for each in found]
    return tables.table(("claim", "in the paper", "", "found"), rows, left=4)


def calibration_set(results: Path) -> Finding:
    """Reproduced if perplexities differ less between calibration sets than a third of what the method gains, in the
    mean over the seeds; in part if more, but within the noise."""
    claim = "The choice of calibration set matters little"
    ranges, gains = [], []
    noise = _noise(results)
    for records in _models(results, "calibration"):
        for name in tables.unique(records, "train"):
            found = tables.whole_seeds(select(records, train=name))
            by_source = {
                each: values(select(found, calibrate=each), "after") for each in tables.unique(found, "calibrate")
            }
            means = {source: mean(each) for source, each in by_source.items() if each}
            zero, ours = means.pop(None, None), list(means.values())
            if len(ours) > 1 and zero is not None:
                ranges.append(max(ours) - min(ours))
                gains.append(zero - mean(ours))
    if not ranges:
        return Finding(claim, "Table 1", NOT_RUN, "")
    large = [most for most, gain in zip(ranges, gains, strict=True) if most >= gain / 3]
    verdict = REPRODUCED if not large else PARTLY if max(large) <= noise else NOT
    shown = "; ".join(f"{most:.3f} of {gain:.3f}" for most, gain in zip(ranges, gains, strict=True))
    return Finding(claim, "Table 1", verdict, f"sets differ by {shown} gained")


def better(bits: str) -> Callable[[Path], Finding]:
    """Reproduced if QuAILoRA ends lower than zero in four of five runs, and on every set by more than the noise in the
    mean; in part if in more than half of the runs."""
    base, where = {"4": ("nf4", "Tables 2 and 4"), "8": ("int8", "Table 4")}[bits]

    def finding(results: Path) -> Finding:
        claim = f"Lower perplexity than zero after training, {bits} bits"
        gains, clear = [], True
        for records in _models(results, "perplexity"):
            for name in tables.unique(records, "train"):
                found = tables.differences(select(records, train=name, base=base), "zero", "quailora")
                gains += found
                clear &= not found or mean(found) > tables.noise(records)
        if not gains:
            return Finding(claim, where, NOT_RUN, "")
        wins = sum(gain > 0 for gain in gains)
        verdict = REPRODUCED if 5 * wins >= 4 * len(gains) and clear else PARTLY if 2 * wins > len(gains) else NOT
        by = f"by {mean(gains):.3f} on average" + ("" if clear else ", within the noise on at least one set")
        return Finding(claim, where, verdict, f"in {wins} of {len(gains)} runs, {by}")

    return finding


def _noise(results: Path) -> float:
    return max(map(tables.noise, _models(results, "perplexity")), default=0.0)


def gap(results: Path) -> Finding:
    """Reproduced if the mean over the models is the paper's, 75 %, or more; in part if it is in its range, 37 % and
    up."""
    gaps = [closed_gaps(records)["8-bit gap"] for records in _models(results, "perplexity")]
    shares = [each.share for each in gaps if each.share is not None]
    claim = "37 to 100 % of the gap to 8 bits is closed after training, by model (75 % on average)"
    if not shares:
        if any(each.seeds for each in gaps):
            return Finding(claim, "Table 2", UNTESTABLE, "8 bits are no better than 4")
        return Finding(claim, "Table 2", NOT_RUN, "")
    share = mean(shares)
    verdict = REPRODUCED if share >= 0.75 else PARTLY if share >= 0.37 else NOT
    return Finding(claim, "Table 2", verdict, tables.percent(share))


def tasks(results: Path) -> Finding:
    """For the paper's models and tasks only. Reproduced if the mean over the models is at least 74 %, as there."""
    claim, where = "74 to 100 % of the gap to 8 bits is closed on seven tasks (86 % on average)", "Tables 3 and 5"
    scored = tables.scored(results)
    shares: list[float] = []
    solved = False
    for model in tables.unique(scored, "model"):
        found = [
            one(scored, model=model, base=base, initialization=kind)
            for base, kind in (("nf4", "zero"), ("nf4", "quailora"), ("int8", "zero"))
        ]
        if all(record and set(record.get("after", ())) >= set(PAPER_TASKS) for record in found):
            solved = True
            # What is wrong, so that less is better, as with perplexities.
            wrong = [[1 - record["after"][task]["acc"] for task in PAPER_TASKS] for record in found if record]
            if (share := tables.eight_bit_gap(*wrong)) is not None:
                shares.append(share)
    if solved and not shares:
        return Finding(claim, where, UNTESTABLE, "8 bits are no better than 4")
    if not shares:
        return Finding(claim, where, UNTESTABLE, "needs 7B and 13B models and tasks from the hub")
    return Finding(claim, where, REPRODUCED if mean(shares) >= 0.74 else NOT, tables.percent(mean(shares)))


def ranks(results: Path) -> Finding:
    """Reproduced if perplexity falls from each rank to the next with QuAILoRA, by more than the noise, and the range of
    zero is less than a third of that; in part if it falls from the first to the last."""
    claim = "Perplexity falls with the rank with QuAILoRA, and hardly at all from zero"
    verdicts, found = [], []
    noise = _noise(results)
    for records in _models(results, "rank"):
        ours = values(select(records, initialization="quailora"), "after")
        zero = values(select(records, initialization="zero"), "after")
        if len(ours) < 3 or len(zero) < 3:
            continue
        falls = all(before - after > noise for before, after in pairwise(ours))
        flat = max(zero) - min(zero) < (max(ours) - min(ours)) / 3
        verdicts.append(REPRODUCED if falls and flat else PARTLY if ours[0] - ours[-1] > noise else NOT)
        found += [
            f"{name} {' → '.join(f'{x:.3f}' for x in course)}" for name, course in (("QuAILoRA", ours), ("zero", zero))
        ]
    return Finding(claim, "Figure 1", _least(verdicts), "; ".join(found))


def at_every_step(results: Path) -> Finding:
    """Both at their best learning rates. Reproduced if QuAILoRA is lower at every point."""
    points = [mine < its for zero, ours in _courses(results) for its, mine in zip(zero, ours, strict=True)]
    claim = "Lower perplexity at every step of training"
    if not points:
        return Finding(claim, "Figure 2", NOT_RUN, "")
    found = f"at {sum(points)} of {len(points)} points, each at its best learning rate"
    return Finding(claim, "Figure 2", REPRODUCED if all(points) else NOT, found)


def not_faster(results: Path) -> Finding:
    """Both at their best learning rates. Reproduced if the lead, in nats, is no larger after training than before."""
    leads = [
        (math.log(zero / ours), math.log(zero_end / ours_end))
        for (zero, *_, zero_end), (ours, *_, ours_end) in _courses(results)
    ]
    claim = "Training is not faster: the whole gain is there before training"
    if not leads:
        return Finding(claim, "Figure 2", NOT_RUN, "")
    before, after = (mean(each) for each in zip(*leads, strict=True))
    found = f"ahead by {before:.3f} nats before training, by {after:.3f} after"
    return Finding(claim, "Figure 2", REPRODUCED if after <= before else NOT, found)


def _courses(results: Path) -> list[tuple[list[float], list[float]]]:
    """For each model: perplexities during training, from zero and from QuAILoRA."""
    found = []
    for records in _models(results, "convergence"):
        zero, ours = (best_rate(records, "nf4", kind) for kind in ("zero", "quailora"))
        if zero is not None and ours is not None:
            found.append(([value for _, value in zero["course"]], [value for _, value in ours["course"]]))
    return found


def uncalibrated(results: Path) -> Finding:
    """Reproduced if the SVD of E gains less than half of what QuAILoRA gains, both of the initial gap and (if run) in
    perplexity after training, each at its best learning rate; in part if of one of the two."""
    claim = "Without calibration (SVD of E) it is ineffective"
    shares, gains = [], []
    for records in _models(results, "initial"):
        svd = one(records, base="nf4", initialization="svd")
        ours = svd and one(records, base="nf4", initialization="quailora", rank=svd["run"]["rank"])
        if svd is not None and ours is not None:
            of_svd, of_ours = (tables.initial_gap(records, each) for each in (svd, ours))
            if of_svd is not None and of_ours is not None:
                shares.append((of_svd, of_ours))
    for records in _models(results, "convergence"):
        found = [best_rate(records, "nf4", kind) for kind in ("zero", "svd", "quailora")]
        ends = [each["after"]["perplexity"] for each in found if each is not None]
        if len(ends) == 3:
            gains.append((ends[0] - ends[1], ends[0] - ends[2]))
    if not shares:
        return Finding(claim, "Section 3", NOT_RUN, "")
    (svd_share, share), *after = (tuple(map(mean, zip(*pairs, strict=True))) for pairs in (shares, gains) if pairs)
    words = [f"closes {tables.percent(svd_share)} of the initial gap, QuAILoRA {tables.percent(share)}"]
    words += [f"after training {svd:.3f} below zero, QuAILoRA {ours:.3f} below" for svd, ours in after]
    small = [svd < ours / 2 for svd, ours in ((svd_share, share), *after)]
    verdict = REPRODUCED if all(small) else PARTLY if any(small) else NOT
    return Finding(claim, "Section 3", verdict, "; ".join(words))


def large(results: Path) -> Finding:
    """Reproduced if models of 13 billion weights gain less than half of what others do, relative to perplexity."""
    claim, where = "Little gain at 13B parameters and more", "Section 4"
    gains: dict[bool, list[float]] = {False: [], True: []}
    for records in _models(results, "perplexity"):
        weights = _billions(records[0]["run"]["model"])
        if weights and (pairs := tables.pairs(select(records, base="nf4"), "zero", "quailora")):
            gains[weights >= 13].append(mean(1 - ours / zero for zero, ours in pairs))
    if not gains[True] or not gains[False]:
        return Finding(claim, where, UNTESTABLE, "no models on both sides of 13B")
    small, great = mean(gains[False]), mean(gains[True])
    found = f"{tables.percent(great)} lower perplexity, and {tables.percent(small)} for smaller models"
    return Finding(claim, where, REPRODUCED if great < small / 2 and small > 0 else NOT, found)


def ahead_at_few_bits(results: Path) -> Finding:
    """Reproduced if CLoQ ends lower than zero at 4, 3 and 2 bits, each at its best rate."""
    claim = "Lower perplexity than zero after training, at 4, 3 and 2 bits"
    leads = _leads(results)
    if len(leads) < 3:
        return Finding(claim, "abstract", NOT_RUN, "")
    verdict = REPRODUCED if all(lead > 0 for lead in leads.values()) else NOT
    return Finding(claim, "abstract", verdict, _by_bits(leads))


def most_at_two_bits(results: Path) -> Finding:
    """Reproduced if CLoQ's lead over zero in nats grows from 4 to 3 and from 3 to 2 bits."""
    claim = "The advantage is largest at 2 bits"
    leads = _leads(results)
    if len(leads) < 3:
        return Finding(claim, "abstract", NOT_RUN, "")
    grows = all(more > less for less, more in pairwise(leads.values()))
    return Finding(claim, "abstract", REPRODUCED if grows else NOT, _by_bits(leads))


def few_bit_tasks(_: Path) -> Finding:
    """Not testable with a model of this size."""
    claim = "Better than other initializations on arithmetic and commonsense tasks"
    return Finding(claim, "abstract", UNTESTABLE, "needs models of 7B parameters and more, and tasks from the hub")


def _leads(results: Path) -> dict[str, float]:
    """Bits -> how far CLoQ ends below zero, in nats per token, in the mean over the sets.

    CLoQ is calibrated codes and then the factors, without alternations; MagR is left out.
    """
    leads = {}
    for base in ("nf4", "int3", "int2"):
        cloq = Choice(base, rounding=CALIBRATED, damping=bases.DEFAULT_DAMPING)
        pairs = [bases.excess(results.parent / "bases", (Choice(base, "zero"), cloq), name) for name in bases.SETS]
        by_set = [zero - ours for zero, ours in pairs if zero is not None and ours is not None]
        if by_set:
            leads[bases.BITS[base]] = mean(by_set)
    return leads


def _by_bits(leads: Mapping[str, float]) -> str:
    return "by " + ", ".join(f"{lead:.3f} nats at {bits}" for bits, lead in leads.items())


def _billions(model: str) -> float | None:
    """Billions of parameters, from the model's name; None where it does not say."""
    match = re.search(r"(\d+(?:\.\d+)?)([bm])\b", model.lower())
    return float(match[1]) * {"b": 1, "m": 1e-3}[match[2]] if match else None


def _models(results: Path, experiment: str) -> list[list[tables.Record]]:
    """The runs of an experiment, by model."""
    records = tables.read(results, experiment)
    return [select(records, model=model) for model in tables.unique(records, "model")]


def _least(verdicts: Sequence[str]) -> str:
    """The worst of several."""
    return max(verdicts, key=(REPRODUCED, PARTLY, NOT).index, default=NOT_RUN)


CLAIMS: Sequence[Callable[[Path], Finding]] = (
    uncalibrated,
    calibration_set,
    better("4"),
    better("8"),
    gap,
    tasks,
    ranks,
    at_every_step,
    not_faster,
    large,
)

CLOQ: Sequence[Callable[[Path], Finding]] = (ahead_at_few_bits, most_at_two_bits, few_bit_tasks)
