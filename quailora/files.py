"""Files that are written whole or not at all, folders likewise, and safetensors files larger than memory."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from quailora.errors import AdapterError, QuailoraError

# What safetensors calls dtypes.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write to, which takes the name `path` only if everything was written; otherwise nothing is left.

    Raises:
        QuailoraError: the folder is not empty, or cannot be written (for example because the disk is full).
    """
    check_new_folder(path)
    path = path.resolve()  # if it is a symbolic link, its target is written
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        hidden = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            partial = hidden / path.name
            partial.mkdir()  # mkdtemp's own is for nobody else, whatever the umask
            yield partial
            if path.exists():
                path.rmdir()
            partial.replace(path)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)


def check_new_folder(path: Path) -> None:
    """Raises QuailoraError unless `path` is an empty folder or does not exist."""
    if path.is_dir() and any(path.iterdir()):
        raise QuailoraError(f"the output folder {path} is not empty: give another one, or remove it")
    if path.exists() and not path.is_dir():
        raise QuailoraError(f"{path} is a file, and the output must be a folder")
    if os.path.ismount(path):
        raise QuailoraError(f"{path} is a mount point, which cannot be replaced: give a folder inside it")


@contextmanager
def writing(path: Path, advice: str | None = None) -> Iterator[None]:
    """Within it, errors of the operating system become QuailoraErrors that name `path` and end with `advice`."""
    advice = advice or f"nothing was written to {path}"
    try:
        yield
    except Exception as error:
        if _is_out_of_space(error):
            raise QuailoraError(f"the disk that holds {path.parent} is full: {advice}") from error
        if isinstance(error, OSError | SafetensorError):
            raise QuailoraError(f"{path} cannot be written: {error}; {advice}") from error
        raise


def _is_out_of_space(error: BaseException) -> bool:
    # safetensors writes from Rust and gives the operating system's error only as text.
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary name for a file that replaces `path` once it is on disk, so that `path` is never half written."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Write a new file name to disk, which takes an fsync of its folder. (Windows needs none and allows none.)"""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is not read until it is written; its shape and dtype are known before."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> LazyTensor:
        """One that is in memory."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    def times(self, factor: float) -> LazyTensor:
        return self if factor == 1 else LazyTensor(self.shape, self.dtype, lambda: self.read() * factor)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_tensors(path: Path, tensors: dict[str, LazyTensor]) -> None:
    """Write a safetensors file with one tensor in memory at a time: the same bytes as `safetensors.torch.save_file`.

    The format: 8 bytes of length (little-endian), a JSON header padded to 8 bytes, then the data, sorted by dtype (the
    widest first) and then by name.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in ordered:
        stop = start + tensor.nbytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in ordered:
            value = tensor.read().contiguous()
            assert tuple(value.shape) == tensor.shape and value.dtype == tensor.dtype, name
            file.write(as_bytes(value))
        file.flush()
        os.fsync(file.fileno())


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, for reading or writing."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def write_files(folder: Path, texts: dict[str, str]) -> None:
    """Write text files, given by name, into `folder`, which is created if missing. All of them are on disk before the
    first replaces an old one, so a failure changes none.

    Raises:
        QuailoraError: the disk is full, or the folder is not writable.
    """
    partial = {folder / name: folder / f".{name}.{os.getpid()}" for name in texts}
    path = folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            for path, text in zip(partial, texts.values(), strict=True):
                with partial[path].open("w", encoding="utf-8") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
            for path in partial:
                os.replace(partial[path], path)
        finally:
            for temporary in partial.values():
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise QuailoraError(
            f"{path} cannot be written: {error.strerror or error}; free some space there, or give another folder"
        ) from error


def to_json(values: dict[str, Any]) -> str:
    """Indented JSON without NaN, ending in a newline."""
    return json.dumps(values, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is no file. Raises AdapterError if it is not a JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise AdapterError(f"{path} is damaged: it holds a {type(values).__name__}, not an object")
    return values
