"""What an unfinished run keeps on disk, so that one that died goes on: the factors of every finished block.

.NAME.quailora/            beside the output folder NAME, gone when that is complete
    run.json               what the run is: checkpoint, data, settings, versions; and what was chosen for it
    block-0007.safetensors the adapter's tensors of a block, with the rows of the report: whole, or not there
    output/                the output folder while it is filled
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from quailora.errors import QuailoraError
from quailora.files import DTYPES, LazyTensor, check_new_folder, replaced, to_json, writing
from quailora.reporting.markdown import count
from quailora.reporting.report import BlockReport, LayerReport

_BLOCK = re.compile(r"block-(\d+)\.safetensors")


class Workspace:
    """The folder of a run that is to end with `output`.

    Args:
        output: the output folder, absent or empty.
        identity: what the run is, plain JSON: an unfinished run goes on only where it is the same.
        resume: whether to go on with what is there; else it is discarded.

    Attributes:
        chosen: what was chosen for the run, by `choose`.
        discarded: the identity of the run that was discarded; empty without one, or where that cannot be read.

    It is this process's until `finish` or `leave`: two runs would undo each other's work.

    Raises:
        QuailoraError: there is an unfinished run of other settings, which are named; or one that still runs; or the
            folder cannot be written.
    """

    def __init__(self, output: Path, identity: dict[str, Any], *, resume: bool = True) -> None:
        check_new_folder(output)
        self.output = output.resolve()  # a link stays, and what it points to is filled
        self.folder = workspace_of(self.output)
        self._record = self.folder / "run.json"
        self.chosen: dict[str, Any] = {}
        self.discarded: dict[str, Any] = {}
        self._identity = json.loads(json.dumps(identity))  # as it is read again: no tuples
        with ExitStack() as held, writing(self.output):
            self.folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(self.folder))
            if not resume:
                self.discarded = self._discarded()
                for path in self.folder.iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            known = self._read()
            if known is not None:
                self._check_same(known["identity"])
                self.chosen = known["chosen"]
            self._rows: dict[int, list[LayerReport]] = {}
            self._digests: dict[str, str] = {}
            self._blocks: dict[int, BlockReport] = {}
            for found in self._read_blocks():
                self._remember(*found)
            self._lock = held.pop_all()

    @property
    def finished(self) -> list[int]:
        """The blocks whose factors are kept."""
        return sorted(self._rows)

    @property
    def layers(self) -> list[LayerReport]:
        """The rows of the report of all finished blocks."""
        return [row for index in self.finished for row in self._rows[index]]

    @property
    def blocks(self) -> list[BlockReport]:
        """The rows of the report of all refined blocks."""
        return [self._blocks[index] for index in sorted(self._blocks)]

    @property
    def digests(self) -> dict[str, str]:
        """Those of quantized linears that no adapter is on."""
        return dict(self._digests)

    def choose(self, **chosen: Any) -> None:
        """Keep what was chosen for the run and decides its bits, for a run that resumes it."""
        self.chosen |= chosen
        with writing(self.folder), replaced(self._record) as partial:
            partial.write_text(to_json({"identity": self._identity, "chosen": self.chosen}), encoding="utf-8")

    def save_block(
        self,
        index: int,
        tensors: dict[str, Tensor],
        rows: list[LayerReport],
        digests: Mapping[str, str] | None = None,
        refined: BlockReport | None = None,
    ) -> None:
        """Keep what a block has: from now on it is finished. digests: of its linears that no adapter is on."""
        path = self.folder / f"block-{index:04}.safetensors"
        values = {
            "layers": [asdict(row) for row in rows],
            "digests": dict(digests or {}),
            "refined": asdict(refined) if refined else None,
        }
        kept = {name: json.dumps(value) for name, value in values.items()}
        with writing(path, f"block {index} could not be kept"), replaced(path) as partial:
            save_file(tensors, partial, metadata=kept)
        self._remember(index, rows, digests or {}, refined)

    def block_tensors(self, index: int) -> dict[str, Tensor]:
        """The adapter's tensors of a finished block."""
        return load_file(self.folder / f"block-{index:04}.safetensors")

    def tensors(self) -> dict[str, LazyTensor]:
        """The adapter's tensors of all finished blocks."""
        found = {}
        for index in self.finished:
            path = self.folder / f"block-{index:04}.safetensors"
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (no dict)
                    header = file.get_slice(name)
                    dtype = DTYPES[header.get_dtype()]
                    found[name] = LazyTensor(tuple(header.get_shape()), dtype, _Stored(path, name))
        return found

    @contextmanager
    def finish(self) -> Iterator[Path]:
        """The folder to fill, which then takes the name of the output; and the workspace is gone."""
        partial = self.folder / "output"
        with writing(self.output):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            yield partial
            check_new_folder(self.output)
            if self.output.exists():
                self.output.rmdir()
            partial.replace(self.output)
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def leave(self) -> str:
        """Remove the folder where nothing in it is worth keeping. Returns what is kept, in words; "" for nothing."""
        with self._lock:
            if self.folder.exists() and self.finished:
                return f"the factors of {count(len(self.finished), 'block')} are kept in {self.folder}"
            shutil.rmtree(self.folder, ignore_errors=True)
            return ""

    def _discarded(self) -> dict[str, Any]:
        try:
            known = self._read()
        except QuailoraError:  # damaged: to discard it is the way out
            known = None
        return known["identity"] if known else {}

    def _read(self) -> dict[str, Any] | None:
        try:
            known = json.loads(self._record.read_text(encoding="utf-8"))
            return {name: known[name] for name in ("identity", "chosen")}
        except FileNotFoundError:
            return None
        except (ValueError, LookupError, TypeError) as error:
            raise QuailoraError(f"{self._record} is damaged ({error!r}): {_DISCARD}") from error

    def _check_same(self, known: dict[str, Any]) -> None:
        differences = list(_differences(known, self._identity))
        if differences:
            raise QuailoraError(
                f"{self.folder} holds an unfinished run with other settings: {'; '.join(differences[:5])}. Give the "
                f"same again, or {_DISCARD}"
            )

    def _remember(
        self, index: int, rows: list[LayerReport], digests: Mapping[str, str], refined: BlockReport | None
    ) -> None:
        self._rows[index] = rows
        self._digests |= digests
        if refined is not None:
            self._blocks[index] = refined

    def _read_blocks(self) -> Iterator[tuple[int, list[LayerReport], dict[str, str], BlockReport | None]]:
        for path in sorted(self.folder.iterdir()):
            if path.name.startswith(".block-") or path.name.startswith(".run.json"):
                path.unlink()  # somebody died while writing it
            elif match := _BLOCK.fullmatch(path.name):
                try:
                    with safe_open(path, framework="pt") as file:
                        rows, digests, refined = (
                            json.loads(file.metadata()[name]) for name in ("layers", "digests", "refined")
                        )
                    block = BlockReport(**refined) if refined else None
                    yield int(match[1]), [LayerReport(**row) for row in rows], digests, block
                except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
                    raise QuailoraError(f"{path} is damaged ({error}): {_DISCARD}") from error


