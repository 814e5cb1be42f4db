"""Imports go one way: the order of the packages, walked through all their sources."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import ROOT

# From the top: each may import from the lines below it and from its own package, and from nothing above or beside it.
ORDER = [
    ("cli",),
    ("evaluate", "doctor"),
    ("pipeline",),
    ("refinement",),
    ("adapters",),
    ("reporting",),
    ("calibration", "memory"),
    ("modeling",),
    ("quantization", "solvers", "refinement.config"),
    ("ops",),
    ("kernels", "_C"),
    ("ops.precision",),
    ("files", "reporting.markdown"),
    ("errors",),
]
LEVELS = {name: level for level, names in enumerate(ORDER) for name in names}

# A layer, and the only libraries it may import beside the standard one.
LIBRARIES = {
    "solvers": {"torch"},
    "kernels": {"torch", "triton"},
    "errors": set[str](),
}


def sources() -> Iterator[tuple[str, Path]]:
    """Names of modules, less `quailora.`, and their files. The package itself only hands out names of all others."""
    for path in sorted(ROOT.glob("quailora/**/*.py")):
        name = ".".join(path.relative_to(ROOT / "quailora").with_suffix("").parts).removesuffix("__init__").strip(".")
        if name not in ("", "__main__"):
            yield name, path
    for path in sorted(ROOT.glob("kernels/*.py")):
        yield f"kernels.{path.stem}".removesuffix(".__init__"), path


SOURCES = dict(sources())


def imports(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports, at its top, within functions and for type checkers."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path}: relative imports are not followed"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner.removeprefix("quailora.") in SOURCES else node.module


def place(module: str) -> str:
    """The entry of ORDER that is meant."""
    parts = module.split(".")
    return next(name for name in (".".join(parts[:2]), parts[0]) if name in LEVELS)


def may_import(importer: str, imported: str) -> bool:
    if imported == "quailora" or importer.partition(".")[0] == imported.partition(".")[0]:
        return True
    return LEVELS[place(importer)] < LEVELS[place(imported)]


@pytest.mark.parametrize("module", SOURCES)
def test_imports_go_one_way(module: str) -> None:
    ours = [name.removeprefix("quailora.") for name in imports(SOURCES[module]) if name.partition(".")[0] == "quailora"]
    assert [name for name in ours if not may_import(module, name)] == []


@pytest.mark.parametrize("layer", LIBRARIES)
def test_a_layer_knows_its_libraries_only(layer: str) -> None:
    found = {
        name.partition(".")[0]
        for module, path in SOURCES.items()
        if module.partition(".")[0] == layer
        for name in imports(path)
    }
    assert found - sys.stdlib_module_names - {"quailora"} <= LIBRARIES[layer]


def test_every_module_has_a_place() -> None:
    assert {name.partition(".")[0] for name in SOURCES} <= {name.partition(".")[0] for name in LEVELS}
    assert set(LEVELS) - {"_C"} <= set(SOURCES)


def test_kernels_import_kernels_and_precisions_only() -> None:
    names = {name for module, path in SOURCES.items() if place(module) == "kernels" for name in imports(path)}
    ours = {name for name in names if name.partition(".")[0] == "quailora"}
    assert {name for name in ours if not name.startswith("quailora.kernels")} == {"quailora.ops.precision"}


def test_an_import_the_wrong_way_is_found() -> None:
    assert may_import("pipeline.loop", "solvers.solve")
    assert not may_import("solvers.solve", "pipeline.loop")
    assert not may_import("solvers.solve", "quantization.registry")
    assert not may_import("modeling.checkpoint", "cli.app")
