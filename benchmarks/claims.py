"""What became of each claim of the paper, and by which rule: the rules stand here, the figures come from the cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import tables
from tables import best_rate, closed_gaps, failed, one, percent, select, values

REPRODUCED, NOT, PARTLY, UNTESTABLE = "reproduced", "not reproduced", "in part", "not testable here"


class Finding(NamedTuple):
    claim: str
    where: str  # in the paper
    verdict: str
    found: str


def findings(results: Path) -> list[Finding]:
    """Every claim of the paper, in its order."""
    return [finding(results) for finding in CLAIMS]


def table(results: Path) -> str:
    """Markdown."""
    rows = [(each.claim, each.where, f"**{each.verdict}**", each.found) for each in findings(results)]
    return tables.table(("claim", "in the paper", "", "found"), rows, left=4)


def calibration_set(results: Path) -> Finding:
    """Reproduced if perplexities differ less between calibration sets than a third of what the method gains."""
    records = tables.read(results, "calibration")
    ranges, gains = [], []
    for name in tables.unique(records, "train"):
        ours = values(select(records, train=name, start="quailora"), "end")
        zero = values(select(records, train=name, start="zero"), "end")
        if len(ours) > 1 and zero:
            ranges.append(max(ours) - min(ours))
            gains.append(zero[0] - mean(ours))
    claim = "Which texts the start is made from matters little beside the method"
    if not ranges:
        return Finding(claim, "Table 1", UNTESTABLE, "")
    verdict = REPRODUCED if all(most < gain / 3 for most, gain in zip(ranges, gains, strict=True)) else NOT
    found = "; ".join(f"{most:.3f} of {gain:.3f}" for most, gain in zip(ranges, gains, strict=True))
    return Finding(claim, "Table 1", verdict, f"perplexities differ by {found}")


def better(bits: str) -> Callable[[Path], Finding]:
    """Reproduced if QuAILoRA ends lower than zero in four of five runs; in part in more than half."""
    base, where = {"4": ("nf4", "Tables 2 and 4"), "8": ("int8", "Table 4")}[bits]

    def finding(results: Path) -> Finding:
        records = tables.read(results, "perplexity")
        pairs = []
        for ours in select(records, base=base, start="quailora"):
            cell = ours["cell"]
            zero = one(records, base=base, start="zero", train=cell["train"], seed=cell["seed"])
            if zero is not None and not failed(zero) and not failed(ours):
                pairs.append((zero["end"]["perplexity"], ours["end"]["perplexity"]))
        claim = f"Lower perplexity than zero after training, {bits} bits"
        if not pairs:
            return Finding(claim, where, UNTESTABLE, "")
        wins = sum(ours < zero for zero, ours in pairs)
        verdict = REPRODUCED if 5 * wins >= 4 * len(pairs) else PARTLY if 2 * wins > len(pairs) else NOT
        gain = mean(zero - ours for zero, ours in pairs)
        return Finding(claim, where, verdict, f"in {wins} of {len(pairs)} runs, by {gain:.3f} in the mean")

    return finding


def gap(results: Path) -> Finding:
    """Reproduced if the mean over seeds is in the range of the paper's models, from 37 % up."""
    found = closed_gaps(tables.read(results, "perplexity"))["paper's gap"]
    shares = [share for share in found if share is not None]
    claim = "The gap to 8 bits closes by 75 % after training (37 to 100 %)"
    if not shares:
        return Finding(claim, "Table 2", UNTESTABLE, "8 bits end no better than 4")
    return Finding(claim, "Table 2", REPRODUCED if mean(shares) >= 0.37 else NOT, percent(found))


def tasks(results: Path) -> Finding:
    return Finding(
        "The gap to 8 bits closes by 86 % on seven tasks",
        "Tables 3 and 5",
        UNTESTABLE,
        "models of 7 and 13 billion weights, and tasks from a hub: `--scale paper` runs them",
    )


def ranks(results: Path) -> Finding:
    """Reproduced if perplexity falls from each rank to the next under QuAILoRA, and zero's range is a third of that."""
    records = tables.read(results, "rank")
    ours = values(select(records, start="quailora"), "end")
    zero = values(select(records, start="zero"), "end")
    claim = "Perplexity falls with the rank under QuAILoRA, hardly at all under zero"
    if len(ours) < 3 or len(zero) < 3:
        return Finding(claim, "Figure 1", UNTESTABLE, "")
    falls = all(after < before for before, after in pairwise(ours))
    flat = max(zero) - min(zero) < (max(ours) - min(ours)) / 3
    shown = f"QuAILoRA {' → '.join(f'{each:.3f}' for each in ours)}; zero {' → '.join(f'{each:.3f}' for each in zero)}"
    return Finding(claim, "Figure 1", REPRODUCED if falls and flat else PARTLY if falls else NOT, shown)


def at_every_step(results: Path) -> Finding:
    """Both at their best learning rates. Reproduced if QuAILoRA is lower at every point."""
    found = _courses(results)
    claim = "Lower perplexity at every step of training"
    if found is None:
        return Finding(claim, "Figure 2", UNTESTABLE, "")
    zero, ours = found
    lower = sum(mine < its for its, mine in zip(zero, ours, strict=True))
    verdict = REPRODUCED if lower == len(ours) else NOT
    return Finding(claim, "Figure 2", verdict, f"at {lower} of {len(ours)} points, each at its best learning rate")


def not_faster(results: Path) -> Finding:
    """Both at their best learning rates. Reproduced if the lead, in nats, is no larger at the end than at the start."""
    found = _courses(results)
    claim = "No faster than zero: the whole gain is there at the start"
    if found is None:
        return Finding(claim, "Figure 2", UNTESTABLE, "")
    (zero, *_, zero_end), (ours, *_, ours_end) = found
    before, after = zero / ours - 1, zero_end / ours_end - 1
    verdict = REPRODUCED if after <= before else NOT
    return Finding(
        claim, "Figure 2", verdict, f"zero's perplexity is {before:.1%} higher at the start, {after:.1%} at the end"
    )


def _courses(results: Path) -> tuple[list[float], list[float]] | None:
    records = tables.read(results, "convergence")
    zero, ours = (best_rate(records, "nf4", kind) for kind in ("zero", "quailora"))
    if zero is None or ours is None:
        return None
    return [value for _, value in zero["course"]], [value for _, value in ours["course"]]


def uncalibrated(results: Path) -> Finding:
    """Reproduced if the SVD of E closes less than half of what QuAILoRA closes before training."""
    records = tables.read(results, "start")
    svd = one(records, base="nf4", start="svd")
    claim = "Without calibration (the SVD of E) it is ineffective"
    if svd is None or failed(svd):
        return Finding(claim, "Section 3", UNTESTABLE, "")
    ours = one(records, base="nf4", start="quailora", rank=svd["cell"]["rank"])
    shares = [None if each is None else tables.start_gap(records, each) for each in (svd, ours)]
    if any(share is None for share in shares):
        return Finding(claim, "Section 3", UNTESTABLE, "")
    verdict = REPRODUCED if shares[0] < shares[1] / 2 else NOT  # type: ignore[operator]
    return Finding(claim, "Section 3", verdict, f"{shares[0]:.0%} of the start gap, QuAILoRA {shares[1]:.0%}")


def large(results: Path) -> Finding:
    return Finding("Little gain at 13 billion weights and more", "Section 4", UNTESTABLE, "one model, of 135 million")


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
