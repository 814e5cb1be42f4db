"""The distribution: what a wheel holds, what may be imported under which name, and that the set-up files agree."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers import ROOT


def python(*arguments: str | Path, path: Path | None = None) -> str:
    """Standard output of this Python run in the clone's root, with `path` before the installed packages."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path:
        environment["PYTHONPATH"] = str(path)
    run = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_wheel_holds_every_module_and_no_top_level_kernels(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for folder in ("quailora", "kernels"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    python("-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir", tmp_path, source)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "quailora").rglob("*.py")}
    kernels = {f"quailora/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels").rglob("*.py")}
    assert names == modules | kernels | {"quailora/py.typed"}


def test_hugging_face_kernels_is_found_where_it_is_installed(tmp_path: Path) -> None:
    (tmp_path / "site" / "kernels").mkdir(parents=True)
    (tmp_path / "site" / "kernels" / "__init__.py").touch()
    script = tmp_path / "script.py"  # like a console script, it has its own folder on the path and not the clone's root
    script.write_text("import quailora.kernels, transformers, kernels; print(kernels.__file__)")
    assert Path(python(script, path=tmp_path / "site").strip()).parent.parent == tmp_path / "site"


def test_our_folder_does_not_answer_to_import_kernels(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import importlib.util, quailora; print(importlib.util.find_spec('kernels'))")
    assert str(ROOT) not in python(script)


def test_the_tests_do_not_answer_to_import_kernels() -> None:
    assert str(ROOT / "kernels") not in str(importlib.util.find_spec("kernels"))


@pytest.mark.slow
def test_transformers_imports_with_the_root_on_the_path() -> None:
    code = "import kernels, quailora; from transformers import LlamaForCausalLM; print(kernels.__file__, dir(kernels))"
    where, public = python("-c", code).split(maxsplit=1)
    assert Path(where) == ROOT / "kernels" / "__init__.py"
    assert re.findall(r"'([^_]\w*)'", public) == []  # only the module's own dunder names: a docstring and no code


def test_every_dependency_is_pinned_within_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    wanted = [requirement for requirement in map(Requirement, lines) if requirement.name != project["name"]]
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pins[canonicalize_name(name)] = version
    unmet = [str(need) for need in wanted if not need.specifier.contains(pins.get(canonicalize_name(need.name), ""))]
    # Each build of torch asks for a triton of its own: see constraints.txt.
    assert [need for need in unmet if not need.startswith("triton")] == []


def test_constraints_hold_on_every_platform() -> None:
    text = (ROOT / "constraints.txt").read_text()
    assert re.findall(r"^(?:triton|nvidia-|cuda-).*|.*\+.*", text, flags=re.MULTILINE) == []


def test_make_has_every_target_that_is_named() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE)
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)
    for file in ("README.md", ".ci/run"):
        named = re.findall(r"(?:^|`|exec )make ([a-z-]+)", (ROOT / file).read_text(), flags=re.MULTILINE)
        assert set(named) <= set(targets), file
    assert sorted(targets) == sorted(phony.split())


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone")
def test_nothing_generated_is_tracked() -> None:
    git = ["git", "-C", str(ROOT), "ls-files", "--cached", "--ignored", "--exclude-standard"]
    assert subprocess.run(git, check=True, capture_output=True, text=True).stdout == ""
