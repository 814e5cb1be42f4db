"""Score a causal language model on tasks, through EleutherAI's lm-eval harness (the extra `evidence`).

    python benchmarks/paper/downstream.py CHECKPOINT --base nf4 --adapter DIR --tasks arc_easy piqa    # needs the hub
    python benchmarks/paper/downstream.py CHECKPOINT --base nf4 --adapter DIR --text FILE              # works offline

--tasks names tasks of lm-eval; without --tasks and --text, they are the paper's. --text makes a task from any text,
such as WikiText-2: which of four passages comes next? The context is one or two sentences; the wrong choices come from
nearby paragraphs; all four are cut to the same number of words. Guessing gets a quarter right.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import random
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from benchmarks.common.tables import PAPER_TASKS
from benchmarks.paper.initializations import BASES, load
from quailora.adapters.base_record import base_of, for_full_precision, loading
from quailora.calibration.tokenizer import load_tokenizer
from quailora.errors import AdapterError, MismatchError, QuailoraError
from quailora.evaluate import _evaluating, _with_adapter
from quailora.files import to_json, write_files
from quailora.modeling.checkpoint import Checkpoint

NEXT_PASSAGE = "next_passage"
CHOICES = 4
WORDS = 16  # of a choice: all are equally long, so that summed log-likelihoods favor none
LONGEST = 60  # words of a sentence of the context
NEIGHBORS = 40  # paragraphs that wrong choices come from, in WikiText-2 mostly of the same article
METRICS = ("acc", "acc_norm")


def write_choices(text: Path, folder: Path, items: int, seed: int) -> dict[str, Any]:
    """Write `items` questions about `text` into `folder`; returns the task's config for the harness, and `score`.

    Each is about a different paragraph, in random order. Correct answers are spread evenly over the positions.

    Raises:
        QuailoraError: the text cannot be read, or has too few paragraphs of two sentences that are long enough.
    """
    rng = random.Random(seed)
    paragraphs = _paragraphs(text)
    questions = []
    for index, paragraph in enumerate(paragraphs):
        places = [
            place
            for place, (before, after) in enumerate(pairwise(paragraph), 1)
            if WORDS <= len(before) <= LONGEST and len(after) >= WORDS
        ]
        first = max(0, min(index - NEIGHBORS // 2, len(paragraphs) - NEIGHBORS - 1))
        near = paragraphs[first:index] + paragraphs[index + 1 : first + NEIGHBORS + 1]
        own = {_start(sentence) for sentence in paragraph}
        wrong = sorted({_start(each) for other in near for each in other if len(each) >= WORDS} - own)
        if places and len(wrong) >= CHOICES - 1:
            questions.append((paragraph, rng.choice(places), rng.sample(wrong, CHOICES - 1)))
    if len(questions) < items:
        raise QuailoraError(
            f"{text} has too few paragraphs for {items} questions: {len(questions)} of {len(paragraphs)} have two "
            f"sentences of {WORDS} words and others nearby; give a longer text, or ask for fewer"
        )
    chosen = rng.sample(questions, items)
    answers = [number % CHOICES for number in range(items)]
    rng.shuffle(answers)
    lines = []
    for (paragraph, place, choices), answer in zip(chosen, answers, strict=True):
        before = [sentence for sentence in paragraph[max(0, place - 2) : place] if len(sentence) <= LONGEST]
        choices.insert(answer, _start(paragraph[place]))
        question = {"context": " ".join(map(" ".join, before)), "choices": choices, "answer": answer}
        lines.append(json.dumps(question, ensure_ascii=False) + "\n")
    name = f"{NEXT_PASSAGE}.jsonl"
    write_files(folder, {name: "".join(lines)})
    return {
        "task": NEXT_PASSAGE,
        "dataset_path": "json",
        # The cache is next to the file and removed with it; by default it would grow in the user's home.
        "dataset_kwargs": {"data_files": {"test": str(folder / name)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "context",  # names of fields
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "num_fewshot": 0,
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in METRICS],
    }


def _paragraphs(text: Path) -> list[list[list[str]]]:
    """Paragraphs of sentences of words.

    A paragraph ends at an empty line, or at a line's end that is a sentence's: WikiText has one a line, others wrap
    their lines.
    """
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise QuailoraError(f"{text} cannot be read as UTF-8 text: {error}") from error
    blocks = re.split(r"""\n\s*\n|(?<=[.!?])[\s"'”’)]*\n""", content)
    split = (re.split(r"""(?<=[.!?])\s+(?=["'“‘(<A-Z])""", block.strip()) for block in blocks)
    return [[sentence.split() for sentence in sentences] for sentences in split if sentences != [""]]


def _start(sentence: list[str]) -> str:
    return " ".join(sentence[:WORDS])


def score(
    model: Any, tokenizer: Any, tasks: Sequence[str | dict[str, Any]], limit: int | None, batch_size: int
) -> dict[str, dict[str, float]]:
    """Task -> "acc" and "acc_stderr", and the same of "acc_norm" where the task has it. Zero-shot.

    model: a transformers model or a PeftModel; it is not changed, nor is the tokenizer.
    tasks: names of lm-eval tasks, whose data comes from the hub, or configs such as those of `write_choices`.
    limit: only the first so many questions of each task.

    Raises:
        QuailoraError: lm-eval has no task of that name, or cannot load its data.
    """
    names = [task for task in tasks if isinstance(task, str)]
    manager = TaskManager(include_defaults=bool(names))  # indexing its thousands of tasks takes seconds
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise QuailoraError(f"lm-eval {lm_eval.__version__} has no task {', '.join(unknown)}: see `lm_eval ls tasks`")
    try:
        with (
            _unobtrusive(),
            _evaluating(model),  # it says what bitsandbytes would do to the weights
            # They are tied already, and doing it again fails if PEFT has a copy of the head.
            patch.object(model, "tie_weights", lambda: None),
        ):
            found = lm_eval.simple_evaluate(
                _Model(model, backend="causal", tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size),
                tasks=copy.deepcopy(list(tasks)),
                limit=limit,
                log_samples=False,
                task_manager=manager,
                random_seed=None,  # leave the caller's generators alone: nothing is sampled
                numpy_random_seed=None,
                torch_random_seed=None,
            )
    except ConnectionError as error:
        raise QuailoraError(f"the data of a task cannot be had: {error}") from error
    return {task: dict(_metrics(values)) for task, values in found["results"].items()}


