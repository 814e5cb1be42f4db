"""Full-precision tensors by name, read lazily from safetensors: one file or shards, in a folder or on the Hugging Face
hub."""

from __future__ import annotations

import copy
import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import torch
from huggingface_hub import get_safetensors_metadata, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    NotASafetensorsRepoError,
    SafetensorsParsingError,
    StrictDataclassError,
)
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig

from quailora.errors import CheckpointError
from quailora.files import DTYPES, as_bytes, to_json
from quailora.modeling.model_class import check_auto_class, default_auto_class
from quailora.reporting.markdown import count

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATING = {name: DTYPES[name] for name in ("F64", "F32", "F16", "BF16")}
_PIECE = 4 * 2**20  # bytes cast at a time
_OWN_PAGES = 2**16  # tensors of at least this many bytes get pages of their own

# What transformers raises when config.json has a value that no model can be made from.
BAD_CONFIG = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, StrictDataclassError)
# What huggingface_hub raises when headers cannot be fetched. It lets errors of its HTTP library, whichever that is,
# pass through.
_NO_HEADERS: tuple[Any, ...] = (SafetensorsParsingError, ValueError, *HfHubHTTPError.__bases__)


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor is stored: its file, safetensors dtype name, shape, and byte range within the file.

    version: the file's size in bytes and time of modification in ns when its header was read.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    version: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def torch_dtype(self) -> torch.dtype:
        if self.dtype not in DTYPES:
            raise CheckpointError(f"{self.file} holds a tensor of {self.dtype}, for which torch has no dtype")
        return DTYPES[self.dtype]

    def read(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor in the file's dtype, or cast to `dtype` piece by piece. It is copied, not mapped:
        pages of a mapped file would count as resident until the mapping is gone.

        Raises:
            CheckpointError: the file cannot be read, has changed since its header was read, or torch has no such dtype.
        """
        dtype = dtype or self.torch_dtype
        tensor = _empty(self.shape, dtype)
        if dtype == self.torch_dtype:
            self.read_into(tensor)
        else:
            flat = tensor.view(-1)
            for first, piece in self.pieces(_empty((_PIECE,), torch.uint8)):
                flat[first : first + len(piece)] = piece
        return tensor

    def pieces(self, staging: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """The elements in order, as (index of the first element, piece in the file's dtype). Each piece is a view of
        `staging`, which the next piece overwrites."""
        staging, elements = staging.view(self.torch_dtype), prod(self.shape)
        for first in range(0, elements, len(staging)):
            piece = staging[: elements - first]
            self.read_into(piece, first)
            yield first, piece

    def read_into(self, part: torch.Tensor, first: int = 0) -> None:
        """Fill a contiguous CPU tensor of the file's dtype with the elements from index `first` on."""
        left = as_bytes(part)
        try:
            with self.file.open("rb", buffering=0) as stream:
                if _version(stream.fileno()) != self.version:
                    raise CheckpointError(f"{self.file} has changed since it was opened: download it again")
                stream.seek(self.start + first * part.itemsize)
                while len(left) > 0 and (size := stream.readinto(left)):  # a read returns at most 2 GiB
                    left = left[size:]
        except OSError as error:
            raise CheckpointError(f"{self.file} cannot be read: {_reason(error)}; download it again") from error
        if len(left) > 0:
            raise CheckpointError(f"{self.file} ends {count(len(left), 'byte')} too early: download it again")


@dataclass(frozen=True)
class UnreadTensor:
    """A tensor that is read when it is indexed. transformers' loader does so once, with `[...]`."""

    read: Callable[[], torch.Tensor]

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.read()[index]


class Checkpoint:
    """A full-precision checkpoint of a language model or a vision-language model. Weights are read when needed.

    Opening it reads only the headers, which is enough to find missing shards, truncated files and checkpoints that are
    already quantized.

    Args:
        name_or_path: a folder, or the id of a model on the Hugging Face hub.
        revision: a branch, tag or commit on the hub.
        trust_remote_code: passed on to transformers; code from a checkpoint runs only if the user allows it.
        auto_class: the class that training loads the model with, "AutoModelForCausalLM" or
            "AutoModelForImageTextToText"; None is the one that gives the class in `config.architectures`.
        headers_only: for a model on the hub that has not been downloaded, fetch only the headers of its files. Dtypes
            and shapes are then known, but tensors cannot be read.
        quantized: whether it is one with quantized weights that is asked for.

    Raises:
        CheckpointError: nothing there, not safetensors, a shard missing or truncated, weights already quantized, or an
            `auto_class` that is not supported.
    """

    def __init__(
        self,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
        auto_class: str | None = None,
        headers_only: bool = False,
        quantized: bool = False,
    ) -> None:
        self.name = str(name_or_path)
        self.revision = revision
        self.trust_remote_code = trust_remote_code
        folder = Path(name_or_path)
        if folder.is_file():
            raise CheckpointError(f"{folder} is a file: give the folder that holds {SINGLE} and config.json")
        self._folder = folder if folder.is_dir() else None
        self._downloads, self._quantized = not headers_only, quantized
        self.config = self._read_config()
        self.auto_class = check_auto_class(auto_class or default_auto_class(self.config))
        try:
            self.tensors = {name: entry for file in self._files() for name, entry in read_header(file)}
        except CheckpointError:
            if self._downloads or self._folder is not None:
                raise
            self.tensors = dict(self._headers_on_hub())

    def loaded_with(self, auto_class: str) -> Checkpoint:
        """The same checkpoint with this `auto_class`. Raises CheckpointError if it is not supported."""
        other = copy.copy(self)
        other.auto_class = check_auto_class(auto_class)
        return other

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype that transformers loads this checkpoint in with dtype="auto": the configuration's, else the
        tensors'."""
        declared = getattr(self.config.get_text_config(decoder=True), "dtype", None) or getattr(
            self.config, "dtype", None
        )
        if declared is not None:
            return getattr(torch, declared) if isinstance(declared, str) else declared
        found = next((FLOATING[entry.dtype] for entry in self.tensors.values() if entry.dtype in FLOATING), None)
        if found is None:
            raise CheckpointError(f"{self.name} holds no floating-point tensor")
        return found

    @cached_property
    def fingerprint(self) -> str:
        """A hash of every tensor's name, dtype, shape and a sample of its bytes. It is quick to compute and does not
        depend on the sharding."""
        digest = hashlib.sha256()
        for name, entry in sorted(self.tensors.items()):
            digest.update(f"{name} {entry.dtype} {entry.shape}".encode())
            with entry.file.open("rb") as file:
                file.seek(entry.start + max(0, entry.nbytes // 2 - 512))
                digest.update(file.read(min(1024, entry.nbytes)))
        return digest.hexdigest()[:32]

    def slices(self, names: Iterable[str], dtypes: Mapping[str, torch.dtype] | None = None) -> dict[str, UnreadTensor]:
        """The named tensors, each read (and cast as `dtypes` says) every time it is indexed, which may raise what
        `TensorEntry.read` raises."""
        return {name: UnreadTensor(partial(self.tensors[name].read, (dtypes or {}).get(name))) for name in names}

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, read now, in the dtype of the file."""
        return self.tensors[name].read()

    def has(self, filename: str) -> bool:
        """Whether there is a file of that name. If it is on the hub, it is downloaded.

        Raises:
            CheckpointError: the hub cannot be reached.
        """
        return self._locate(filename) is not None

    def _read_config(self) -> PretrainedConfig:
        try:
            config = AutoConfig.from_pretrained(
                self.name, revision=self.revision, trust_remote_code=self.trust_remote_code
            )
        except (OSError, *BAD_CONFIG) as error:
            place = "in this folder" if self._folder else "as a folder here, nor as a model on the Hugging Face hub"
            raise CheckpointError(f"no usable config.json for '{self.name}' {place}: {_reason(error)}") from error
        if getattr(config, "quantization_config", None) is not None and not self._quantized:
            raise CheckpointError(
                f"{self.name} is already quantized: the quantization error can only be computed from the "
                "full-precision checkpoint it was made from; give that one"
            )
        return config

    def _files(self) -> list[Path]:
        single = self._locate(SINGLE)  # first, like transformers, in case a folder has both
        if single is not None:
            return [single]
        index = self._locate(INDEX)
        if index is None:
            self._nothing_found()
        try:
            shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is not a safetensors index: {error!r}; download it again") from error
        files = []
        for shard in shards:
            if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
                raise CheckpointError(f"{index} points outside its folder, to {shard!r}: do not use this checkpoint")
            file = self._locate(shard)
            if file is None:
                raise CheckpointError(
                    f"shard {shard} of {self.name} is missing, one of the {len(shards)} in {index.name}: download it"
                )
            files.append(file)
        return files

    def _locate(self, filename: str) -> Path | None:
        if self._folder is not None:
            path = self._folder / filename
            return path if path.is_file() else None
        try:
            return Path(
                hf_hub_download(self.name, filename, revision=self.revision, local_files_only=not self._downloads)
            )
        except EntryNotFoundError:  # also when offline: the cache may have what is needed
            return None
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise CheckpointError(f"{filename} of '{self.name}' cannot be downloaded: {_reason(error)}") from error

    def _headers_on_hub(self) -> Iterator[tuple[str, TensorEntry]]:
        try:
            found = get_safetensors_metadata(self.name, revision=self.revision)
        except NotASafetensorsRepoError:
            self._nothing_found()
        except _NO_HEADERS as error:
            raise CheckpointError(f"the headers of '{self.name}' cannot be downloaded: {_reason(error)}") from error
        for filename, header in found.files_metadata.items():
            for name, tensor in header.tensors.items():
                file, (start, end) = Path(self.name, filename), tensor.data_offsets
                yield name, TensorEntry(file, tensor.dtype, tuple(tensor.shape), start, end, (0, 0))

    def _nothing_found(self) -> NoReturn:
        found = sorted(path.name for path in self._folder.iterdir()) if self._folder is not None else []
        pickled = [name for name in found if name.endswith((".bin", ".pt", ".pth"))]
        why = f"; {pickled[0]} is a pickle, which can run code: convert it to safetensors" if pickled else ""
        where = "" if self._folder is not None else " on the Hugging Face hub (if it can be reached) or in its cache"
        raise CheckpointError(f"{self.name} has neither {SINGLE} nor {INDEX}{where}{why}")


def _reason(error: Exception) -> str:
    """The library's own message on one line, cut off after 300 characters."""
    return " ".join(str(error).split())[:300] or repr(error)


def read_header(file: Path) -> Iterator[tuple[str, TensorEntry]]:
    """The tensors in the header of a safetensors file: 8 bytes of length (little-endian), JSON, then the data."""
    try:
        with safe_open(file, framework="pt"):
            pass  # safetensors has now checked that the header matches the file's size
        with file.open("rb") as stream:
            version = _version(stream.fileno())
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError) as error:
        size = file.stat().st_size
        raise CheckpointError(
            f"{file} ({size} bytes) is truncated, damaged or not a safetensors file: {_reason(error)}; download it "
            "again"
        ) from error
    header.pop("__metadata__", None)
    for name, tensor in header.items():
        start, end = (8 + length + offset for offset in tensor["data_offsets"])
        yield name, TensorEntry(file, tensor["dtype"], tuple(tensor["shape"]), start, end, version)


def index_of(folder: Path) -> str:
    """The text of INDEX for the safetensors files in a folder."""
    entries = {path.name: dict(read_header(path)) for path in sorted(folder.glob("*.safetensors"))}
    size = sum(entry.nbytes for of_file in entries.values() for entry in of_file.values())
    weight_map = {name: file for file, of_file in entries.items() for name in of_file}
    return to_json({"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))})


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """CPU memory that goes back to the operating system as soon as the tensor is gone. malloc would keep that of all
    but large tensors for the thread that allocated it: a block's worth or more, as measured."""
    size = prod(shape) * dtype.itemsize
    if size >= _OWN_PAGES and hasattr(mmap, "MAP_ANONYMOUS"):
        with suppress(OSError):  # no memory: torch will say so
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            return torch.frombuffer(memory, dtype=dtype).view(shape)
    return torch.empty(shape, dtype=dtype, device="cpu")


def _version(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns
