"""Full-precision tensors by name, read lazily from safetensors: one file or shards, in a folder or on the Hugging Face
hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig

from quailora.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATING = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# What transformers lets out where config.json has a value that no model can be made of.
BAD_CONFIG = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, StrictDataclassError)


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor stands: its file, safetensors dtype name, shape, and byte range within the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


class Checkpoint:
    """A full-precision checkpoint of a transformers causal language model; no weight is read before it is asked for.

    Opening reads the headers alone and finds missing shards, truncated files and already quantised checkpoints at once.

    Args:
        name_or_path: a folder, or the id of a model on the Hugging Face hub.
        revision: a branch, tag or commit on the hub.
        trust_remote_code: passed on to transformers; code from a checkpoint runs only where the user says so.

    Raises:
        CheckpointError: nothing there, not safetensors, a shard missing or truncated, or weights that are quantised
            already.
    """

    def __init__(
        self, name_or_path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
    ) -> None:
        self.name = str(name_or_path)
        self.revision = revision
        self.trust_remote_code = trust_remote_code
        folder = Path(name_or_path)
        if folder.is_file():
            raise CheckpointError(f"{folder} is a file: give the folder that holds {SINGLE} and config.json")
        self._folder = folder if folder.is_dir() else None
        self.config = self._read_config()
        self.tensors = {name: entry for file in self._files() for name, entry in _read_header(file)}

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype that transformers loads this checkpoint in when told "auto": the configuration's, else the
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
        """A hash of every tensor's name, dtype, shape and a sample of its bytes: the same however it is sharded, and
        quick."""
        digest = hashlib.sha256()
        for name, entry in sorted(self.tensors.items()):
            digest.update(f"{name} {entry.dtype} {entry.shape}".encode())
            with entry.file.open("rb") as file:
                file.seek(entry.start + max(0, entry.nbytes // 2 - 512))
                digest.update(file.read(min(1024, entry.nbytes)))
        return digest.hexdigest()[:32]

    def slices(self, names: list[str]) -> dict[str, Any]:
        """Lazy safetensors slices of the named tensors, one open (memory-mapped) file per shard."""
        files = {self.tensors[name].file: None for name in names}
        try:
            opened = {file: safe_open(file, framework="pt") for file in files}
            return {name: opened[self.tensors[name].file].get_slice(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.name} cannot be read: {error}") from error

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, read now, in the dtype of the file."""
        return self.slices([name])[name][...]

    def _read_config(self) -> PretrainedConfig:
        try:
            config = AutoConfig.from_pretrained(
                self.name, revision=self.revision, trust_remote_code=self.trust_remote_code
            )
        except (OSError, *BAD_CONFIG) as error:
            place = "in this folder" if self._folder else "as a folder here, nor as a model on the Hugging Face hub"
            raise CheckpointError(f"no usable config.json for '{self.name}' {place}: {_reason(error)}") from error
        if getattr(config, "quantization_config", None) is not None:
            raise CheckpointError(
                f"{self.name} is already quantised: the error of quantisation can only be computed from the "
                "full-precision checkpoint it was made from; give that one"
            )
        return config

    def _files(self) -> list[Path]:
        single = self._locate(SINGLE)  # first, as transformers does where a folder has both
        if single is not None:
            return [single]
        index = self._locate(INDEX)
        if index is None:
            self._nothing_found()
        try:
            shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is not a safetensors index: {error!r}; fetch it again") from error
        files = []
        for shard in shards:
            if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
                raise CheckpointError(f"{index} points outside its folder, to {shard!r}: do not use this checkpoint")
            file = self._locate(shard)
            if file is None:
                raise CheckpointError(
                    f"shard {shard} of {self.name} is missing, one of the {len(shards)} in {index.name}: fetch it"
                )
            files.append(file)
        return files

    def _locate(self, filename: str) -> Path | None:
        if self._folder is not None:
            path = self._folder / filename
            return path if path.is_file() else None
        try:
            return Path(hf_hub_download(self.name, filename, revision=self.revision))
        except EntryNotFoundError:  # offline as well: what the cache has may do
            return None
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise CheckpointError(f"{filename} of '{self.name}' cannot be had: {_reason(error)}") from error

    def _nothing_found(self) -> NoReturn:
        found = sorted(path.name for path in self._folder.iterdir()) if self._folder is not None else []
        pickled = [name for name in found if name.endswith((".bin", ".pt", ".pth"))]
        why = f"; {pickled[0]} is a pickle, which can run code: convert it to safetensors" if pickled else ""
        where = "" if self._folder is not None else " on the Hugging Face hub, if that can be reached, nor in its cache"
        raise CheckpointError(f"{self.name} has neither {SINGLE} nor {INDEX}{where}{why}")


def _reason(error: Exception) -> str:
    """The libraries' own words, on one line, without the advice that follows."""
    return " ".join(str(error).split())[:300] or repr(error)


def _read_header(file: Path) -> Iterator[tuple[str, TensorEntry]]:
    """The header of a safetensors file: 8 bytes of length (little-endian), JSON, then the data."""
    try:
        with safe_open(file, framework="pt"):
            pass  # safetensors has now checked that header and file agree to the byte
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError) as error:
        size = file.stat().st_size
        raise CheckpointError(
            f"{file} ({size} bytes) is truncated, damaged or no safetensors file: {_reason(error)}; fetch it again"
        ) from error
    header.pop("__metadata__", None)
    for name, tensor in header.items():
        start, end = (8 + length + offset for offset in tensor["data_offsets"])
        yield name, TensorEntry(file, tensor["dtype"], tuple(tensor["shape"]), start, end)
