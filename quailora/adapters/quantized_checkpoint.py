"""A quantized base on disk: its weights, one linear at a time, without the library that a model loads them with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from quailora.errors import AdapterError, CheckpointError, MismatchError
from quailora.modeling.checkpoint import Checkpoint
from quailora.modeling.streamed_model import StreamedModel
from quailora.quantization.protocol import QuantizedBase, QuantizedWeight
from quailora.quantization.registry import from_dict
from quailora.quantization.verify import CALIBRATED, digest


class QuantizedCheckpoint:
    """The folder of a base that was written.

    Args:
        folder: the base's.
        base: how it is quantized.
        digests: what is recorded of its linears, by name; a weight that differs is refused.
        trust_remote_code: as `Checkpoint` has it.

    Raises:
        CheckpointError: nothing there, or not a whole checkpoint.
    """

    def __init__(
        self, folder: str | Path, base: QuantizedBase, digests: Mapping[str, str], *, trust_remote_code: bool = False
    ) -> None:
        self.checkpoint = Checkpoint(folder, quantized=True, trust_remote_code=trust_remote_code)
        self._base, self._digests = base, digests

    @classmethod
    def recorded(
        cls, base: Mapping[str, Any], moved_to: str | Path | None = None, *, trust_remote_code: bool = False
    ) -> QuantizedCheckpoint | None:
        """The base that the record of an adapter names, or the folder given; None where Q follows from the checkpoint.

        Raises AdapterError where only its folder could tell what Q is, CheckpointError where the folder is not there.
        """
        folder = moved_to or base.get("path")
        if folder is None and base.get("rounding") == CALIBRATED:
            raise AdapterError(
                "the codes of this adapter's base were chosen by calibration, so they cannot be computed from the "
                "full-precision weights: give the base's folder as base (--base)"
            )
        if folder is None:
            return None
        if "quantization" not in base:
            raise AdapterError("base (--base) goes with an adapter that has a record of its base (quailora.json)")
        if not Path(folder).is_dir():
            raise CheckpointError(f"the base is not at {folder}: give its folder as base (--base)")
        form, digests = from_dict(base["quantization"]), base.get("digests", {})
        return cls(folder, form, digests, trust_remote_code=trust_remote_code)

    @property
    def names(self) -> list[str]:
        """The linears that are recorded."""
        return list(self._digests)

    def weight(self, name: str, stream: StreamedModel) -> QuantizedWeight:
        """The quantized weight of a linear of `stream`'s model.

        Raises MismatchError where it is not the recorded one, CheckpointError where it is damaged or missing.
        """
        return self.stored((stream.source(f"{name}.weight") or f"{name}.weight").removesuffix(".weight"), name)

    def stored(self, stem: str, name: str) -> QuantizedWeight:
        """The quantized weight whose tensors' names begin with `stem`, of the linear that is recorded as `name`. Raises
        as `weight` does."""

        def tensor(part: str) -> Tensor:
            if f"{stem}.{part}" not in self.checkpoint.tensors:
                raise CheckpointError(f"{self.checkpoint.name} has no {stem}.{part}")
            return self.checkpoint.tensor(f"{stem}.{part}")

        quantized = self._base.load(name, tensor)
        if (known := self._digests.get(name)) and (found := digest(quantized)) != known:
            raise MismatchError(
                f"{name} of {self.checkpoint.name} is not the weight that the adapter was made for (digest {found}, "
                f"recorded {known}): give that base"
            )
        return quantized
