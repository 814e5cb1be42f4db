"""Which kernels have changed since every test of theirs last passed.

`make test` takes a few tests of each kernel, and all of those of a kernel that has changed. `make test-all` passes them
all and then records the code of the kernels in verified.json, which is committed with it. What counts is the code of a
kernel's file and of the files in kernels/ that it imports, without comments and docstrings. This needs no history, so
that it works in any clone.
"""

import ast
import hashlib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import ROOT

KERNELS = ROOT / "kernels"
VERIFIED = ROOT / "tests" / "kernels" / "verified.json"


def slow_unless_changed(kernel: str) -> list[pytest.MarkDecorator]:
    """The marks of a test that `make test` leaves out, unless this kernel (a file in kernels/, without .py) changed."""
    return [] if kernel in changed() else [pytest.mark.slow]


@cache
def changed() -> frozenset[str]:
    verified = json.loads(VERIFIED.read_text()) if VERIFIED.exists() else {}
    return frozenset(name for name, digest in digests().items() if verified.get(name) != digest)


def digests() -> dict[str, str]:
    """Of every file in kernels/: a digest of its code and of all that it imports from there."""
    trees = {path.stem: ast.parse(path.read_text()) for path in KERNELS.glob("*.py")}
    codes = {name: repr(_code(tree)) for name, tree in trees.items()}
    found = {}
    for name in sorted(trees):
        needed = sorted(_closure(name, trees))
        found[name] = hashlib.sha256("\n".join(codes[each] for each in needed).encode()).hexdigest()[:16]
    return found


def _closure(name: str, trees: dict[str, ast.Module]) -> set[str]:
    needed, waiting = set[str](), [name]
    while waiting:
        each = waiting.pop()
        if each not in needed:
            needed.add(each)
            waiting += _imports(trees[each])
    return needed


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "quailora.kernels":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("quailora.kernels."):
            yield (node.module or "").removeprefix("quailora.kernels.")


def _code(node: Any) -> Any:
    """The tree as tuples, the same in every version of Python, without docstrings."""
    if isinstance(node, list):
        return [_code(each) for each in node if not _is_text(each)]
    if isinstance(node, ast.AST):
        return type(node).__name__, [(k, _code(v)) for k, v in ast.iter_fields(node) if v is not None and v != []]
    return node


def _is_text(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def record(path: Path = VERIFIED) -> None:
    path.write_text(json.dumps(digests(), indent=1) + "\n")


if __name__ == "__main__":
    record()
