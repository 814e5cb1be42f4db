"""What a quantized base is: how its weights are quantized, and the quantized weight of one linear.

To add a base, write a file beside this one with a subclass of `QuantizedBase`, and list it in `registry.py`.

m and n are a linear's outputs and inputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from quailora.errors import AdapterError
from quailora.quantization.feedback import Curvature


class QuantizedWeight(Protocol):
    """The quantized weight of one linear. One whose property `packed` is not None is read by the fused kernels, in that
    form: a `bitsandbytes_weights.FourBit`, an `EightBit` or `Steps` (`ops.packed`)."""

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""

    def dequantize(self) -> Tensor:
        """Q (m, n), floating point: the weight that the deployed forward pass multiplies with."""

    def parts(self) -> tuple[list[Tensor], list[Tensor]]:
        """The codes, and the scales with whatever else is in floating point. Both are hashed to recognize a base."""

    def to(self, device: torch.device) -> Self:
        """The same on `device`, sharing the tensors that are there already."""


class QuantizedBase(ABC):
    """How the weights of a base are quantized. Immutable, compared by value, and kept as JSON beside an adapter.

    Its linears are modules with `in_features` and `out_features`.
    """

    library: ClassVar[str]  # names the base in records: the library whose modules these are, or the format
    formats: ClassVar[tuple[str, ...]] = ()  # the `registry.Format`s that `config_for` makes

    @classmethod
    @abstractmethod
    def matches(cls, thing: object) -> bool:
        """Whether a quantization config of transformers, or a module, is of this kind; a module loaded or not."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: object) -> Self:
        """From a quantization config of transformers. Raises AdapterError for one that is not supported."""

    @abstractmethod
    def to_config(self) -> Any:
        """The quantization config of transformers that quantizes so. Raises AdapterError where there is none."""

    @classmethod
    @abstractmethod
    def from_module(cls, module: nn.Module, config: object = None) -> Self:
        """From one loaded linear; `config` is that of the model, for settings that no single linear knows.

        Raises AdapterError for a module of another kind, or whose weight is not in memory or not quantized yet.
        """

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; `library` among them."""

    @classmethod
    @abstractmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`, Raises AdapterError for anything else."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The format in one word, such as "NF4"."""

    @abstractmethod
    def describe(self) -> str:
        """Name and settings in one line."""

    @abstractmethod
    def differences(self, other: QuantizedBase, *, layers: bool = True) -> list[str]:
        """What gives `other` a different Q: a phrase each, self's value first; empty if nothing does.

        layers: whether to compare which layers are quantized too; False where either is `from_module`, without config.
        """

    @classmethod
    @abstractmethod
    def read(cls, module: nn.Module) -> QuantizedWeight:
        """The quantized weight of a loaded linear, sharing its memory. Raises AdapterError as `from_module` does."""

    @property
    def nearest(self) -> bool:
        """Whether `quantize` gives every weight of such a base again from W, so that one that is found can be compared
        with it. False where its codes may have been chosen by calibration."""
        return True

    @abstractmethod
    def quantize(self, weight: Tensor) -> QuantizedWeight:
        """The quantized weight of W (m, n), in the dtype the base is loaded in, by nearest rounding.

        Raises CheckpointError for a weight that cannot be quantized.
        """

    def calibrated(self, weight: Tensor, curvature: Curvature) -> QuantizedWeight:
        """The quantized weight of W (m, n), any floating dtype, with the errors of rounding fed back; see
        `quantization.feedback`. Raises AdapterError where the base has no such rounding, CheckpointError for a weight
        that cannot be quantized."""
        raise AdapterError(f"{self.describe()} has no calibrated rounding: its codes follow from the weights alone")

    def group_of(self, columns: int) -> int:
        """How many of a row's columns share a scale; for calibrated rounding."""
        raise NotImplementedError

    def memory(self, outputs: int, inputs: int, device: torch.device) -> tuple[int, int]:
        """Bytes of the quantized weight (m, n), and of what quantizing it on `device` takes besides, at most; for plans
        within a memory budget. As long as a base does not say: 8 bits with an fp32 scale for every 64 elements, and
        four fp32 copies of W."""
        elements = outputs * inputs
        return elements + elements // 16 + 8 * outputs, 16 * elements

    @property
    def fused(self) -> bool:
        """Whether the fused kernels read its weights, by their `packed`; where not, a GPU has E in memory."""
        return False

    keeps_q: ClassVar[bool] = False  # whether a block's backward pass has every Q in memory, and not one at a time

    def loaded(self, outputs: int, inputs: int) -> int:
        """Bytes of the tensors that a loaded linear (m, n) holds its quantized weight in. As long as a base does not
        say: as `memory` has it."""
        return self.memory(outputs, inputs, torch.device("cpu"))[0]

    @classmethod
    def config_for(cls, name: str, dtype: torch.dtype, *, double: bool, compute: torch.dtype | None) -> Any:
        """See `registry.config_for`; `name` is one of `formats`."""
        raise NotImplementedError

    # What a base needs that is written as a checkpoint.

    planned: ClassVar[type[nn.Linear] | None] = None  # stands for a linear where transformers cannot say what it makes

    def loaded_in(self, dtype: torch.dtype) -> Self:
        """The same for a model whose weights are loaded in `dtype`."""
        return self

    def obstacle(self, outputs: int, inputs: int) -> str | None:
        """Why a linear of this shape stays in full precision; None if it is quantized. Raises AdapterError where other
        settings should be taken."""
        return None

    def of_modules(self, names: tuple[str, ...] | None) -> Self:
        """The same, with only the linears of these names within a block quantized; None for all."""
        return self

    def checkpoint_config(self, blocks: str) -> dict[str, Any]:
        """`quantization_config` in config.json; `blocks` names the list of blocks, such as model.layers. Raises
        AdapterError for a base that cannot be written."""
        raise AdapterError(f"a base in {self.describe()} is not written as a checkpoint: leave base_output out")

    def tensors(self, weight: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors of a quantized weight in a checkpoint, by what follows the linear's name; `dtype` is that of the
        model."""
        raise NotImplementedError

    def loading(self) -> str:
        """What loading a written base takes, in Markdown: a paragraph for the cards of the base and of its adapter."""
        return ""

    def notes(self) -> str:
        """What the card of a written base says of the format besides, in Markdown."""
        return ""

    def load(self, name: str, tensor: Callable[[str], Tensor]) -> QuantizedWeight:
        """The inverse of `tensors`: `tensor` gives one, by what follows the name. Raises CheckpointError for a damaged
        one."""
        raise NotImplementedError

    @classmethod
    def kernel_examples(cls) -> dict[str, tuple[torch.dtype, QuantizedBase]]:
        """Name -> (dtype of W, base), for `quailora doctor` to run the fused kernels on; none without such kernels."""
        return {}

    @staticmethod
    def transposed(module: nn.Module) -> bool:
        """Whether the checkpoint stores the weight of this linear as (n, m), as GPT-2's Conv1D does."""
        return False

    def linear(self, device: torch.device) -> Any:
        """A small linear of this base on `device`, quantized, to see whether gradients pass through it; None where only
        a checkpoint gives one."""
        return None

    @staticmethod
    def evaluating(modules: Iterable[nn.Module]) -> AbstractContextManager[None]:
        """What the library needs around a model's evaluation, to leave it trainable and to keep quiet."""
        return nullcontext()

    @property
    def tags(self) -> list[str]:
        """For a model card."""
        return [self.library, self.name.lower()]

    def code(self) -> tuple[str, str]:
        """(class of transformers to import, expression that makes the config), for a model card."""
        config = self.to_config()
        values = config.to_diff_dict() if hasattr(config, "to_diff_dict") else config.to_dict()
        arguments = "".join(
            f"    {name}={value!r},\n"
            for name, value in values.items()
            if not name.startswith("_") and name != "quant_method"
        )
        return type(config).__name__, f"{type(config).__name__}(\n{arguments})"
