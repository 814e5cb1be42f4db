"""The experiments of the paper (arXiv 2410.14713), by name.

    python benchmarks/paper/paper.py --scale small --data roleplay=FILE codegen=FILE --text CALIBRATE MEASURE

    initial        before training: perplexity and KL by rank and by solver (not in the paper)
    perplexity     Tables 2 and 4: 4 and 8 bits, from zero and from QuAILoRA, and LoRA on 16 bits
    convergence    Figure 2: perplexity during training; also at other learning rates, from the SVD of E (which ignores
                   the inputs) and from random factors of the same norms (which only have lora_B away from zero)
    rank           Figure 1: after training, by rank
    calibration    Table 1: calibration sets against training sets
    downstream     Tables 3 and 5: tasks, by lm-eval
    serving        adapters trained on 4 bits, served on the full-precision model (not in the paper)

The scale `paper` has the paper's models, data sets and settings. It needs a GPU and access to the hub, and has not been
run. Alpaca and HH-RLHF come from the hub; name the files of the other two sets yourself, as in `--data
alpaca=tatsu-lab/alpaca unified-chip2=unified_chip2.jsonl self-instruct=FILE hh-rlhf=Anthropic/hh-rlhf@chosen`.

`small` takes a few hours on two CPU cores, with SmolLM2-135M-Instruct and the texts you name. `tiny` checks within two
minutes that everything works.

The sets of --data are trained on, and the first also calibrates; those of --calibrate only calibrate. Results are kept
in --results, one file per run. What has run is not run again; what failed is run again with --retry. Two processes can
share the work with --part 1/2 and --part 2/2. The tables are printed at the end; `results.py` puts them into the
documentation.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import quailora
from benchmarks.common import tables
from benchmarks.common.smollm2 import fetch
from benchmarks.common.timing import circumstances
from benchmarks.paper.initializations import kept, load_trained
from benchmarks.paper.study import (
    CALIBRATE,
    MEASURE,
    ONE_BLOCK,
    RANK,
    SCALES,
    SMOLLM2,
    Run,
    Study,
    failure,
    in_batches,
    settled,
)
from quailora import ops
from quailora.calibration.tokenizer import load_tokenizer
from quailora.files import to_json, write_files
from quailora.modeling.devices import default_device
from quailora.modeling.transformers_internals import no_progress_bar

PAIRS = (("nf4", "zero"), ("nf4", "quailora"), ("int8", "zero"), ("int8", "quailora"), ("bf16", "zero"))


# ---- The runs of each experiment


def initial(study: Study) -> Iterator[Run]:
    if MEASURE not in study.sets:
        return
    length = 4 * study.scale.length
    for model in study.scale.models:
        kinds = [(base, "zero", RANK) for base in ("bf16", "nf4", "int8")]
        kinds += [("nf4", "quailora", rank) for rank in study.scale.ranks]
        kinds += [("nf4", solver, RANK) for solver in ("als", "closed-form", "svd")] + [("int8", "quailora", RANK)]
        for base, kind, rank in kinds:
            yield study.run(model, MEASURE, base, kind, CALIBRATE, 0, rank=rank, steps=0, length=length)


def perplexity(study: Study) -> Iterator[Run]:
    for seed in study.scale.seeds:
        for model in study.scale.models:
            for name in study.trained:
                for base, kind in PAIRS:
                    yield study.run(model, name, base, kind, study.trained[0], seed)
    for model in study.scale.models:
        for name in study.trained:
            for kind in ("als", "svd"):
                yield study.run(model, name, "nf4", kind, study.trained[0], 0)


def convergence(study: Study) -> Iterator[Run]:
    """On the first set and seed, at every rate: zero, QuAILoRA, the uncalibrated SVD, and the random control."""
    kinds = (("nf4", "zero"), ("nf4", "quailora"), ("nf4", "svd"), ("nf4", "random"), ("bf16", "zero"))
    for model in study.scale.models:
        for rate in study.scale.rates:
            for base, kind in kinds:
                yield study.run(model, study.trained[0], base, kind, study.trained[0], 0, learning_rate=rate)


def rank(study: Study) -> Iterator[Run]:
    for model in study.scale.models:
        for each in study.scale.trained_ranks:
            for kind in ("zero", "quailora"):
                yield study.run(model, study.trained[0], "nf4", kind, study.trained[0], 0, rank=each)


def calibration(study: Study) -> Iterator[Run]:
    calibrate = [name for name in study.sets if name not in (CALIBRATE, MEASURE)]
    for seed in study.scale.seeds:
        for model in study.scale.models:
            for name in study.trained:
                yield study.run(model, name, "nf4", "zero", study.trained[0], seed)
                for source in calibrate:
                    yield study.run(model, name, "nf4", "quailora", source, seed)


def downstream(study: Study) -> Iterator[Run]:
    """Of the last seed. The fine-tuned adapters are scored on the tasks."""
    if study.scale.name != "paper" and MEASURE not in study.sets:
        return
    for model in study.scale.models:
        for base, kind in PAIRS:
            yield study.run(model, study.trained[0], base, kind, study.trained[0], study.scale.seeds[-1])


def serving(study: Study) -> Iterator[Run]:
    """Of the last seed. Not in the paper: adapters trained on 4 bits, served on the full-precision model."""
    for model in study.scale.models:
        for name in study.trained:
            for base, kind in (("nf4", "zero"), ("nf4", "quailora"), ("bf16", "zero")):
                yield study.run(model, name, base, kind, study.trained[0], study.scale.seeds[-1])


def score_served(study: Study, runs: Iterable[Run], retry: bool) -> None:
    """Perplexity on the full-precision model after training on 4 bits: results/served, one file per run. Adapters that
    were initialized for the quantized base are converted first."""
    for run in runs:
        path = study.results / "served" / f"{run.slug}.json"
        if run.base == "bf16" or settled(tables.read_json(path), retry) or (trained := _trained(study, run)) is None:
            continue
        checkpoint = study.checkpoint(run.model)
        batches = in_batches(study.texts(run.model, run.train, run.length).held_out)
        try:
            with tempfile.TemporaryDirectory() as folder:
                if run.calibrate:
                    initial = kept(
                        study.work, checkpoint, run.base, run.initialization, study.calibration(run), run.rank
                    )
                    quailora.convert(initial, trained, trained := Path(folder) / "converted")
                with ops.half_products(default_device(None), [torch.bfloat16]):
                    model = load_trained(checkpoint, "bf16", trained)
                    found: dict[str, Any] = {"perplexity": quailora.evaluate.perplexity(model, batches)}
        except Exception as error:  # as in `Study.run_all`
            found = failure(error)
        _keep(path, run, found)


def _trained(study: Study, run: Run) -> Path | None:
    """The folder of the adapter that a run trained; None, with a message, if it has been deleted."""
    trained = study.work / "trained" / run.slug
    if trained.is_dir():
        return trained
    print(
        f"{run.slug}: its trained adapter is not in {trained.parent}; delete the result of this run to train it again",
        flush=True,
    )
    return None


def _keep(path: Path, run: Run, found: dict[str, Any]) -> None:
    write_files(path.parent, {path.name: to_json({"run": asdict(run), **found, "made_with": circumstances()})})
    print(f"{run.slug}: {found}", flush=True)


def score_tasks(study: Study, runs: Iterable[Run], retry: bool) -> None:
    """Score the tasks before and after training: results/tasks, one file per run.

    At the scale `paper` they are lm-eval's; otherwise one is made from the text that --text measures on.
    """
    from benchmarks.paper.downstream import score, write_choices  # lm-eval is an extra

    for run in runs:
        path = study.results / "tasks" / f"{run.slug}.json"
        if settled(tables.read_json(path), retry) or (trained := _trained(study, run)) is None:
            continue
        checkpoint = study.checkpoint(run.model)
        found: dict[str, Any] = {}
        try:
            with tempfile.TemporaryDirectory() as folder:
                tasks: list[Any] = list(tables.PAPER_TASKS)
                if study.scale.name != "paper":
                    text = Path(study.sets[MEASURE][0])
                    tasks = [write_choices(text, Path(folder), study.scale.questions, seed=0)]
                for when in ("before", "after"):
                    model = study.load(run) if when == "before" else load_trained(checkpoint, run.base, trained)
                    found[when] = score(model, load_tokenizer(checkpoint), tasks, None, 8)
        except Exception as error:  # as in `Study.run_all`
            found = failure(error)
        _keep(path, run, found)


EXPERIMENTS: dict[str, Callable[[Study], Iterator[Run]]] = {
    "initial": initial,
    "perplexity": perplexity,
    "convergence": convergence,
    "calibration": calibration,
    "rank": rank,
    "downstream": downstream,
    "serving": serving,
}
SCORES = {"downstream": score_tasks, "serving": score_served}  # what else is measured of the trained adapters

SHOWN = {
    "perplexity": ("perplexity", "gaps"),
    "convergence": ("rates", "convergence"),
}  # the tables of an experiment, where not of its name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `read_study` reads."""
    named = "NAME=FILE"
    parser.add_argument("--scale", choices=SCALES, default="paper")
    parser.add_argument("--model", metavar="FOLDER", help=f"instead of the models of the scale ({SMOLLM2} by default)")
    parser.add_argument("--data", nargs="+", default=[], metavar=named, help="sets to train on, or NAME=FILE@COLUMN")
    parser.add_argument("--calibrate", nargs="+", default=[], metavar=named, help="sets used for calibration only")
    parser.add_argument("--text", nargs=2, metavar=("CALIBRATE", "MEASURE"), help="texts for the experiment `initial`")
    parser.add_argument("--results", type=Path, help="where results are kept; docs/results/SCALE by default")
    parser.add_argument("--work", type=Path, help="where adapters are kept; build/evidence/SCALE by default")
    parser.add_argument("--part", default="1/1", metavar="K/N", help="run only the K-th of N parts")
    parser.add_argument("--retry", action="store_true", help="run again what failed")