def _metrics(values: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The METRICS, without the filter name that lm-eval appends after a comma."""
    for key, value in values.items():
        name = key.partition(",")[0]
        if name.removesuffix("_stderr") in METRICS and value != "N/A":  # with one question there is no standard error
            yield name, float(value)


class _Model(HFLM):
    """lm-eval's model, with progress bars on a terminal only, and without asking the hub."""

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return super().loglikelihood(requests, disable_tqdm or not sys.stderr.isatty())

    def get_model_info(self) -> dict[str, Any]:
        return {}


@contextmanager
def _unobtrusive() -> Iterator[None]:
    """Silence lm-eval's routine messages, and restore the global state that it changes."""
    log = logging.getLogger("lm_eval.models.huggingface")
    bars, drawn = not datasets.are_progress_bars_disabled(), random.getstate()
    log.addFilter(_not_about_loaded_models)
    datasets.disable_progress_bars()
    try:
        with (
            patch("lm_eval.api.task.tqdm", partial(tqdm, disable=True)),  # this bar cannot be switched off
            # These run git and other programs, which write to the terminal, for information that is not used.
            patch("lm_eval.evaluator.get_git_commit_hash", lambda: None),
            patch("lm_eval.evaluator.add_env_info", lambda results: None),
        ):
            yield
    finally:
        random.setstate(drawn)  # it draws a random name for every task, even if it has one
        log.removeFilter(_not_about_loaded_models)
        if bars:
            datasets.enable_progress_bars()


def _not_about_loaded_models(entry: logging.LogRecord) -> bool:
    """Drop the message, for every model that is passed in loaded, that options for loading have no effect."""
    return not str(entry.msg).startswith(("`pretrained` model kwarg is not of type", "Passed an already-initialized"))


# ---- Command line


def read_model(checkpoint: Checkpoint, base: str, adapter: Path | None) -> Any:
    """Raises MismatchError for an adapter made for another base, AdapterError if the folder has no adapter."""
    if adapter is not None:
        if not (adapter / "adapter_config.json").is_file():
            raise AdapterError(f"{adapter} is not an adapter: it has no adapter_config.json")
        quantization = BASES[base]
        if (record := base_of(adapter)) is not None:
            if (quantization is None) != for_full_precision(record):
                kind = "the full-precision weights" if for_full_precision(record) else "a quantized base"
                raise MismatchError(f"{adapter} was made for {kind}: on {base} its factors make the model worse")
            loading(record, checkpoint, quantization, adapter)
    model = load(checkpoint, base)
    return model if adapter is None else _with_adapter(model, adapter)


def table(found: dict[str, dict[str, float]]) -> str:
    """In Markdown, with standard errors."""

    def cell(scores: dict[str, float], name: str) -> str:
        value, error = scores.get(name), scores.get(f"{name}_stderr")
        return ("" if value is None else f"{value:.1%}") + ("" if error is None else f" ± {error:.1%}")

    rows = [f"| {task} | {' | '.join(cell(scores, name) for name in METRICS)} |" for task, scores in found.items()]
    return "\n".join([f"| task | {' | '.join(METRICS)} |", "| --- | ---: | ---: |", *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="the full-precision model: a folder, or an id on the hub")
    parser.add_argument("--adapter", type=Path, metavar="DIR")
    parser.add_argument("--base", choices=BASES, default="bf16", help="quantization; bf16 (default) is none")
    parser.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help=f"default: {' '.join(PAPER_TASKS)}")
    parser.add_argument("--text", type=Path, metavar="FILE", help="make a task from this text")
    parser.add_argument("--items", type=int, metavar="N", help="questions; default: 200 of the text, else all")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--json", type=Path, metavar="PATH")
    arguments = parser.parse_args()
    checkpoint = Checkpoint(arguments.checkpoint)
    tasks: list[Any] = arguments.tasks or ([] if arguments.text else list(PAPER_TASKS))
    with tempfile.TemporaryDirectory() as folder:
        if arguments.text:
            tasks.append(write_choices(arguments.text, Path(folder), arguments.items or 200, seed=0))
        tokenizer = load_tokenizer(checkpoint)
        if tokenizer is None:
            raise QuailoraError(f"{checkpoint.name} has no tokenizer")
        model = read_model(checkpoint, arguments.base, arguments.adapter)
        found = score(model, tokenizer, tasks, arguments.items, arguments.batch_size)
    print(table(found))
    if arguments.json:
        adapter = None if arguments.adapter is None else str(arguments.adapter)
        of = {"checkpoint": arguments.checkpoint, "base": arguments.base, "adapter": adapter}
        write_files(arguments.json.parent, {arguments.json.name: to_json(of | {"scores": found})})


if __name__ == "__main__":
    try:
        main()
    except QuailoraError as error:
        sys.exit(str(error))
