"""An initialized adapter that was kept frozen under the adapter that was trained: the two on disk, and as one."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS

from quailora.adapters.saved_adapter import SavedAdapter, set_ranks
from quailora.errors import AdapterError, MismatchError
from quailora.files import read_json, to_json
from quailora.reporting.record import weights_digest

NAME = "correction"  # of the frozen adapter in a PEFT model, and of its folder where it was saved again
FILE = "quailora_correction.json"  # beside the trained adapter


@dataclass(frozen=True)
class Correction:
    """Which frozen adapter a trained one needs beneath it.

    folder: its folder.
    digest: SHA-256 of its weights' file.
    trained: whether its weights changed in training after all, so that `folder` has them as they were then.
    """

    folder: str
    digest: str
    trained: bool = False

    @classmethod
    def of(cls, folder: Path, *, trained: bool = False) -> Correction:
        return cls(str(folder.resolve()), weights_digest(folder), trained)

    @classmethod
    def read(cls, adapter: Path) -> Correction | None:
        """That of a trained adapter's folder; None if it has none. Raises AdapterError if the file is damaged."""
        values = read_json(adapter / FILE)
        if values is None:
            return None
        try:
            return cls(str(values["folder"]), str(values["digest"]), bool(values.get("trained")))
        except KeyError as error:
            raise AdapterError(f"{adapter / FILE} is damaged: it lacks {error}") from error

    def to_json(self) -> str:
        return to_json(asdict(self))

    def found(self, adapter: Path, initial: Path | None = None) -> Path:
        """The folder of the frozen adapter, which is `initial` if it has been moved; where training changed it, the one
        that it was saved to again.

        Raises:
            AdapterError: it is not there.
            MismatchError: it has other weights than the one that was frozen.
        """
        folder = self._existing(adapter, initial)
        if weights_digest(folder) != self.digest:
            raise MismatchError(
                f"{folder} is not the adapter that was frozen while {adapter} was trained: its weights differ. Give "
                "that adapter's folder as initial (--initial)"
            )
        return folder

    def _existing(self, adapter: Path, initial: Path | None) -> Path:
        folder = Path(self.folder) if initial is None else initial
        if self.trained and (adapter / NAME / WEIGHTS).is_file():
            folder = adapter / NAME  # wherever the two have been moved
        if not (folder / WEIGHTS).is_file():
            raise AdapterError(
                f"{adapter} was trained over the frozen adapter {self.folder}, and {folder} has no {WEIGHTS}: give its "
                "folder as initial (--initial)"
            )
        return folder


def correction_folder(adapter: Path) -> Path | None:
    """Where the frozen adapter beneath a trained one is, by its record; None if it was trained alone. Raises
    AdapterError if it is not there."""
    known = Correction.read(adapter)
    return None if known is None else known._existing(adapter, None)


def saved_adapter(folder: Path, initial: Path | None = None) -> SavedAdapter:
    """An adapter as what it adds to its base: with the frozen adapter that it was trained over, if it was.

    Raises MismatchError, AdapterError: as for `SavedAdapter` and `Correction.found`.
    """
    known = Correction.read(folder)
    if known is None:
        return SavedAdapter(folder)
    return combined(SavedAdapter(known.found(folder, initial)), SavedAdapter(folder))


def combined(correction: SavedAdapter, trained: SavedAdapter) -> SavedAdapter:
    """Both as one adapter of the summed rank, with scaling 1. What it has besides LoRA's factors is the trained one's.

    Raises AdapterError: the trained one also adapts embeddings.
    """
    if embedding := next((key for key in trained.tensors if ".lora_embedding_" in key), None):
        raise AdapterError(f"{embedding}: only adapters of linears can be combined with a frozen one")
    both = copy.copy(trained)
    both.config = copy.deepcopy(trained.config)
    both.modules = sorted({*correction.modules, *trained.modules})
    both.tensors = {
        key: value for key, value in trained.tensors.items() if ".lora_A." not in key and ".lora_B." not in key
    }
    ranks = {}
    for module in both.modules:
        parts = [each.factors(module) for each in (correction, trained) if module in each.modules]
        a, b = torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts], dim=1)
        both.tensors[f"{module}.lora_A.weight"] = a.float().contiguous()
        both.tensors[f"{module}.lora_B.weight"] = b.float().contiguous()
        ranks[module] = len(a)
    set_ranks(both.config, ranks)
    both.config.target_modules = [module.removeprefix("base_model.model.") for module in both.modules]
    both.config.exclude_modules = both.config.layers_to_transform = both.config.layers_pattern = None
    return both
