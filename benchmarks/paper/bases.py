"""What fine-tuning leaves, by bits and by how codes are chosen (not in the paper).

    python benchmarks/paper/bases.py --data roleplay=FILE codegen=FILE [--only initialization] [--seeds 0 1]

    initialization   16 bits, NF4, 3 and 2 bits from zero and with the factors, at rates by factors of 2
    rounding         damping, alternations and grids at 3 and 2 bits, at one rate
    training         alpha matched to QLoRA's rate, and the initialization frozen under an adapter from zero

The model, the texts and the fine-tuning are those of `paper.py --scale small`. Every set calibrates for itself. W and H
are gathered once a set, and a base is made from them as `quailora init` makes it. What is trained is a dense bf16 model
with Q in place of W: it computes what the quantized model does up to rounding, several times faster on a CPU (see
`tests/benchmarks/test_bases.py`). One file a run in --results; what has run is not run again.
"""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import AutoModelForCausalLM

import quailora
from benchmarks.common import tables
from benchmarks.common.layers import gather
from benchmarks.common.smollm2 import fetch
from benchmarks.common.timing import circumstances
from benchmarks.end_to_end.low_bits import Row
from benchmarks.paper.initializations import DTYPE, lora
from benchmarks.paper.study import LORA_ALPHA, RANK, SCALES, Run, Scale, in_batches, read_texts, train
from quailora.adapters.alpha import matched_alpha
from quailora.adapters.quantized_checkpoint import QuantizedCheckpoint
from quailora.adapters.saved_adapter import SavedAdapter
from quailora.adapters.targets import Target
from quailora.calibration.data import Calibration
from quailora.calibration.gram import Gram
from quailora.files import to_json, write_files
from quailora.modeling.checkpoint import Checkpoint
from quailora.pipeline.quantize import Initialized
from quailora.pipeline.stages import Stages
from quailora.quantization.gptq import GPTQ
from quailora.quantization.protocol import QuantizedBase
from quailora.quantization.registry import config_for, from_config
from quailora.quantization.rounding import DEFAULT_ALTERNATIONS, DEFAULT_DAMPING, FULL, QUANTIZED, RoundingConfig
from quailora.quantization.verify import CALIBRATED, NEAREST
from quailora.reporting.record import read_record
from quailora.reporting.report import LayerReport
from quailora.solvers.solve import LoraFactors

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "bases"
SETS = ("roleplay", "codegen")
ZERO_RATES = (2e-3, 4e-3, 8e-3)
RATES = (5e-4, 1e-3, 2e-3)
# Rank of the frozen correction, and of what is trained: at equal total rank, and at equal memory for training.
SPLITS = ("32+32", "16+48", "56+8", "64+64", "16+64", "32+64", "128+64", "192+64")
BITS = {"bf16": "16", "nf4": "4 (NF4)", "int3": "3", "int2": "2", "int3-asymmetric": "3", "int2-asymmetric": "2"}


