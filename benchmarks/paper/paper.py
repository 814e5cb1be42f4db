"""The experiments of the paper (arXiv 2410.14713), by name, with its solver and this project's.

    python benchmarks/paper/paper.py --scale small --data roleplay=FILE codegen=FILE --text CALIBRATE MEASURE

    start          before training: what the start gives back, by rank and by solver (no table of the paper's)
    perplexity     Tables 2 and 4: 4 and 8 bits, from zero and from QuAILoRA, and LoRA on 16 bits
    convergence    Figure 2: the course of training; beside it other learning rates, the SVD of E, which knows no
                   inputs, and random factors of the same norms: what the start knows, what it is to be away from zero
    rank           Figure 1: after training, by rank
    calibration    Table 1: texts to make the start from against texts to train on
    downstream     Tables 3 and 5: tasks, by lm-eval
    serving        what was trained on 4 bits, on full precision (no table of the paper's)

The models, data sets and settings of the scale `paper` are the paper's; it needs a GPU and a data hub, and has not been
run. Alpaca and HH-RLHF it takes from the hub; name the files of the other two sets yourself, as in `--data
alpaca=tatsu-lab/alpaca unified-chip2=unified_chip2.jsonl self-instruct=FILE hh-rlhf=Anthropic/hh-rlhf@chosen`.

`small` takes two CPU cores some hours, with SmolLM2-135M-Instruct and the texts that are named; `tiny` shows within two
minutes that it all works.

A set of --data is trained on, and the first is what starts are made from; one of --calibrate only makes starts. What
has run is kept in --results, one file a cell, and is not run again; what failed is, with --retry. Two processes share
the work with --part 1/2 and --part 2/2. At the end the tables are printed; `results.py` puts them into the
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
from benchmarks.paper.starts import kept, load_trained
from benchmarks.paper.study import (
    CALIBRATE,
    MEASURE,
    ONE_BLOCK,
    RANK,
    SCALES,
    SMOLLM2,
    Cell,
    Study,
    failure,
    in_batches,
    settled,
)
from quailora import ops
from quailora.files import to_json, write_files
from quailora.modeling.streamed_model import no_progress_bar
from quailora.pipeline.setup import default_device, load_tokenizer

PAIRS = (("nf4", "zero"), ("nf4", "quailora"), ("int8", "zero"), ("int8", "quailora"), ("bf16", "zero"))


# ---- The cells of each experiment, what they share first


def start(study: Study) -> Iterator[Cell]:
    if MEASURE not in study.sets:
        return
    length = 4 * study.scale.length
    for model in study.scale.models:
        kinds = [(base, "zero", RANK) for base in ("bf16", "nf4", "int8")]
        kinds += [("nf4", "quailora", rank) for rank in study.scale.ranks]
        kinds += [("nf4", solver, RANK) for solver in ("als", "closed-form", "svd")] + [("int8", "quailora", RANK)]
        for base, kind, rank in kinds:
            yield study.cell(model, MEASURE, base, kind, CALIBRATE, 0, rank=rank, steps=0, length=length)


def perplexity(study: Study) -> Iterator[Cell]:
    for seed in study.scale.seeds:
        for model in study.scale.models:
            for name in study.trained:
                for base, kind in PAIRS:
                    yield study.cell(model, name, base, kind, study.trained[0], seed)
    for model in study.scale.models:
        for name in study.trained:
            for kind in ("als", "svd"):
                yield study.cell(model, name, "nf4", kind, study.trained[0], 0)


def convergence(study: Study) -> Iterator[Cell]:
    """On the first set and seed, at every rate: the starts of both kinds, that without calibration, and the control."""
    kinds = (("nf4", "zero"), ("nf4", "quailora"), ("nf4", "svd"), ("nf4", "random"), ("bf16", "zero"))
    for model in study.scale.models:
        for rate in study.scale.rates:
            for base, kind in kinds:
                yield study.cell(model, study.trained[0], base, kind, study.trained[0], 0, learning_rate=rate)


def rank(study: Study) -> Iterator[Cell]:
    for model in study.scale.models:
        for each in study.scale.trained_ranks:
            for kind in ("zero", "quailora"):
                yield study.cell(model, study.trained[0], "nf4", kind, study.trained[0], 0, rank=each)


def calibration(study: Study) -> Iterator[Cell]:
    calibrate = [name for name in study.sets if name not in (CALIBRATE, MEASURE)]
    for seed in study.scale.seeds:
        for model in study.scale.models:
            for name in study.trained:
                yield study.cell(model, name, "nf4", "zero", study.trained[0], seed)
                for source in calibrate:
                    yield study.cell(model, name, "nf4", "quailora", source, seed)


def downstream(study: Study) -> Iterator[Cell]:
    """Of the last seed. Their fine-tuned adapters are what the tasks are solved with."""
    if study.scale.name != "paper" and MEASURE not in study.sets:
        return
    for model in study.scale.models:
        for base, kind in PAIRS:
            yield study.cell(model, study.trained[0], base, kind, study.trained[0], study.scale.seeds[-1])


def serving(study: Study) -> Iterator[Cell]:
    """Of the last seed. Not in the paper: what was trained on 4 bits, served on full precision."""
    for model in study.scale.models:
        for name in study.trained:
            for base, kind in (("nf4", "zero"), ("nf4", "quailora"), ("bf16", "zero")):
                yield study.cell(model, name, base, kind, study.trained[0], study.scale.seeds[-1])


def score_served(study: Study, cells: Iterable[Cell], retry: bool) -> None:
    """Perplexity on full precision after training on 4 bits: results/served, one file a cell. The adapter goes there as
    it is, or converted where its start was made for the quantized base."""
    for cell in cells:
        path = study.results / "served" / f"{cell.slug}.json"
        if cell.base == "bf16" or settled(tables.read_json(path), retry) or (trained := _trained(study, cell)) is None:
            continue
        checkpoint = study.checkpoint(cell.model)
        batches = in_batches(study.texts(cell.model, cell.train, cell.length).held_out)
        try:
            with tempfile.TemporaryDirectory() as folder:
                if cell.calibrate:
                    start = kept(study.work, checkpoint, cell.base, cell.start, study.calibration(cell), cell.rank)
                    quailora.convert(start, trained, trained := Path(folder) / "converted")
                with ops.half_products(default_device(None), [torch.bfloat16]):
                    model = load_trained(checkpoint, "bf16", trained)
                    found: dict[str, Any] = {"perplexity": quailora.evaluate.perplexity(model, batches)}
        except Exception as error:  # as in `Study.run`
            found = failure(error)
        _keep(path, cell, found)


def _trained(study: Study, cell: Cell) -> Path | None:
    """The folder of the adapter that a cell trained; None, and a word, where it is not kept."""
    trained = study.work / "trained" / cell.slug
    if trained.is_dir():
        return trained
    print(f"{cell.slug}: its trained adapter is not in {trained.parent}; run its cell again for it", flush=True)
    return None


def _keep(path: Path, cell: Cell, found: dict[str, Any]) -> None:
    write_files(path.parent, {path.name: to_json({"cell": asdict(cell), **found, "made_with": circumstances()})})
    print(f"{cell.slug}: {found}", flush=True)


def score_tasks(study: Study, cells: Iterable[Cell], retry: bool) -> None:
    """The tasks, before and after the training of each cell that has run: results/tasks, one file a cell.

    At the scale of the paper they are the harness's; otherwise one is made of the text that --text measures on.
    """
    from benchmarks.paper.downstream import score, write_choices  # lm-eval is an extra

    for cell in cells:
        path = study.results / "tasks" / f"{cell.slug}.json"
        if settled(tables.read_json(path), retry) or (trained := _trained(study, cell)) is None:
            continue
        checkpoint = study.checkpoint(cell.model)
        found: dict[str, Any] = {}
        try:
            with tempfile.TemporaryDirectory() as folder:
                tasks: list[Any] = list(tables.PAPER_TASKS)
                if study.scale.name != "paper":
                    text = Path(study.sets[MEASURE][0])
                    tasks = [write_choices(text, Path(folder), study.scale.questions, seed=0)]
                for when in ("before", "after"):
                    model = study.load(cell) if when == "before" else load_trained(checkpoint, cell.base, trained)
                    found[when] = score(model, load_tokenizer(checkpoint), tasks, None, 8)
        except Exception as error:  # as in `Study.run`
            found = failure(error)
        _keep(path, cell, found)


EXPERIMENTS: dict[str, Callable[[Study], Iterator[Cell]]] = {
    "start": start,
    "perplexity": perplexity,
    "convergence": convergence,
    "calibration": calibration,
    "rank": rank,
    "downstream": downstream,
    "serving": serving,
}
SCORES = {"downstream": score_tasks, "serving": score_served}  # what is done with the trained adapters of an experiment

SHOWN = {"perplexity": ("perplexity", "gaps"), "convergence": ("rates", "convergence")}  # tables of an experiment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of a study, for `read_study`."""
    named = "NAME=FILE"
    parser.add_argument("--scale", choices=SCALES, default="paper")
    parser.add_argument("--model", metavar="FOLDER", help=f"instead of the models of the scale ({SMOLLM2} by default)")
    parser.add_argument("--data", nargs="+", default=[], metavar=named, help="sets to train on, or NAME=FILE@COLUMN")
    parser.add_argument("--calibrate", nargs="+", default=[], metavar=named, help="sets that only starts are made from")
    parser.add_argument(
        "--text", nargs=2, metavar=("CALIBRATE", "MEASURE"), help="texts, for the start before training"
    )
    parser.add_argument("--results", type=Path, help="where the cells are; docs/results/SCALE by default")
    parser.add_argument("--work", type=Path, help="where adapters are kept; build/evidence/SCALE by default")
    parser.add_argument("--part", default="1/1", metavar="K/N", help="run only the k-th of n parts")
    parser.add_argument("--retry", action="store_true", help="run again what failed")


def read_study(arguments: argparse.Namespace) -> Study:
    """Raises SystemExit, with its reason, where no data is named."""
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
    """ "2/3" -> (1, 3). Raises SystemExit for what is no part."""
    match = re.fullmatch(r"(\d+)/(\d+)", words)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise SystemExit(f"--part {words}: expected K/N with K from 1 to N, such as 1/2")
    return int(match[1]) - 1, int(match[2])


def provide(model: str, work: Path) -> str:
    """The folder of a model that is made here, or the id of one on the hub."""
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
    """--data and --text of the Python reference that every Python carries."""
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
        cells = list(dict.fromkeys(EXPERIMENTS[name](study)))
        if not cells:
            print(f"{name}: nothing to run, for it needs --text", flush=True)
            continue
        study.save_index(name, cells)
        study.run(cells, part, parts, arguments.retry)
        if name in SCORES:
            SCORES[name](study, cells[part::parts], arguments.retry)
    for name in arguments.experiment:
        for table in SHOWN.get(name, (name,)):
            print(f"\n## {table}\n\n{tables.draw(table, study.results)}")


if __name__ == "__main__":
    main()