def workspace_of(output: Path) -> Path:
    """The folder of an unfinished run that is to end with `output`."""
    output = output.resolve()
    return output.parent / f".{output.name}.quailora"


_DISCARD = "discard it with resume=False (--no-resume)"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """While it lasts, or until the process ends, no other process gets here with the same folder: that one gets a
    QuailoraError. (Windows has no such locks, and some network file systems have none.)"""
    if os.name != "posix":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        busy = QuailoraError(f"another run is at work in {folder}: wait for its end, or give another output folder")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise busy from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        if not folder.exists() or not os.path.samestat(os.fstat(descriptor), folder.stat()):
            raise busy  # it ended just now, and took the folder along
        yield
    finally:
        os.close(descriptor)


class _Stored:
    """Reads a tensor of a file."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name

    def __call__(self) -> Tensor:
        with safe_open(self._path, framework="pt") as file:
            return file.get_tensor(self._name)


def _differences(known: Any, asked: Any, name: str = "") -> Iterator[str]:
    """ "solver.iterations was 3 and is 5", for every leaf that differs."""
    if isinstance(known, dict) and isinstance(asked, dict):
        for key in {**known, **asked}:
            yield from _differences(known.get(key), asked.get(key), f"{name}.{key}" if name else str(key))
    elif known != asked:
        yield f"{name} was {_short(known)} and is {_short(asked)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