@dataclass(frozen=True)
class Choice:
    """A base, how its codes are chosen, and the initialization.

    initialization: "zero"; "quailora"; "matched", with the alpha that is matched to zero's rate; or "frozen-R+T", a
        correction of rank R that stays as it is, and a trained adapter of rank T from zero.
    inputs, refine: as `build_adapter` takes them; None is layer by layer, on inputs of the full-precision model.
    """

    base: str
    initialization: str = "quailora"
    rounding: str = NEAREST
    damping: float = 0.0
    alternations: int = 0
    inputs: str | None = None
    refine: str | None = None

    @property
    def codes(self) -> str:
        if self.rounding == NEAREST:
            return "" if self.base == "bf16" else NEAREST
        inputs = f", {self.inputs} inputs" if self.inputs else ""
        return f"{self.rounding}, λ {self.damping:g}, alternations {self.alternations}{inputs}"

    @property
    def grid(self) -> str:
        return "asymmetric" if self.base.endswith("asymmetric") else "symmetric"

    @property
    def title(self) -> str:
        ours = f"QuAILoRA, {self.refine} refined" if self.refine else "QuAILoRA"
        if self.initialization.startswith("frozen-"):
            found, trained = self.ranks
            return f"{ours} of rank {found} frozen, {trained} from zero"
        return {"zero": "zero (QLoRA)", "quailora": ours, "matched": f"{ours}, alpha matched"}[self.initialization]

    @property
    def ranks(self) -> tuple[int, int]:
        """Of the factors that are found, and of those that are trained."""
        if not self.initialization.startswith("frozen-"):
            return RANK, RANK
        found, _, trained = self.initialization.removeprefix("frozen-").partition("+")
        return int(found), int(trained)

    @property
    def by_layer(self) -> bool:
        """Whether every linear is fitted alone, from its W and H."""
        return self.inputs is None and self.refine is None

    def make(self, layers: Mapping[str, tuple[Tensor, Gram]]) -> dict[str, Initialized]:
        """Q and the factors of every linear, `by_layer`; empty for 16 bits."""
        if self.base == "bf16":
            return {}
        rounding = RoundingConfig(NEAREST)
        if self.rounding == CALIBRATED:
            rounding = RoundingConfig(CALIBRATED, self.damping, self.alternations)
        return Row(_base(self.base), rounding).make(layers, self.ranks[0], Stages())

    def build(self, checkpoint: Checkpoint, calibration: Calibration) -> dict[str, Initialized]:
        """The same with what goes along the depth: by `build_adapter`, from its files."""
        form = _base(self.base)
        options: dict[str, Any] = {"quantization": form.to_config(), "refine": self.refine}
        with TemporaryDirectory() as work:
            if self.rounding == CALIBRATED:
                options |= {"base_output": f"{work}/base", "rounding_damping": self.damping}
                options |= {"alternations": self.alternations, "inputs": self.inputs or FULL}
            folder = Path(work) / "adapter"
            quailora.build_adapter(checkpoint, lora(self.ranks[0], LORA_ALPHA), calibration, folder, **options)
            record, saved = read_record(folder), SavedAdapter(folder)
            assert record is not None
            written = QuantizedCheckpoint.recorded(record["base"])
            root = math.sqrt(LORA_ALPHA / self.ranks[0])  # PEFT's scaling is in both alike
            made = {}
            for module in saved.modules:
                name = module.removeprefix("base_model.model.")
                weight = checkpoint.tensor(f"{name}.weight")
                quantized = form.quantize(weight) if written is None else written.stored(name, name)
                b, a = (each.float() for each in saved.factors(module))
                made[name] = Initialized(quantized, LoraFactors(a / root, b.T * root, 0, 0, (), 0, 0, len(b), 0))
            return made


def _base(name: str) -> QuantizedBase:
    if name == "nf4":
        return from_config(config_for("nf4", DTYPE))
    bits, _, grid = name.removeprefix("int").partition("-")
    return GPTQ(int(bits), 64, grid != "asymmetric", DTYPE)


# What `quailora init --bits` does, and the same with `--inputs full`, where every linear is fitted alone.
FULL_INPUTS = Choice("", rounding=CALIBRATED, damping=DEFAULT_DAMPING, alternations=DEFAULT_ALTERNATIONS)
CALIBRATED_DEFAULT = replace(FULL_INPUTS, inputs=QUANTIZED)


def initialization() -> Iterator[tuple[Choice, float]]:
    """Runs of which each choice's best rate is taken."""
    for rate in RATES:
        for base in ("int3", "int2"):
            yield replace(CALIBRATED_DEFAULT, base=base), rate
        yield replace(CALIBRATED_DEFAULT, base="int2-asymmetric", alternations=5), rate
        yield replace(CALIBRATED_DEFAULT, base="int3", refine="blocks"), rate
        yield Choice("nf4"), rate
    for rate in ZERO_RATES:
        for base in ("nf4", "int3", "int2"):
            yield Choice(base, "zero"), rate
    for rate in RATES:
        yield replace(CALIBRATED_DEFAULT, base="nf4"), rate
        for base in ("nf4", "int3", "int2"):
            yield replace(FULL_INPUTS, base=base), rate
        yield replace(FULL_INPUTS, base="nf4", alternations=0), rate
    for rate in ZERO_RATES:
        yield Choice("bf16", "zero"), rate
    for rate in RATES:
        yield Choice("int3"), rate
        yield Choice("int2"), rate