def read_study(arguments: argparse.Namespace) -> Study:
    """Raises SystemExit if no data is named."""
    scale = SCALES[arguments.scale]
    work = arguments.work or Path("build/evidence") / scale.name
    if scale.name == "tiny" and not arguments.data:
        arguments.data, arguments.text = write_texts(work / "texts")
    sets = dict(scale.sets)
    for entry in (*arguments.data, *arguments.calibrate):
        name, _, source = entry.partition("=")
        file, _, column = source.partition("@")
        sets[name] = (file, column or None)
    trained = tuple(entry.partition("=")[0] for entry in arguments.data) or tuple(scale.sets)
    if not trained:
        raise SystemExit(f"--scale {scale.name} has no data sets of its own: name some with --data NAME=FILE")
    if arguments.text:
        sets |= {CALIBRATE: (arguments.text[0], None), MEASURE: (arguments.text[1], None)}
    checkpoints = {model: arguments.model or provide(model, work) for model in scale.models}
    return Study(
        scale,
        arguments.results or Path("docs/results") / scale.name,
        work,
        checkpoints,
        sets,
        trained,
    )


def read_part(words: str) -> tuple[int, int]:
    """ "2/3" -> (1, 3). Raises SystemExit for anything else."""
    match = re.fullmatch(r"(\d+)/(\d+)", words)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise SystemExit(f"--part {words}: expected K/N with K from 1 to N, such as 1/2")
    return int(match[1]) - 1, int(match[2])


