"""The documentation: its code runs, its commands parse, its links lead somewhere."""

import re
import shlex
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import typer
import yaml

import quailora
from quailora.cli.app import app
from quailora.solvers.registry import SOLVERS
from tests.helpers import ROOT, tiny
from tests.integration import test_training

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLE = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the checkpoint that the code is written for


def blocks(document: Path, language: str) -> list[str]:
    found = re.findall(rf"^```{language}\b[^\n]*\n(.*?)^```$", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [block for block in found if not block.startswith("--8<--")]  # the site includes a tested example there


def calls(program: str) -> Iterator[list[str]]:
    """The words after the name of a program, wherever a shell block or a piece of inline code calls it."""
    for document in DOCUMENTS:
        inline = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", document.read_text())
        for line in [*inline, *(line for block in blocks(document, "sh") for line in block.splitlines())]:
            if re.match(rf"{program} [a-z]", line):
                yield shlex.split(line, comments=True)[1:]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run the code in, with a tiny model for the checkpoint; every data set is sixteen texts."""

    def load_dataset(*_: Any, streaming: bool = False, **__: Any) -> datasets.Dataset | datasets.IterableDataset:
        texts = datasets.Dataset.from_dict({"text": test_training.TEXTS})
        return texts.to_iterable_dataset() if streaming else texts

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    # As many key as query heads: no side of a weight is below the rank of the examples, 64.
    checkpoint = tiny.checkpoint(tmp_path / "model", dtype=torch.bfloat16, num_key_value_heads=4)
    test_training.tokenizer().save_pretrained(checkpoint)
    return checkpoint


@pytest.mark.parametrize(
    "document", [ROOT / "README.md", ROOT / "docs" / "getting-started.md"], ids=lambda each: each.name
)
def test_the_code_runs_from_top_to_bottom(document: Path, workplace: Path) -> None:
    code = "".join(blocks(document, "python"))
    assert EXAMPLE in code
    exec(compile(code.replace(EXAMPLE, str(workplace)), document.name, "exec"), {})


def test_no_other_document_has_code() -> None:
    found = {document.name for document in DOCUMENTS if blocks(document, "python")}
    assert found == {"README.md", "getting-started.md", "adding-a-solver.md"}


def test_the_example_of_a_solver_solves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SOLVERS, "sketch", SOLVERS["eigh"])  # the page replaces it; afterwards it is removed
    (code,) = blocks(ROOT / "docs" / "extending" / "adding-a-solver.md", "python")
    exec(compile(code, "adding-a-solver.md", "exec"), {})
    torch.manual_seed(0)
    weight, inputs = torch.randn(96, 128), torch.randn(500, 128) * torch.arange(1, 129) ** -0.5
    solve = partial(quailora.solve, weight, (4 * weight).round() / 4, inputs.T @ inputs, 16)
    assert solve().objective < solve(solver="sketch").objective < solve(solver="svd").objective


def test_examples_that_the_site_includes_exist() -> None:
    included = [
        (document, file)
        for document in DOCUMENTS
        for file in re.findall(r'^--8<-- "(.*)"$', document.read_text(), flags=re.MULTILINE)
    ]
    assert included
    assert all((ROOT / file).is_file() for _, file in included)


def test_every_page_is_in_the_navigation() -> None:
    def pages(entries: Any) -> Iterator[str]:
        for value in entries.values() if isinstance(entries, dict) else entries:
            yield from [value] if isinstance(value, str) else pages(value)

    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    documents = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(pages(navigation)) == sorted(documents)


def test_every_command_parses() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    found = list(calls("quailora"))
    assert {words[0] for words in found} >= {"init", "eval", "merge", "convert"}
    for name, *arguments in found:
        if arguments:  # a name alone is talked about, not called
            commands[name].make_context(name, arguments)  # raises what the parser has to say
        assert name in commands


def test_every_make_target_exists() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert {words[0] for words in calls("make")} <= set(targets)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_every_link_leads_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if not target.startswith("https://"):
            path, _, heading = target.partition("#")
            file = document.parent / path if path else document
            assert file.exists(), target
            if heading:
                headings = re.findall(r"^#+ (.*)$", file.read_text(), flags=re.MULTILINE)
                assert heading in {words.lower().replace(" ", "-") for words in headings}, target


def test_configurations_are_yaml_whose_numbers_are_numbers() -> None:
    found = [block for document in DOCUMENTS for block in blocks(document, "yaml")]
    assert found
    for block in found:
        values = yaml.safe_load(block)
        assert values["learning_rate"] == 2e-4  # YAML reads 2e-4, without a point, as a string
        assert values["output_dir"] == "trained"
