"""Put the tables and plots of the studies into the documentation, from the JSON files beside it.

    python benchmarks/common/results.py            # writes
    python benchmarks/common/results.py --check    # exits with 1 where something is not what the JSON says

A table stands between `<!-- NAME -->` and `<!-- end of NAME -->`, where NAME is one of those below.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.common import plots, tables
from benchmarks.end_to_end import initialize, inputs, low_bits, refine
from benchmarks.kernels import gram, half, launches, scaling
from benchmarks.paper import bases, claims

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results" / "small"
PAGES = ("method.md", "performance.md", "results.md", "guides/bases.md", "guides/refinement.md")
DOCUMENTS = (ROOT / "README.md", *(ROOT / "docs" / page for page in PAGES))

# Table -> the benchmark whose --json is kept in docs/results/speed, and what of it is shown.
SPEEDS: dict[str, tuple[str, Callable[[tables.Record], str]]] = {
    "gram": ("gram", gram.table),
    "half": ("half", half.table),
    "initialize": ("initialize", initialize.table),
    "solve": ("initialize", initialize.solve_table),
    "scaling": ("scaling", scaling.table),
}


def _speed(benchmark: str, table: Callable[[tables.Record], str], results: Path) -> str:
    """A table of a record, and where it was measured."""
    record = tables.read_json(results.parent / "speed" / f"{benchmark}.json")
    return f"{record['device']}, torch {record['torch']}:\n\n{table(record)}" if record else "Not run yet."


def _of_record(name: str, table: Callable[[tables.Record], str], results: Path) -> str:
    record = tables.read_json(results.parent / f"{name}.json")
    return table(record) if record else "Not run yet."


def _bases(draw: Callable[[Path], str], results: Path) -> str:
    return draw(results.parent / "bases")


BLOCKS: dict[str, Callable[[Path], str]] = {
    "circumstances": tables.circumstances,
    **{name: partial(tables.draw, name) for name in (*tables.TABLES, *tables.OF_RESULTS)},
    "claims": claims.table,
    "cloq-claims": partial(claims.table, claims=claims.CLOQ),
    "low-bits": partial(_of_record, "low_bits", low_bits.table),
    "refine": partial(_of_record, "refine", refine.table),
    "inputs": partial(_of_record, "inputs", inputs.table),
    "launches": partial(_of_record, "speed/launches", launches.table),
    **{name: partial(_bases, draw) for name, draw in bases.TABLES.items()},
    **{name: partial(_speed, *source) for name, source in SPEEDS.items()},
}


def fill(text: str, results: Path) -> str:
    """The text of a document with every block made anew. Raises KeyError for a block that is not of BLOCKS."""

    def block(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- {name} -->\n{BLOCKS[name](results)}\n<!-- end of {name} -->"

    return re.sub(r"<!-- ([\w-]+) -->\n.*?<!-- end of \1 -->", block, text, flags=re.DOTALL)


def stale(results: Path = RESULTS, documents: tuple[Path, ...] = DOCUMENTS) -> list[Path]:
    """The files that are not what the results make of them."""
    found = [document for document in documents if fill(text := document.read_text(encoding="utf-8"), results) != text]
    return found + list(_drawn_anew(results))


def write(results: Path = RESULTS, documents: tuple[Path, ...] = DOCUMENTS) -> None:
    for document in documents:
        document.write_text(fill(document.read_text(encoding="utf-8"), results), encoding="utf-8")
    for path, svg in _drawn_anew(results).items():
        path.write_text(svg, encoding="utf-8")


def _drawn_anew(results: Path) -> dict[Path, str]:
    """The plots that are not on disk as the results make them, and as what."""
    anew = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, save in plots.draw(results).items():
            save(drawn := Path(folder) / name)
            svg, path = drawn.read_text(encoding="utf-8"), results / name
            if not path.is_file() or not same_picture(path.read_text(encoding="utf-8"), svg):
                anew[path] = svg
    return anew


def same_picture(one: str, other: str) -> bool:
    """Whether two SVGs differ by rounding at most, as those of different processors do. Names of parts are made of
    coordinates, so they do not count."""
    parts = [re.split(r"(-?\d+(?:\.\d+)?)", re.sub(r"\b[mp][0-9a-f]{10}\b", "", svg)) for svg in (one, other)]
    if len(parts[0]) != len(parts[1]):
        return False
    words, numbers = zip(*((each[::2], [float(number) for number in each[1::2]]) for each in parts), strict=True)
    return words[0] == words[1] and all(abs(mine - its) < 1e-3 for mine, its in zip(*numbers, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        write()
    elif found := stale():
        sys.exit(f"not what the results say: {', '.join(str(path.relative_to(ROOT)) for path in found)}")


if __name__ == "__main__":
    main()