def provide(model: str, work: Path) -> str:
    """The folder of a model that is made here, or an id on the hub."""
    if model == SMOLLM2:
        return str(fetch())
    if model != ONE_BLOCK:
        return model
    folder = work / ONE_BLOCK
    if not folder.is_dir():
        with no_progress_bar():
            whole: Any = AutoModelForCausalLM.from_pretrained(fetch(), dtype="auto")
            whole.model.layers = whole.model.layers[:1]
            whole.config.num_hidden_layers = 1
            whole.save_pretrained(folder)
        AutoTokenizer.from_pretrained(fetch()).save_pretrained(folder)
    return str(folder)


def write_texts(folder: Path) -> tuple[list[str], list[str]]:
    """Values for --data and --text, from the Python reference that ships with Python."""
    from pydoc_data.topics import topics

    folder.mkdir(parents=True, exist_ok=True)
    texts = [topics[name] for name in sorted(topics)]
    parts = {"topics.json": json.dumps([{"text": text} for text in texts])}
    parts |= {"calibrate.txt": "\n".join(texts[::2]), "measure.txt": "\n".join(texts[1::2])}
    for name, content in parts.items():
        (folder / name).write_text(content, encoding="utf-8")
    return [f"topics={folder / 'topics.json'}"], [str(folder / "calibrate.txt"), str(folder / "measure.txt")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    add_arguments(parser)
    arguments = parser.parse_args()
    study = read_study(arguments)
    part, parts = read_part(arguments.part)
    for name in arguments.experiment:
        runs = list(dict.fromkeys(EXPERIMENTS[name](study)))
        if not runs:
            print(f"{name}: nothing to run without --text", flush=True)
            continue
        study.save_index(name, runs)
        study.run_all(runs, part, parts, arguments.retry)
        if name in SCORES:
            SCORES[name](study, runs[part::parts], arguments.retry)
    for name in arguments.experiment:
        for table in SHOWN.get(name, (name,)):
            print(f"\n## {table}\n\n{tables.draw(table, study.results)}")


if __name__ == "__main__":
    main()
