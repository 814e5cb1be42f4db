"""Where calibration data comes from: text in pieces, or the records of a file, a data set, or an iterable."""

from __future__ import annotations

import glob
import gzip
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quailora.errors import CalibrationError
from quailora.reporting.markdown import count

SHUFFLE_BUFFER = 10_000  # records of a streamed data set that the draw chooses from
PIECE = 4 << 20  # characters of a text file tokenized at once; each takes about 140 bytes of memory

# Files of records, by suffix: the loader of `datasets` and its options. Any other file is text.
RECORD_FILES: dict[str, tuple[str, dict[str, Any]]] = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
}
ACCEPTED_FILES = f"UTF-8 text and {', '.join(RECORD_FILES)}, each also as .gz"
_KNOWN_SUFFIXES = (".txt", ".md", ".gz", *RECORD_FILES)
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.+-]+)?")


def text_file(data: Any) -> Path | None:
    """The path of a file of plain text; None for anything else."""
    if isinstance(data, str | os.PathLike) and os.path.isfile(path := Path(data).expanduser()):
        return None if _suffix(path) in RECORD_FILES else path
    return None


def read_text(path: Path) -> Iterator[str]:
    """The text in pieces of about PIECE characters, cut after a newline. Raises CalibrationError if it is not UTF-8."""
    open_file = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with open_file(path, "rt", encoding="utf-8-sig") as file:
            while piece := file.read(PIECE):
                yield piece + file.readline(PIECE)
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise CalibrationError(f"{path} is not UTF-8 text: {error}; accepted are {ACCEPTED_FILES}") from error


def open_records(data: Any, samples: int, seed: int, split: str) -> tuple[Iterable[tuple[int, Any]], str]:
    """The numbered records of `data`, in the order to try them in, and a name for the source.

    See `load_calibration` for what `data` may be and how records are drawn. Raises CalibrationError.
    """
    if isinstance(data, str | os.PathLike):
        path = Path(data).expanduser()
        if os.path.isdir(path):
            return enumerate(_stream(str(path), None, split, seed)), f"{path} ({split})"
        if not os.path.isfile(path):
            if path.suffix.lower() in _KNOWN_SUFFIXES or not (isinstance(data, str) and _HUB_NAME.fullmatch(data)):
                shown = str(data) if len(str(data)) <= 80 else f"{str(data)[:80]}..."
                raise CalibrationError(f"there is no file {shown!r}; pass text itself as a list of strings (in Python)")
            name, _, config = data.partition(":")
            return enumerate(_stream(name, config or None, split, seed)), f"{data} ({split})"
        data, kind = _load_file(path), path.name
    elif isinstance(data, Tensor):
        return enumerate([data]), f"tokens {tuple(data.shape)}"
    elif isinstance(data, Mapping):
        if "input_ids" in data:
            return enumerate([data]), "tokens"
        if split not in data:
            raise CalibrationError(f"no split (--split) {split!r} (nor input_ids) among {', '.join(map(repr, data))}")
        return open_records(data[split], samples, seed, split)
    else:
        kind = type(data).__name__
    if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        return _draw(data, samples, seed), f"{kind} ({count(len(data), 'record')})"
    if isinstance(data, Iterable):
        return enumerate(data), kind
    raise CalibrationError(f"calibration data cannot be a {kind}: pass a file, a data set, texts, or tokens")


def _suffix(path: Path) -> str:
    """The suffix in lower case, without that of the compression."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _draw(records: Sequence[Any], samples: int, seed: int) -> Iterator[tuple[int, Any]]:
    # All are offered, not just `samples`: some may be passed over, and the caller stops when it has enough.
    order: Iterable[int] = range(len(records))
    if len(records) > samples:
        order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed)).tolist()
    return ((number, records[number]) for number in order)


def _load_file(path: Path) -> Sequence[Any]:
    """The records of a file as a `datasets.Dataset`, which keeps a copy on disk in its cache and can be indexed."""
    import datasets

    loader, options = RECORD_FILES[_suffix(path)]
    try:
        # Escaped, as a path may contain what `datasets` would take for a pattern.
        return datasets.load_dataset(loader, data_files=glob.escape(str(path)), split="train", **options)
    except StopIteration:  # what the JSON loader raises for an empty file
        return []
    except (OSError, ValueError, EOFError, datasets.exceptions.DatasetsError) as error:
        reason = error.__cause__ or error  # the error of `datasets` itself says only that there was one
        raise CalibrationError(
            f"{path} cannot be read as {loader}: {type(reason).__name__}: {' '.join(str(reason).split())[:300]}"
        ) from error


def _stream(name: str, config: str | None, split: str, seed: int) -> Iterator[Any]:
    """The records of a data set on the hub or in a folder, shuffled, and downloaded only as far as they are read."""
    import datasets

    try:
        stream = datasets.load_dataset(name, config, split=split, streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise CalibrationError(
            f"no file {name!r} here, and as a data set (config {config!r}, split {split!r}) it does not load; "
            f"name another split (--split), or a config as 'name:config'. {type(error).__name__}: {error}"
        ) from error

    def records() -> Iterator[Any]:
        try:
            yield from stream.shuffle(seed, buffer_size=SHUFFLE_BUFFER)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise CalibrationError(f"the data set {name!r} cannot be read: {type(error).__name__}: {error}") from error

    return records()
