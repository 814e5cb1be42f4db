"""The experiments of the paper (arXiv 2410.14713), by name, with its solver and this project's.

    python benchmarks/paper.py --scale small --data roleplay=FILE codegen=FILE --text CALIBRATE MEASURE

    start          before training: what the start gives back, by rank and by solver (no table of the paper's)
    perplexity     Tables 2 and 4: 4 and 8 bits, from zero and from QuAILoRA, and LoRA on 16 bits
    convergence    Figure 2: the course of training; beside it other learning rates, and random factors of the same
                   norms, to tell what the start knows from what it is to be away from zero
    rank           Figure 1: after training, by rank
    calibration    Table 1: texts to make the start from against texts to train on
    downstream     Tables 3 and 5: tasks, by lm-eval

The models, data sets and settings of the scale `paper` are the paper's; it needs a GPU and a data hub. `small` takes
two CPU cores some hours, with SmolLM2-135M-Instruct and the texts that are named; `tiny` shows within two minutes that
it all works. A set of --data is trained on, and the first is what starts are made from; one of --calibrate only makes
starts. What has run is kept in --results, one file a cell, and is not run again; what failed is, with --retry. Two
processes share the work with --part 1/2 and --part 2/2. At the end the tables are printed; `results.py` puts them into
the documentation.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import tables
from smollm2 import fetch
from starts import load_trained
from study import RANK, SCALES, SMOLLM2, TWO_BLOCKS, Cell, Study
from timing import circumstances
from transformers import AutoModelForCausalLM, AutoTokenizer

from quailora.blocks import no_progress_bar
from quailora.pipeline import load_tokenizer
from quailora.report import to_json, write_files

CALIBRATE, MEASURE = "text-calibrate", "text-measure"
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
            yield study.cell(model, name, "nf4", "als", study.trained[0], 0)


def convergence(study: Study) -> Iterator[Cell]:
    """On the first set and seed: the starts of both kinds, and the control, at every rate."""
    for model in study.scale.models:
        for rate in study.scale.rates:
            for base, kind in (("nf4", "zero"), ("nf4", "quailora"), ("nf4", "random"), ("bf16", "zero")):
                yield study.cell(model, study.trained[0], base, kind, study.trained[0], 0, learning_rate=rate)


def rank(study: Study) -> Iterator[Cell]:
    for model in study.scale.models:
        for each in study.scale.trained_ranks:
            for kind in ("zero", "quailora"):
                yield study.cell(model, study.trained[0], "nf4", kind, study.trained[0], 0, rank=each)


def calibration(study: Study) -> Iterator[Cell]:
    calibrate = [name for name in study.sets if name not in (CALIBRATE, MEASURE)]
    for model in study.scale.models:
        for name in study.trained:
            yield study.cell(model, name, "nf4", "zero", study.trained[0], 0)
            for source in calibrate:
                yield study.cell(model, name, "nf4", "quailora", source, 0)


def downstream(study: Study) -> Iterator[Cell]:
    """Their fine-tuned adapters are what the tasks are solved with."""
    for model in study.scale.models:
        for base, kind in PAIRS:
            yield study.cell(model, study.trained[0], base, kind, study.trained[0], 0)


def score_tasks(study: Study, cells: Iterable[Cell], retry: bool) -> None:
    """The tasks, before and after the training of each cell that has run: results/tasks, one file a cell.

    At the scale of the paper they are the harness's; otherwise one is made of the text that --text measures on.
    """
    from downstream import PAPER_TASKS, score, write_choices  # lm-eval is an extra

    for cell in cells:
        trained = study.work / "trained" / cell.slug
        path = study.results / "tasks" / f"{cell.slug}.json"
        if not trained.is_dir() or (path.is_file() and not retry):
            continue
        checkpoint = study.checkpoint(cell.model)
        tokenizer = load_tokenizer(checkpoint)
        with tempfile.TemporaryDirectory() as folder:
            tasks: list[Any] = list(PAPER_TASKS)
            if study.scale.name != "paper":
                tasks = [write_choices(Path(study.sets[MEASURE][0]), Path(folder), study.scale.questions, seed=0)]
            found = {}
            for when in ("before", "after"):
                model = study.load(cell) if when == "before" else load_trained(checkpoint, cell.base, trained)
                found[when] = score(model, tokenizer, tasks, None, 8)
        write_files(path.parent, {path.name: to_json({"cell": asdict(cell), **found, "made_with": circumstances()})})
        print(f"{cell.slug}: {found}", flush=True)


EXPERIMENTS: dict[str, Callable[[Study], Iterator[Cell]]] = {
    "start": start,
    "perplexity": perplexity,
    "convergence": convergence,
    "calibration": calibration,
    "rank": rank,
    "downstream": downstream,
}


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
    trained = tuple(entry.partition("=")[0] for entry in arguments.data) or scale.trained
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


def provide(model: str, work: Path) -> str:
    """The folder of a model that is made here, or the id of one on the hub."""
    if model == SMOLLM2:
        return str(fetch())
    if model != TWO_BLOCKS:
        return model
    folder = work / TWO_BLOCKS
    if not folder.is_dir():
        with no_progress_bar():
            whole: Any = AutoModelForCausalLM.from_pretrained(fetch(), dtype="auto")
            whole.model.layers = whole.model.layers[:2]
            whole.config.num_hidden_layers = 2
            whole.save_pretrained(folder)
        AutoTokenizer.from_pretrained(fetch()).save_pretrained(folder)
    return str(folder)


def write_texts(folder: Path) -> tuple[list[str], list[str]]:
    """--data and --text of the Python reference that every Python carries."""
    folder.mkdir(parents=True, exist_ok=True)
    data, text = folder / "topics.json", folder / "topics.txt"
    data.write_text(json.dumps([{"text": topics[name]} for name in sorted(topics)]), encoding="utf-8")
    text.write_text("\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
    return [f"topics={data}"], [str(text), str(text)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    add_arguments(parser)
    arguments = parser.parse_args()
    study = read_study(arguments)
    part, _, parts = arguments.part.partition("/")
    for name in arguments.experiment:
        cells = list(dict.fromkeys(EXPERIMENTS[name](study)))
        study.save_index(name, cells)
        study.run(cells, int(part) - 1, int(parts), arguments.retry)
        if name == "downstream":
            score_tasks(study, cells[int(part) - 1 :: int(parts)], arguments.retry)
    for name in arguments.experiment:
        shown = (
            tables.downstream(study.results)
            if name == "downstream"
            else tables.TABLES[name](tables.read(study.results, name))
        )
        print(f"\n## {name}\n\n{shown}")


if __name__ == "__main__":
    main()