def rounding() -> Iterator[tuple[Choice, float]]:
    """Runs at one rate, the one that is best at the defaults."""
    for base, rate in (("int3", 1e-3), ("int2", 1e-3)):
        yield Choice(base), rate
        for damping in (0.1, 1.0, 0.01):
            for alternations in (2, 0, 5):
                yield Choice(base, rounding=CALIBRATED, damping=damping, alternations=alternations), rate
        yield Choice(f"{base}-asymmetric"), rate
        for inputs in (None, QUANTIZED):
            for alternations in (2, 5):
                choice = replace(FULL_INPUTS, alternations=alternations, inputs=inputs)
                if inputs:
                    yield replace(choice, base=base), rate
                yield replace(choice, base=f"{base}-asymmetric"), rate


def training() -> Iterator[tuple[Choice, float]]:
    """Ways to hand over the same factors, all at rates that suit zero."""
    for base in (Choice("nf4"), replace(CALIBRATED_DEFAULT, base="int3")):
        for way in ("matched", *(f"frozen-{split}" for split in SPLITS)):
            for rate in ZERO_RATES:
                yield replace(base, initialization=way), rate


EXPERIMENTS = {"initialization": initialization, "rounding": rounding, "training": training}


@dataclass(frozen=True)
class Trained:
    """One run: `choice` trained on the set `train`."""

    train: str
    choice: Choice
    learning_rate: float
    seed: int

    @property
    def slug(self) -> str:
        codes = "nearest" if self.choice.rounding == NEAREST else f"{self.choice.damping:g}x{self.choice.alternations}"
        depth = [each for each in (self.choice.inputs, self.choice.refine) if each]
        parts = (self.train, self.choice.base, codes, *depth, self.choice.initialization, f"lr{self.learning_rate:g}")
        return "_".join((*parts, f"seed{self.seed}"))


# ---- One run


def dense_twin(checkpoint: Checkpoint, made: Mapping[str, Initialized], choice: Choice, seed: int) -> Any:
    """A dense model with Q in place of W, and the adapter of `choice` on it, trainable in fp32."""
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint.name, dtype=DTYPE)
    for name, each in made.items():
        model.get_submodule(name).weight.data = each.quantized.dequantize().to(DTYPE)
    torch.manual_seed(seed)
    rank, trained = choice.ranks
    scaling = LORA_ALPHA / RANK
    if choice.initialization == "zero":
        return get_peft_model(model, lora(rank, LORA_ALPHA))
    frozen = choice.initialization.startswith("frozen-")
    alpha = LORA_ALPHA if choice.initialization != "matched" else _matched(made, scaling)
    name = "correction" if frozen else "default"
    adapted: Any = get_peft_model(model, lora(rank, alpha), adapter_name=name)
    for module, layer in adapted.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            factors = made[module].factors
            assert factors is not None
            Target(module, layer, name, layer.r[name], layer.scaling[name]).assign(factors, seed)
    if frozen:  # as `freeze_correction` does
        adapted.add_adapter("default", lora(trained, round(scaling * trained)))
        adapted.set_adapter("default")
        adapted.base_model.set_adapter(["default", name])
        adapted.set_requires_grad(name, False)
    return adapted


