"""What the fine-tuning studies share: scales, texts, and runs with their results on disk.

A run is one fine-tuning: a base, an initialization, a learning rate and so on, with what was measured before, during
and after training. Results are JSON files, so a study continues where it stopped, and several processes can share one.
"""

from __future__ import annotations

import gc
import json
import math
import tempfile
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, default_data_collator

import quailora
from benchmarks.common.tables import BY_LAYER, Record, read_json, slug
from benchmarks.common.timing import circumstances
from benchmarks.paper.initializations import PREPARED, kept, load
from quailora import ops
from quailora.calibration.data import Calibration, CalibrationConfig, read_calibration
from quailora.calibration.tokenizer import load_tokenizer
from quailora.errors import QuailoraError
from quailora.files import to_json, write_files
from quailora.modeling.checkpoint import Checkpoint
from quailora.modeling.devices import default_device
from quailora.reporting.report import Report

CALIBRATE, MEASURE = "text-calibrate", "text-measure"  # the names of the two texts of the experiment `initial`
SMOLLM2 = "SmolLM2-135M-Instruct"
ONE_BLOCK = f"{SMOLLM2}-1-block"
LORA_ALPHA = 16
LEARNING_RATE = 2e-4  # this and those below are the paper's
WARM_UP = 0.03
RANK = 64


@dataclass(frozen=True)
class Scale:
    """The size of a study. Everything is cut into sequences of `length` tokens.

    sets: name -> what `load_calibration` reads, with the column that holds the text, if need be.
    held_out: tokens that are measured. probe: those of them that KL, and perplexity during training, are measured on.
    """

    name: str
    models: tuple[str, ...]
    sets: dict[str, tuple[str, str | None]]
    steps: int
    batch: int
    micro_batch: int
    length: int
    calibration: int  # tokens
    held_out: int
    text: int  # tokens measured in the experiment `initial`
    probe: int
    seeds: tuple[int, ...]
    points: int  # at which perplexity is measured during training
    rates: tuple[float, ...]  # of the experiment `convergence`
    ranks: tuple[int, ...] = (8, 16, 32, 64, 128, 256)  # before training
    trained_ranks: tuple[int, ...] = (8, 16, 32, 64, 128, 256)
    questions: int = 200  # of a task made from a text
    learning_rate: float = LEARNING_RATE
    patience: int = 900  # seconds that computing an initialization may take
    longer: dict[str, int] = field(default_factory=dict)  # models with another number of steps


SCALES = {
    "paper": Scale(
        name="paper",
        models=(
            "huggyllama/llama-7b",
            "huggyllama/llama-13b",
            "huggyllama/llama-30b",
            "facebook/opt-13b",
            "facebook/opt-30b",
            "bigscience/bloom-560m",
            "bigscience/bloom-3b",
            "EleutherAI/pythia-70m",
            "EleutherAI/pythia-410m",
            "EleutherAI/pythia-12b",
        ),
        # The other two, Unified-Chip2 and Self-Instruct, cannot be loaded by name: give them with --data.
        sets={"alpaca": ("tatsu-lab/alpaca", None), "hh-rlhf": ("Anthropic/hh-rlhf", "chosen")},
        steps=1000,
        batch=16,
        micro_batch=4,
        length=512,
        calibration=2000 * 512,
        held_out=256 * 512,
        text=256 * 2048,
        probe=32 * 512,
        seeds=(0, 1, 2),
        points=10,
        rates=(LEARNING_RATE, 5e-4, 1e-3),
        longer={"EleutherAI/pythia-70m": 10_000},
        patience=36_000,
    ),
    "small": Scale(
        name="small",
        models=(SMOLLM2,),
        sets={},
        steps=48,
        batch=4,
        micro_batch=4,
        length=128,
        calibration=256 * 128,
        held_out=48 * 128,
        text=16 * 512,
        probe=12 * 128,
        seeds=(0, 1, 2),
        points=4,
        rates=(LEARNING_RATE, 1e-3, 2e-3, 4e-3, 8e-3),
        ranks=(8, 16, 32, RANK, 128, 192),  # k and v have 192 outputs
        trained_ranks=(8, RANK, 192),
        # Between the best rates of zero and QuAILoRA in so few steps (the experiment `convergence`). At the paper's,
        # factors that begin at zero hardly move.
        learning_rate=2e-3,
        patience=7200,
    ),
    "tiny": Scale(
        name="tiny",
        models=(ONE_BLOCK,),
        sets={},
        steps=2,
        batch=2,
        micro_batch=1,
        length=32,
        calibration=16 * 32,
        held_out=4 * 32,
        text=2 * 128,
        probe=2 * 32,
        seeds=(0,),
        points=1,
        rates=(LEARNING_RATE,),
        ranks=(8, RANK),
        trained_ranks=(8, RANK),
        questions=4,
        patience=60,
    ),
}


