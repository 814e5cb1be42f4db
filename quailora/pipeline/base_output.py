"""A quantized base written as an ordinary checkpoint, a block at a time: what `from_pretrained` loads."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor

from quailora.adapters.merge import generation_config
from quailora.adapters.targets import Target
from quailora.calibration.tokenizer import load_tokenizer
from quailora.errors import AdapterError, QuailoraError
from quailora.files import LazyTensor, check_new_folder, replaced, to_json, write_files, write_tensors, writing
from quailora.modeling.checkpoint import INDEX, index_of
from quailora.modeling.streamed_model import StreamedModel
from quailora.pipeline.resume import locked, workspace_of
from quailora.quantization.protocol import QuantizedBase, QuantizedWeight
from quailora.quantization.registry import is_quantized
from quailora.quantization.verify import digest_of
from quailora.refinement.config import RefinementConfig
from quailora.reporting.model_card import base_card
from quailora.reporting.record import RECORD


class BaseOutput:
    """The folder of a base while it is filled: `.NAME.quailora-base` beside NAME, which takes that name when it is
    whole. It is this process's until `leave` or `publish`.

    One file of tensors for each block, and one for what is outside of them.

    Args:
        folder: where the base goes: absent or empty.
        stream: the full-precision model.
        quantized: the names of the linears that are quantized.
        adapter: the folder of the adapter that it is made with; an unfinished base goes on only with that.
        resume: whether another run's unfinished base is an error; else it is discarded.
        keep: whether the run goes on, and what is written of it is kept.
        published: whether the run has given the folder its name already, and died then.

    Raises:
        AdapterError: a base of this kind is not written; or a linear's weight is not a tensor of its own in the
            checkpoint, so that its quantized one has no name.
        QuailoraError: the folder is not empty; or another run has an unfinished base there, or is at work on one.
    """

    def __init__(
        self,
        folder: Path,
        stream: StreamedModel,
        base: QuantizedBase,
        quantized: Iterable[str],
        *,
        adapter: Path,
        resume: bool = True,
        keep: bool = True,
        published: bool = False,
    ) -> None:
        self.published = published and (folder / RECORD).is_file()
        if not self.published:
            check_new_folder(folder)
        self.folder = folder.resolve()
        self._stream, self._base = stream, base
        self._partial = _partial(self.folder)
        blocks = stream.blocks[0].name.rpartition(".")[0]
        self._settings = base.checkpoint_config(blocks)
        self._stems: dict[str, str] = {}  # linear -> what its tensors' names begin with in the checkpoint
        for name in quantized:
            key = stream.source(f"{name}.weight")
            if key is None or not key.endswith(".weight"):
                raise AdapterError(
                    f"the checkpoint does not store the weight of {name} as one tensor of its own: a base of this "
                    "model cannot be written"
                )
            self._stems[name] = key.removesuffix(".weight")

        self._lock = ExitStack()
        if not self.published:
            self._open(str(adapter.resolve()), resume, keep)

    def _open(self, adapter: str, resume: bool, keep: bool) -> None:
        """Take the unfinished folder, and remove what a run that died left in it half written."""
        with ExitStack() as held, writing(self.folder):
            self._partial.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(self._partial))
            owner = self._partial / _OWNER
            if owner.is_file() and resume and (of := owner.read_text(encoding="utf-8")) != adapter:
                raise QuailoraError(
                    f"{self._partial} holds the unfinished base of a run that makes {of}: finish that run, give "
                    "another base_output (--base-output), or discard it with resume=False (--no-resume)"
                )
            for path in self._partial.iterdir():
                if path.is_file() and (not keep or path.name.startswith(".model-")):
                    path.unlink()
            owner.write_text(adapter, encoding="utf-8")
            self._lock = held.pop_all()

    def has(self, index: int) -> bool:
        """Whether the block is written."""
        return self.published or (self._partial / _shard(index)).is_file()

    def read_block(self, index: int, names: Iterable[str]) -> dict[str, QuantizedWeight]:
        """The quantized weights of a block that is written."""
        folder = self.folder if self.published else self._partial
        with safe_open(folder / _shard(index), framework="pt") as file:

            def read(name: str, part: str) -> Tensor:
                return file.get_tensor(f"{self._stems[name]}.{part}")

            return {name: self._base.load(name, partial(read, name)) for name in names}

    def leave(self) -> None:
        """Let others have the folder, and remove it where it holds no block."""
        with self._lock:
            if not self.published and not any(self._partial.glob("model-block-*")):
                shutil.rmtree(self._partial, ignore_errors=True)

    def write_block(self, index: int, quantized: Mapping[str, QuantizedWeight]) -> None:
        """Write the tensors of a block: the quantized ones given, and the others from the checkpoint."""
        tensors: dict[str, LazyTensor] = {}
        stored = dict.fromkeys(self._stream.keys(f"{self._stream.blocks[index].name}."))
        for name, weight in quantized.items():
            stem = self._stems[name]
            del stored[f"{stem}.weight"]
            for part, tensor in self._base.tensors(weight, self._stream.dtype).items():
                tensors[f"{stem}.{part}"] = LazyTensor.of(tensor)
        self._write(_shard(index), tensors | self._from_checkpoint(stored))

    def unquantized(self) -> dict[str, str]:
        """Digests of the parameters that are not quantized, by name. Left out are those that a loader merges or splits,
        and fused experts, which may be most of the checkpoint."""
        entries, quantized = self._stream.checkpoint.tensors, {f"{name}.weight" for name in self._stems}
        found = {}
        for name, parameter in self._stream.model.named_parameters():
            key = self._stream.source(name)
            if key is not None and name not in quantized and parameter.dim() < 3:
                found[name] = digest_of(entries[key].read(self._stream.dtype))
        return found

    def complete(self, record: dict[str, Any]) -> None:
        """Write the rest: what is outside the blocks, configuration, tokenizer, index, model card and `record`."""
        source = self._stream.checkpoint
        outside = set(source.tensors)
        for index, block in enumerate(self._stream.blocks):
            if self.has(index):
                outside -= set(self._stream.keys(f"{block.name}."))
        if missing := [stem for stem in self._stems.values() if f"{stem}.weight" in outside]:
            raise QuailoraError(f"{self._partial} has lost the file with {missing[0]}: start the run again")
        self._write(_REST, self._from_checkpoint(outside))
        config = copy.deepcopy(source.config)
        config.quantization_config = self._settings
        config.dtype = self._stream.dtype
        with writing(self.folder):
            config.save_pretrained(self._partial)
            if (generation := generation_config(source)) is not None:
                generation.save_pretrained(self._partial)
            if (tokenizer := load_tokenizer(source)) is not None:
                tokenizer.save_pretrained(self._partial)
            texts = {INDEX: index_of(self._partial), RECORD: to_json(record), "README.md": base_card(record)}
            write_files(self._partial, texts)

    def publish(self) -> None:
        """Give the folder its name."""
        with self._lock, writing(self.folder):
            check_new_folder(self.folder)
            (self._partial / _OWNER).unlink()
            if self.folder.exists():
                self.folder.rmdir()
            self._partial.replace(self.folder)

    def _from_checkpoint(self, keys: Iterable[str]) -> dict[str, LazyTensor]:
        """Tensors as the checkpoint holds them."""
        source = self._stream.checkpoint
        found = {}
        for key in keys:
            entry = source.tensors[key]
            found[key] = LazyTensor(entry.shape, entry.torch_dtype, entry.read)
        return found

    def _write(self, name: str, tensors: dict[str, LazyTensor]) -> None:
        path = self._partial / name
        with writing(path):
            self._partial.mkdir(parents=True, exist_ok=True)
            with replaced(path) as unfinished:
                write_tensors(unfinished, tensors)


def discard_unfinished(folder: Path, adapter: Path) -> None:
    """Remove the unfinished base of `folder`, if it is of a run that was to make `adapter`. Raises QuailoraError if
    that still runs."""
    partial = _partial(folder)
    owner = partial / _OWNER
    if owner.is_file() and owner.read_text(encoding="utf-8") == str(adapter.resolve()):
        with writing(folder), locked(partial):
            shutil.rmtree(partial)


def check_apart(adapter: Path, base: Path) -> None:
    """Raises AdapterError where one of the two output folders would be in the other, or in its unfinished one."""
    one, other = (path.resolve() for path in (adapter, base))
    hidden = [workspace_of(one), _partial(other)]
    folders = [one, other, *hidden]
    for mine in (one, other):
        for theirs in folders:
            if mine is not theirs and (mine == theirs or mine in theirs.parents or theirs in mine.parents):
                raise AdapterError(
                    f"the base's folder {base} (base_output, --base-output) and the adapter's, {adapter}, are in each "
                    "other's way: give two that are apart"
                )


def quantized_linears(model: PeftModel, stream: StreamedModel) -> list[str]:
    """The linears of the blocks that the skeleton of a base has quantized."""
    held = _quantized(model)
    return [name for block in stream.blocks for name in block.linears() if name in held]


def check_within_blocks(model: PeftModel, quantized: Collection[str]) -> None:
    """Raises AdapterError where the base also quantizes linears outside of the blocks, which are not in memory when it
    is written."""
    if outside := sorted(_quantized(model) - set(quantized)):
        raise AdapterError(
            f"{outside[0]} is quantized too, and is not in a block of the decoder, so this base cannot be written: "
            "leave out base_output (--base-output), or take GPTQ's format (--bits), which quantizes only the blocks"
        )


def _quantized(model: PeftModel) -> set[str]:
    plain: Any = model.get_base_model()
    return {name.removesuffix(".base_layer") for name, module in plain.named_modules() if is_quantized(module)}


def unadapted_linears(
    quantized: Collection[str], targets: Collection[Target], *, written: bool, refinement: RefinementConfig | None
) -> list[str] | None:
    """The quantized linears that no adapter is on, where they take part in the run: the base is written, or blocks are
    refined. Else None."""
    if not written and refinement is None:
        return None
    return sorted(set(quantized) - {target.name for target in targets})


def base_layer(model: PeftModel, name: str) -> Any:
    """The linear of the base of that name, also where an adapter is on it."""
    module: Any = model.get_base_model().get_submodule(name)
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def partly(quantized: Collection[str], stream: StreamedModel) -> tuple[str, ...] | None:
    """The names, within a block, of the quantized linears, where other linears are not; None where all are.

    Raises AdapterError where a name does not tell one that is from one that is not, as loaders compare endings.
    """
    every = {name: name.removeprefix(f"{block.name}.") for block in stream.blocks for name in block.linears()}
    names = tuple(sorted({every[name] for name in quantized}))
    left = [name for name in every if name not in set(quantized)]
    if confused := [name for name in left if name.endswith(names)]:
        raise AdapterError(
            f"{confused[0]} stays in full precision, and the format cannot tell it from one that does not"
        )
    return names if left else None


_OWNER = ".adapter"  # in an unfinished folder: the folder of the adapter that it is made with
_REST = "model-outside-blocks.safetensors"


def _partial(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.quailora-base"


def _shard(index: int) -> str:
    return f"model-block-{index:04}.safetensors"
