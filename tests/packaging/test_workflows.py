"""The workflow files, as far as can be told without a runner: they parse, and what they call is there."""

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from quailora.cli.app import app
from tests.helpers import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def jobs(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())["jobs"]


def steps(path: Path) -> Iterator[dict[str, Any]]:
    for job in jobs(path).values():
        assert job["timeout-minutes"] > 0
        assert job["runs-on"]
        yield from job["steps"]


def commands() -> Iterator[Any]:
    for path in WORKFLOWS:
        for step in steps(path):
            for line in step.get("run", "").splitlines():
                yield pytest.param(shlex.split(line), id=f"{path.stem}: {line}")


def test_there_is_one_for_each_kind_of_runner() -> None:
    assert [path.stem for path in WORKFLOWS] == ["cpu", "gpu", "nightly", "release"]
    runs = {path.stem: [step.get("run", "") for step in steps(path)] for path in WORKFLOWS}
    assert "make test" in runs["cpu"]  # the README's test command
    assert "make test-all" in runs["nightly"]
    # That there are kernels, and a GPU to run them, is an error if not before anything is skipped for want of them.
    commands = [run for run in runs["gpu"] if run]
    assert commands[:2] == ["make install", ".venv/bin/quailora doctor --device cuda:0"]
    assert ".venv/bin/python -m pytest -m gpu" in commands
    for path in WORKFLOWS:
        for name, job in jobs(path).items():  # and a build that fails is one
            assert name == "publish" or job["env"]["QUAILORA_EXT"] == "1"


def test_a_release_has_a_wheel_for_every_python_and_is_published_from_a_tag_only() -> None:
    paths = {path.stem: path for path in WORKFLOWS}
    build, publish = (jobs(paths["release"])[name] for name in ("build", "publish"))
    wheels = [step["run"] for step in build["steps"] if step.get("run", "").startswith("make wheel")]
    pythons = jobs(paths["cpu"])["test"]["strategy"]["matrix"]["python"]
    assert wheels == [f"make wheel PYTHON=python{python}" for python in pythons]
    assert publish["if"] == "startsWith(github.ref, 'refs/tags/v')"
    assert publish["permissions"] == {"id-token": "write"}  # trusted publishing: no token is kept anywhere


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_steps_are_well_formed(path: Path) -> None:
    for step in steps(path):
        assert len({"run", "uses"} & step.keys()) == 1, step
        if "uses" in step:  # GitHub's own actions and PyPI's, at a version
            assert re.fullmatch(r"(actions/[a-z-]+@|pypa/gh-action-pypi-publish@release/)v\d+", step["uses"])


@pytest.mark.parametrize("command", list(commands()))
def test_every_command_exists(command: list[str]) -> None:
    program, *arguments = command
    match program:
        case "make":
            targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert {each for each in arguments if "=" not in each} <= set(targets)
        case ".venv/bin/quailora":
            assert arguments[0] in {entry.name or entry.callback.__name__ for entry in app.registered_commands}
            shown = CliRunner().invoke(app, [arguments[0], "--help"], env={"COLUMNS": "200"}).output
            assert {option for option in arguments if option.startswith("--")} <= set(re.findall(r"--[a-z-]+", shown))
        case ".venv/bin/python" if arguments[:2] == ["-m", "pytest"]:
            markers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["markers"]
            assert arguments[2] == "-m"
            assert arguments[3] in [marker.partition(":")[0] for marker in markers]
        case ".venv/bin/python":
            script = ROOT / arguments[0]
            ast.parse(script.read_text())
            run = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True)
            options = {option for option in arguments if option.startswith("--")}
            assert options <= set(re.findall(r"--[a-z-]+", run.stdout))
        case "cp":
            assert len(arguments) == 2
        case _:
            pytest.fail(f"{program} is not a command that the workflows are known to need")


@pytest.mark.slow
def test_the_gpu_marker_has_tests() -> None:
    collect = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-m",
        "gpu",
        "-o",
        "addopts=",
        "tests/kernels/test_gpu.py",
    ]
    run = subprocess.run(collect, cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.search(r"^\d+(/\d+)? tests? collected", run.stdout, re.MULTILINE)