class Bench:
    """Makes bases from the W and H of a set, and trains what is made."""

    def __init__(self, checkpoint: Checkpoint, scale: Scale, sets: Mapping[str, Path]) -> None:
        self.checkpoint, self.scale, self.sets = checkpoint, scale, sets
        self._texts = {
            name: read_texts(
                checkpoint,
                str(path),
                None,
                scale.length,
                scale.held_out,
                max(scale.calibration, scale.steps * scale.batch * scale.length),
            )
            for name, path in sets.items()
        }
        self._layers: tuple[str, dict[str, tuple[Tensor, Gram]]] = ("", {})

    def make(self, train_on: str, choice: Choice) -> dict[str, Initialized]:
        calibration = self._texts[train_on].calibration(self.scale.calibration, 0, train_on)
        if not choice.by_layer:
            return choice.build(self.checkpoint, calibration)
        if choice.base != "bf16" and self._layers[0] != train_on:
            self._layers = ("", {})
            self._layers = (train_on, gather(self.checkpoint, calibration))
        return choice.make(self._layers[1])

    def run(self, run: Trained, made: Mapping[str, Initialized]) -> tables.Record:
        texts = self._texts[run.train]
        batches = in_batches(texts.held_out)
        model = dense_twin(self.checkpoint, made, run.choice, run.seed)
        before = quailora.evaluate.perplexity(model, batches)
        its = Run(  # `train` takes its steps, rate and seed
            model="",
            train=run.train,
            base=run.choice.base,
            initialization=run.choice.initialization,
            calibrate=None,
            seed=run.seed,
            learning_rate=run.learning_rate,
            steps=self.scale.steps,
            length=self.scale.length,
        )
        unfollowed = replace(self.scale, seeds=(-1,))  # perplexity during training is of no interest here
        found = train(model, texts.train, its, unfollowed, ())
        return {"before": before, "after": quailora.evaluate.perplexity(model, batches), "losses": found["losses"]}


def run_all(bench: Bench, runs: Sequence[Trained], results: Path) -> None:
    """Execute what has not run, the runs of one base together. In the order of their first run."""
    waiting = [run for run in dict.fromkeys(runs) if tables.read_json(results / f"{run.slug}.json") is None]
    while waiting:
        first = waiting[0]
        mine = [run for run in waiting if run.train == first.train and _made_alike(run.choice, first.choice)]
        waiting = [run for run in waiting if run not in mine]
        made = bench.make(first.train, first.choice)
        for run in mine:
            started = perf_counter()
            record = {"run": asdict(run), **bench.run(run, made), "made_with": circumstances()}
            write_files(results, {f"{run.slug}.json": to_json(record)})
            print(
                f"{run.slug}: {record['before']:.3f} -> {record['after']:.3f}, {perf_counter() - started:.0f} s",
                flush=True,
            )
            gc.collect()


def _made_alike(one: Choice, other: Choice) -> bool:
    return one.ranks[0] == other.ranks[0] and replace(one, initialization="") == replace(other, initialization="")


def _matched(made: Mapping[str, Initialized], scaling: float) -> float:
    rows = []
    for name, each in made.items():
        assert each.factors is not None
        (m, rank), n = each.factors.A.shape, len(each.factors.B)
        nuclear_norm = float(each.factors.A.square().sum())
        rows.append(LayerReport(name, m, n, rank, 0, 0, 0, 0, 0, 0, 0, nuclear_norm))
    return matched_alpha(rows, dict.fromkeys(made, scaling), LORA_ALPHA)


# ---- Tables


def _records(results: Path, experiment: str) -> dict[tuple[str, Choice, float], list[tables.Record]]:
    """Those of an experiment by set, choice and rate, in its order."""
    every = [found for path in sorted(results.glob("*.json")) if (found := tables.read_json(path))]
    grouped: dict[tuple[str, Choice, float], list[tables.Record]] = {}
    for train_on in dict.fromkeys(record["run"]["train"] for record in every):
        for choice, rate in EXPERIMENTS[experiment]():
            wanted = (train_on, choice, rate)
            if found := [record for record in every if _key(record["run"]) == wanted]:
                grouped[wanted] = found
    return grouped


def _key(run: tables.Record) -> tuple[str, Choice, float]:
    return run["train"], Choice(**run["choice"]), run["learning_rate"]


Grouped = Mapping[tuple[str, Choice, float], list[tables.Record]]


def best_rates(grouped: Grouped, seed: int | None = None) -> dict[tuple[str, Choice], float]:
    """Set and choice -> the rate that ends lowest, with one seed or in the mean of those that ran."""
    ends: dict[tuple[str, Choice], dict[float, float]] = {}
    for (name, choice, rate), records in grouped.items():
        after = [record["after"] for record in records if seed in (None, record["run"]["seed"])]
        if after:
            ends.setdefault((name, choice), {})[rate] = mean(after)
    return {key: min(of_rates, key=of_rates.__getitem__) for key, of_rates in ends.items()}