# ---- Runs


@dataclass(frozen=True)
class Run:
    """One fine-tuning. With no steps, only the initialization is measured.

    train: the set that is trained on, whose held-out part is measured.
    base: a key of `initializations.BASES`.
    initialization: `zero`, or one of `initializations.PREPARED`, calibrated on the set `calibrate`.
    seed: of the order of the training data, of random factors, and of the draw of calibration data.
    """

    model: str
    train: str
    base: str
    initialization: str
    calibrate: str | None
    seed: int
    learning_rate: float
    steps: int
    length: int
    rank: int = RANK

    @property
    def slug(self) -> str:
        """A name for files."""
        return slug(asdict(self))


@dataclass(frozen=True, eq=False)
class Study:
    """Finds and executes runs. results: folder of their JSON. work: folder of adapters, which may be deleted."""

    scale: Scale
    results: Path
    work: Path
    checkpoints: dict[str, str]  # model -> folder or id
    sets: dict[str, tuple[str, str | None]]
    trained: tuple[str, ...]  # the sets that are trained on; the first also calibrates

    def run(self, model: str, train: str, base: str, kind: str, calibrate: str, seed: int, **others: Any) -> Run:
        """A run of initialization `kind`, with the scale's steps, length and learning rate unless given."""
        defaults = {
            "length": self.scale.length,
            "steps": self.scale.longer.get(model, self.scale.steps),
            "learning_rate": self.scale.learning_rate,
        }
        return Run(model, train, base, kind, calibrate if kind in PREPARED else None, seed, **(defaults | others))

    def found(self, run: Run) -> Record | None:
        """The result of a run, None if it has not run. A failed run has an "error"."""
        return read_json(self._path(run))

    def save_index(self, experiment: str, runs: Iterable[Run]) -> None:
        """Record which runs make up an experiment, in the order of its tables; those of earlier calls stay."""
        before = read_json(self.results / f"{experiment}.json") or []
        slugs = list(dict.fromkeys([*(run.slug for run in runs), *before]))
        write_files(self.results, {f"{experiment}.json": json.dumps(slugs, indent=1) + "\n"})

    def run_all(self, runs: Iterable[Run], part: int = 0, parts: int = 1, retry: bool = False) -> None:
        """Execute the runs of a part that have not run yet and, with `retry`, those that failed. A failure is a result.

        Raises QuailoraError for results of another model or of other texts under the same name.
        """
        mine = list(dict.fromkeys(runs))[part::parts]
        for number, run in enumerate(mine, 1):
            if settled(found := self.found(run), retry):
                self._check_same(run, found)
                continue
            started = time.perf_counter()
            try:
                with ops.half_products(default_device(None), [torch.bfloat16]):
                    result = execute(self, run)
                shown = f"perplexity {result['before']['perplexity']:.3f}"
                if "after" in result:
                    shown += f" -> {result['after']['perplexity']:.3f}"
            except Exception as error:  # of any library: the table shows it, and the other runs go on
                result = failure(error)
                shown = result["error"]
            record = {
                "run": asdict(run),
                "scale": self.scale.name,
                "made_from": self._made_from(run),
                **result,
                "made_with": circumstances(),
            }
            write_files(self.results / "runs", {self._path(run).name: to_json(record)})
            took = time.perf_counter() - started
            print(f"{number}/{len(mine)} {run.slug}: {shown}, {took:.0f} s", flush=True)
            gc.collect()

    def _made_from(self, run: Run) -> dict[str, str]:
        """Fingerprints of the checkpoint and the texts; empty if one cannot be read, in which case the run failed."""
        try:
            texts = self.texts(run.model, run.train, run.length)
            found = {"checkpoint": self.checkpoint(run.model).fingerprint, "texts": texts.fingerprint()}
            if run.calibrate:
                found["calibration"] = self.calibration(run).fingerprint()
        except QuailoraError:
            return {}
        return found

    def _check_same(self, run: Run, found: Record) -> None:
        for name, mine in self._made_from(run).items():
            if found.get("made_from", {}).get(name, mine) != mine:
                raise QuailoraError(
                    f"{self._path(run)} has results of other data ({name}) under the same name: give another --results"
                )

    def _path(self, run: Run) -> Path:
        return self.results / "runs" / f"{run.slug}.json"

    @cache  # noqa: B019  one study lives as long as its process
    def checkpoint(self, model: str) -> Checkpoint:
        return Checkpoint(self.checkpoints[model])

    @cache  # noqa: B019
    def texts(self, model: str, name: str, length: int) -> Texts:
        """Raises QuailoraError for a set that was not named, or holds too little."""
        if name not in self.sets:
            raise QuailoraError(f"no data set '{name}': give it with --data {name}=FILE, beside {', '.join(self.sets)}")
        scale, source = self.scale, (self.checkpoint(model), *self.sets[name])
        if name in (CALIBRATE, MEASURE):
            return read_texts(*source, length, *((0, scale.calibration) if name == CALIBRATE else (scale.text, 0)))
        steps = scale.longer.get(model, scale.steps)
        return read_texts(*source, length, scale.held_out, max(scale.calibration, steps * scale.batch * length))

    def calibration(self, run: Run) -> Calibration:
        """The calibration data of an initialization of `initializations.PREPARED`."""
        assert run.calibrate is not None
        texts = self.texts(run.model, run.calibrate, run.length)
        return texts.calibration(self.scale.calibration, run.seed, run.calibrate)

    def load(self, run: Run) -> Any:
        """The model of a run before training."""
        torch.manual_seed(run.seed)
        calibration = self.calibration(run) if run.calibrate else None
        checkpoint = self.checkpoint(run.model)
        return load(checkpoint, run.base, run.initialization, calibration, run.rank, LORA_ALPHA, run.seed, self.work)