def excess(results: Path, choices: Sequence[Choice], train_on: str) -> list[float | None]:
    """Nats per token that each choice ends above LoRA on 16 bits, both at their best rates, in the mean over the seeds
    that both have; None for what has not run."""
    grouped = _records(results, "initialization") | _records(results, "rounding")
    best = best_rates(grouped, seed=0)

    def ends(choice: Choice) -> dict[int, float]:
        records = grouped.get((train_on, choice, best.get((train_on, choice), 0.0)), [])
        return {record["run"]["seed"]: record["after"] for record in records}

    reference = ends(Choice("bf16", "zero"))
    found = []
    for choice in choices:
        mine = ends(choice)
        pairs = [math.log(mine[seed] / reference[seed]) for seed in mine.keys() & reference.keys()]
        found.append(mean(pairs) if pairs else None)
    return found


def _sets(grouped: Grouped) -> list[str]:
    """Those that have run, in the order of SETS."""
    names = dict.fromkeys(name for name, _, _ in grouped)
    return sorted(names, key=lambda name: SETS.index(name) if name in SETS else len(SETS))


def best_table(results: Path, experiment: str) -> str:
    """Each choice at its best rate, by the first seed; marked with * if no rate beyond it was tried. By bits."""
    grouped = _records(results, experiment)
    best = best_rates(grouped, seed=0)
    sets = _sets(grouped)
    rows = []
    for choice in sorted(dict.fromkeys(choice for _, choice in best), key=lambda choice: list(BITS).index(choice.base)):
        grid = "" if choice.grid == "symmetric" else f", {choice.grid}"
        row = [f"{BITS[choice.base]}{grid}", choice.codes, choice.title]
        for name in sets:
            if (name, choice) not in best:
                row += ["–"] * 3
                continue
            rate = best[name, choice]
            tried = [each for its, of, each in grouped if (its, of) == (name, choice)]
            records = grouped[name, choice, rate]
            row += [
                f"{rate:g}" + ("" if min(tried) < rate < max(tried) else " *"),
                tables.spread([record["before"] for record in records], 1),
                tables.spread([record["after"] for record in records], 3),
            ]
        rows.append(row)
    heads = [f"{name}, {what}" for name in sets for what in ("rate", "before", "after")]
    return tables.table(("bits", "codes", "initialization", *heads), rows, left=3)


def rounding_table(results: Path) -> str:
    """After training on the first set at one rate, by damping and alternations."""
    grouped = _records(results, "rounding")
    first = _sets(grouped)[:1]
    rows = []
    for choice, rate in rounding():
        found = [record for name in first for record in grouped.get((name, choice, rate), [])]
        if found:
            before, after = ([record[when] for record in found] for when in ("before", "after"))
            rows.append(
                (BITS[choice.base], choice.grid, choice.codes, tables.spread(before, 2), tables.spread(after, 3))
            )
    return tables.table(("bits", "grid", "codes", "before", "after"), rows, left=3)


TABLES: dict[str, Callable[[Path], str]] = {
    "bases-initialization": partial(best_table, experiment="initialization"),
    "bases-rounding": rounding_table,
    "bases-training": partial(best_table, experiment="training"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--only", choices=EXPERIMENTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="the first finds the rates")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--scale", choices=("small", "tiny"), default="small")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    sets = {name: Path(path) for name, _, path in (each.partition("=") for each in arguments.data)}
    bench = Bench(Checkpoint(arguments.model or fetch()), SCALES[arguments.scale], sets)
    first, *others = arguments.seeds
    for experiment in [arguments.only] if arguments.only else EXPERIMENTS:
        runs = list(EXPERIMENTS[experiment]())
        for name in list(sets)[: None if experiment == "initialization" else 1]:
            run_all(bench, [Trained(name, choice, rate, first) for choice, rate in runs], arguments.results)
            best = best_rates(_records(arguments.results, experiment), first)
            again = [(choice, rate) for choice, rate in runs if best.get((name, choice)) == rate]
            for seed in others:
                run_all(bench, [Trained(name, choice, rate, seed) for choice, rate in again], arguments.results)
    for draw in TABLES.values():
        print(draw(arguments.results), end="\n\n")


if __name__ == "__main__":
    main()