def settled(found: Record | None, retry: bool) -> TypeGuard[Record]:
    """Whether there is a result, and it is not a failure to retry."""
    return bool(found) and not (retry and "error" in (found or ()))


def failure(error: Exception) -> Record:
    """What is recorded of an error, whose traceback is printed."""
    traceback.print_exception(error)
    return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


# ---- Texts


@dataclass(frozen=True)
class Texts:
    """Sequences of one length, without padding, each (length,) int64. No record is in both parts.

    ordered: whether they are one continuous text rather than records.
    """

    train: tuple[Tensor, ...]
    held_out: tuple[Tensor, ...]
    ordered: bool

    def fingerprint(self) -> str:
        return Calibration((*self.held_out, *self.train), "").fingerprint()

    def calibration(self, tokens: int, seed: int, source: str) -> Calibration:
        """Up to `tokens` tokens of the training part: the first sequences of a text, or a random draw of records."""
        wanted = tokens // len(self.train[0])
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed)).tolist()
        chosen = (range(len(self.train)) if self.ordered else order)[:wanted]
        return Calibration(tuple(self.train[index] for index in chosen), source, seed)


def read_texts(
    checkpoint: Checkpoint, source: str, column: str | None, length: int, held_out: int, wanted: int
) -> Texts:
    """Shuffled records, with an end-of-sequence token after each, or a text in its order, cut into sequences.

    held_out, wanted: tokens. The first `held_out` are held out; `wanted` or more, if available, are trained on.
    """
    samples = max(64, (held_out + wanted) // 16)
    data = read_calibration(checkpoint, source, CalibrationConfig(samples=samples, sequence_length=1024, column=column))
    ordered = Path(source).suffix in (".txt", ".md")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    tokenizer = load_tokenizer(checkpoint)
    eos = None if ordered or tokenizer is None else tokenizer.eos_token_id
    end = torch.tensor([] if eos is None else [eos], dtype=torch.int64)
    records = [torch.cat([data.sequences[index], end]) for index in (range(len(data)) if ordered else order)]
    count, first = 0, 0
    while first < len(records) and count < held_out:
        count, first = count + len(records[first]), first + 1
    measured, rest = _cut(records[:first], length)[: held_out // length], _cut(records[first:], length)
    if len(measured) < held_out // length or (wanted and not rest):
        raise QuailoraError(f"{source} holds {sum(map(len, records))} tokens, too few to measure on and to train on")
    return Texts(rest, measured, ordered)


def _cut(records: Sequence[Tensor], length: int) -> tuple[Tensor, ...]:
    stream = torch.cat(list(records)) if records else torch.empty(0, dtype=torch.int64)
    return tuple(piece.clone() for piece in stream.split(length) if len(piece) == length)


def in_batches(sequences: Sequence[Tensor]) -> Sequence[Tensor]:
    """Batches (b, t) of about 512 tokens, for measuring perplexity."""
    return torch.stack(list(sequences)).split(max(1, 512 // len(sequences[0])))


# ---- One run


def execute(study: Study, run: Run) -> Record:
    """Initialize, measure, train, measure again."""
    scale, texts = study.scale, study.texts(run.model, run.train, run.length)
    checkpoint = study.checkpoint(run.model)
    batches = in_batches(texts.held_out)
    probe = in_batches(texts.held_out[: max(1, scale.probe // run.length)])
    seconds: dict[str, float] = {}
    started = time.perf_counter()
    model = study.load(run)
    seconds["initialize"] = time.perf_counter() - started

    def measured() -> dict[str, float]:
        return {
            "perplexity": quailora.evaluate.perplexity(model, batches),
            "kl": quailora.evaluate.kl_divergence(model, load(checkpoint, "bf16"), probe),  # loaded for this only
        }

    result: Record = {"tokens": sum(map(len, texts.held_out)), "before": measured(), "seconds": seconds}
    if run.calibrate:
        calibration = study.calibration(run)
        result["calibration_tokens"] = calibration.tokens
    if not run.steps and asdict(run).items() >= BY_LAYER.items():
        report = Report.load(kept(study.work, checkpoint, run.base, run.initialization, calibration, run.rank))
        result["layers"] = [[layer.name, layer.output_error, layer.output_error_after] for layer in report.layers]
    if run.steps:
        started = time.perf_counter()
        result |= train(model, texts.train, run, scale, probe)
        seconds["train"] = time.perf_counter() - started
        result["after"] = measured()
        model.save_pretrained(study.work / "trained" / run.slug)
    return result


def train(
    model: Any, sequences: Sequence[Tensor], run: Run, scale: Scale, probe: Sequence[Tensor]
) -> dict[str, list[Any]]:
    """Fine-tune in place with transformers' Trainer: AdamW, linear schedule.

    Returns the loss of every step and, for the first seed, perplexities on the probe during training.
    """
    course: list[tuple[int, float]] = []
    followed = run.seed == scale.seeds[0]
    every = max(1, run.steps // scale.points)

    class Course(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if followed and state.global_step % every == 0:
                course.append((state.global_step, quailora.evaluate.perplexity(model, probe)))

    if followed:
        course.append((0, quailora.evaluate.perplexity(model, probe)))
    model.config.use_cache = False
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=run.steps,
            per_device_train_batch_size=scale.micro_batch,
            gradient_accumulation_steps=scale.batch // scale.micro_batch,
            learning_rate=run.learning_rate,
            warmup_steps=math.ceil(WARM_UP * run.steps),
            lr_scheduler_type="linear",
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=run.seed,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=[{"input_ids": each, "labels": each} for each in sequences],
            data_collator=default_data_collator,
            callbacks=[Course()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return {"losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], "course": course}
