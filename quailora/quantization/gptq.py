"""The GPTQ base: integers of 2, 3, 4 or 8 bits, with a scale and a zero for each group of columns of a row.

It is the format that AutoGPTQ, gptqmodel and transformers' GPTQConfig know as "gptq" (version 1), without `desc_act`.
Checkpoints are written and read here; gptqmodel is needed only where a model is loaded from one for training.

m and n are a linear's outputs and inputs; g is the number of columns that share a scale.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AwqConfig, GPTQConfig

from quailora.errors import AdapterError, CheckpointError
from quailora.quantization.feedback import Curvature, Rounded, round_with_feedback
from quailora.quantization.protocol import QuantizedBase
from quailora.quantization.steps import Steps, block

BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128)  # and whole rows, which GPTQConfig writes as -1
WHOLE_ROWS = -1

_WORD = 32  # bits of a packed word; also how many codes are packed together, into `bits` words
TENSORS = ("qweight", "qzeros", "scales", "g_idx")

_AWQ = (
    "AWQ moves scales between norms and linears before it rounds, so its Q is not one of the checkpoint's weights, and "
    "W - Q is not its error: make a base in GPTQ's format (bits=4, --bits 4) of the checkpoint instead"
)


class PlannedLinear(nn.Linear):
    """A linear on the meta device that a base being made will hold quantized."""


@dataclass(frozen=True)
class GPTQ(QuantizedBase):
    """How the linears of a GPTQ base are quantized.

    Raises AdapterError, on construction, for bits or a group size that the format does not hold.
    """

    library = "gptq"
    planned = PlannedLinear

    bits: int
    group_size: int = 128  # WHOLE_ROWS: one group to a row
    symmetric: bool = True
    dtype: torch.dtype = torch.bfloat16  # what a layer holds its scales in, and rounds Q to
    modules: tuple[str, ...] | None = None  # the linears within a block that are quantized; None for all

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise AdapterError(f"GPTQ has {', '.join(map(str, BITS))} bits, not {self.bits} (--bits)")
        if self.group_size not in (*GROUP_SIZES, WHOLE_ROWS):
            raise AdapterError(
                f"group size {self.group_size} (--group-size) is none of {', '.join(map(str, GROUP_SIZES))}, and "
                f"{WHOLE_ROWS} for whole rows"
            )
        if self.dtype not in (torch.float16, torch.bfloat16):
            raise AdapterError(f"a GPTQ base computes in float16 or bfloat16, not in {self.dtype} (--dtype)")

    @classmethod
    def matches(cls, thing: object) -> bool:
        """Whether it is a GPTQConfig, a linear of gptqmodel, or a linear that is to be quantized so."""
        return isinstance(thing, GPTQConfig | PlannedLinear) or _is_gptqmodel_linear(thing)

    @classmethod
    def from_config(cls, config: object) -> Self:
        """From a GPTQConfig. Raises AdapterError for what is not supported, `desc_act=True` among it."""
        if not isinstance(config, GPTQConfig):
            raise AdapterError(f"{type(config).__name__} is not a GPTQConfig")
        if isinstance(config, AwqConfig):
            raise AdapterError(_AWQ)
        if config.desc_act:
            raise AdapterError(
                "desc_act=True sorts the columns of a weight, which few servers take and which slows training: set "
                "desc_act=False"
            )
        if config.format not in ("gptq", "gptq_v2"):
            raise AdapterError(f"GPTQ format {config.format!r} is not supported: use 'gptq'")
        modules = config.modules_in_block_to_quantize
        return cls(
            config.bits,
            config.group_size,
            config.sym,
            modules=None if modules is None else tuple(sorted(name for group in modules for name in group)),
        )

    def loaded_in(self, dtype: torch.dtype) -> Self:
        """The same in another dtype: fp32 is taken as fp16, which its kernels compute in then."""
        return replace(self, dtype=torch.float16 if dtype == torch.float32 else dtype)

    def to_config(self) -> GPTQConfig:
        """For `from_pretrained`: with the backend whose linears can be trained; `modules` are in config.json."""
        return GPTQConfig(**self._settings(), backend="auto_trainable")

    def _settings(self) -> dict[str, Any]:
        return {"bits": self.bits, "group_size": self.group_size, "sym": self.symmetric, "desc_act": False}

    def checkpoint_config(self, blocks: str) -> dict[str, Any]:
        modules = {} if self.modules is None else {"modules_in_block_to_quantize": [list(self.modules)]}
        return {
            "quant_method": "gptq",
            **self._settings(),
            **modules,
            "checkpoint_format": "gptq",
            "block_name_to_quantize": blocks,
            "true_sequential": False,
            "damp_percent": 0.1,  # GPTQConfig demands it; nothing reads it
        }

    def to_dict(self) -> dict[str, Any]:
        values = {"library": self.library, **asdict(self), "dtype": str(self.dtype).removeprefix("torch.")}
        values["modules"] = None if self.modules is None else list(self.modules)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        values = {name: value for name, value in values.items() if name != "library"}
        known = {field.name for field in fields(cls)}
        dtype = getattr(torch, str(values.get("dtype")), None)
        if set(values) != known or not isinstance(dtype, torch.dtype):
            raise AdapterError(
                f"not a record of a GPTQ base: it has the keys {sorted(values)}, expected {sorted(known)}"
            )
        modules = values["modules"]
        return cls(**(values | {"dtype": dtype, "modules": None if modules is None else tuple(modules)}))

    @classmethod
    def from_module(cls, module: nn.Module, config: object = None) -> Self:
        """From a linear of gptqmodel. Raises AdapterError for any other, or one without its weight in memory."""
        if not _is_gptqmodel_linear(module):
            raise AdapterError(f"{type(module).__name__} is not a GPTQ linear of gptqmodel with its weight in memory")
        if not hasattr(module, "g_idx"):
            raise AdapterError(f"{type(module).__name__}: {_AWQ}")
        layer: Any = module
        modules = cls.from_config(config).modules if isinstance(config, GPTQConfig) else None
        group = WHOLE_ROWS if layer.group_size in (WHOLE_ROWS, layer.in_features) else layer.group_size
        # optimum 2.3 gives gptqmodel `sym` and `desc_act` in each other's place, so the attributes tell neither.
        zeros = unpack(layer.qzeros.T.contiguous(), layer.bits)
        symmetric = bool((zeros == 1 << (layer.bits - 1)).all())
        base = cls(layer.bits, group, symmetric, modules=modules)
        return base.loaded_in(layer.scales.dtype)

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    @property
    def tags(self) -> list[str]:
        return [self.library, f"{self.bits}-bit"]

    @property
    def nearest(self) -> bool:
        """False: the format does not say how codes were chosen, and is mostly used where calibration chose them."""
        return False

    def describe(self) -> str:
        groups = "one scale a row" if self.group_size == WHOLE_ROWS else f"groups of {self.group_size}"
        return f"GPTQ {self.name}, {groups}, {'symmetric' if self.symmetric else 'asymmetric'}"

    def differences(self, other: QuantizedBase, *, layers: bool = True) -> list[str]:
        if not isinstance(other, GPTQ):
            return [f"method {self.name} against {other.name}"]
        names = ["bits", "group_size", "symmetric", *(["modules"] if layers else [])]  # dtype is a matter of rounding
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in names]
        return [f"{name} {mine} against {theirs}" for name, mine, theirs in pairs if mine != theirs]

    @classmethod
    def read(cls, module: nn.Module) -> GPTQWeight:
        """From a linear of gptqmodel whose codes are in the order of the format: of a backend that can be trained."""
        base, layer = cls.from_module(module), module
        tensors: Any = {name: getattr(layer, name) for name in TENSORS}
        return base._from_tensors(tensors, zeros_less_one=0, name=type(module).__name__)

    def quantize(self, weight: Tensor) -> GPTQWeight:
        """Nearest rounding, with scales chosen for the smallest squared error."""
        return self.calibrated(weight, Curvature.unknown(weight.shape[1], weight.device))

    def calibrated(self, weight: Tensor, curvature: Curvature) -> GPTQWeight:
        """The quantized weight of W (m, n), with errors fed back. Raises CheckpointError where W is not finite."""
        columns = self.group_of(weight.shape[1])
        rounded = round_with_feedback(weight, curvature, bits=self.bits, symmetric=self.symmetric, group=columns)
        scales = rounded.scales.half()
        if not (scales.isfinite() & (scales != 0)).all():  # 0: no scale had a finite cost
            raise CheckpointError("a weight is not finite, or too large for scales in fp16")
        return self._of(rounded)

    def _of(self, rounded: Rounded) -> GPTQWeight:
        return GPTQWeight(rounded.codes, rounded.scales.half(), rounded.zeros, self.bits, self.dtype)

    def group_of(self, columns: int) -> int:
        return columns if self.group_size == WHOLE_ROWS else self.group_size

    def memory(self, outputs: int, inputs: int, device: torch.device) -> tuple[int, int]:
        """Codes are a byte each here; where kernels read them, in 4 bits besides, with fp32 scales. Rounding holds its
        errors in fp32, and codes of its own."""
        elements = outputs * inputs
        groups = outputs * (inputs // self.group_of(inputs) if inputs % self.group_of(inputs) == 0 else 1)
        size = block(self.group_of(inputs)) if self.fused and device.type == "cuda" else None
        packed = 0 if size is None else elements // 2 + 4 * elements // size
        return elements + 3 * groups + packed, 4 * elements

    @property
    def fused(self) -> bool:
        return self.bits < 4 or (self.bits == 4 and self.symmetric)

    @classmethod
    def kernel_examples(cls) -> dict[str, tuple[torch.dtype, QuantizedBase]]:
        return {"int3": (torch.bfloat16, cls(3, 32, symmetric=False))}  # in other blocks than the examples in NF4

    keeps_q = True  # gptqmodel's linears multiply with a de-quantized weight, which autograd keeps

    def loaded(self, outputs: int, inputs: int) -> int:
        groups = inputs // self.group_of(inputs)
        codes, zeros = outputs * inputs * self.bits // 8, outputs * groups * self.bits // 8
        return codes + zeros + 2 * outputs * groups + 4 * inputs  # scales in 16 bits, and g_idx

    def obstacle(self, outputs: int, inputs: int) -> str | None:
        if inputs % _WORD or outputs % _WORD:
            return f"its {outputs} x {inputs} weight is not made of whole words of {_WORD} codes"
        if inputs % self.group_of(inputs):
            fitting = [size for size in GROUP_SIZES if inputs % size == 0]
            raise AdapterError(
                f"its {inputs} inputs are not whole groups of {self.group_size}: take group_size {fitting[-1]} "
                f"(--group-size), or {WHOLE_ROWS} for whole rows"
            )
        return None

    def of_modules(self, names: tuple[str, ...] | None) -> Self:
        return replace(self, modules=names)

    def tensors(self, weight: GPTQWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        columns = weight.shape[1]
        top = (1 << self.bits) - 1
        zeros = (weight.zeros.T.to(torch.int32) - 1) & top  # version 1 stores them less one
        return {
            "qweight": pack(weight.codes.T, self.bits),
            "qzeros": pack(zeros.T, self.bits).T.contiguous(),
            "scales": weight.scales.T.contiguous(),
            "g_idx": torch.arange(columns, dtype=torch.int32) // self.group_of(columns),
        }

    def loading(self) -> str:
        return f"""Training takes [gptqmodel](https://github.com/ModelCloud/GPTQModel) and optimum. On a CPU, ask for a
backend that can be trained, with the GPTQConfig of transformers:
`from_pretrained(..., quantization_config=GPTQConfig(bits={self.bits}, backend="auto_trainable"))`."""

    def notes(self) -> str:
        return """PEFT's `target_modules="all-linear"` finds nothing on a GPTQ base: give names, as the adapter does.

Do not save this base again through transformers: it writes zeros of another version under the same label, and the copy
is wrong. Copy the folder.
"""

    def load(self, name: str, tensor: Callable[[str], Tensor]) -> GPTQWeight:
        return self._from_tensors({part: tensor(part) for part in TENSORS}, zeros_less_one=1, name=name)

    def _from_tensors(self, tensors: Mapping[str, Tensor], *, zeros_less_one: int, name: str) -> GPTQWeight:
        scales, top = tensors["scales"], (1 << self.bits) - 1
        if tensors["qweight"].shape[0] % self.bits or tensors["qzeros"].shape[1] % self.bits:
            raise CheckpointError(f"{name}: its codes are not packed in {self.bits} bits: is it a weight of this base?")
        groups, rows = scales.shape
        codes = unpack(tensors["qweight"], self.bits).T.contiguous()
        columns = codes.shape[1]
        zeros = (unpack(tensors["qzeros"].T.contiguous(), self.bits).to(torch.int32) + zeros_less_one) & top
        order = torch.arange(columns, device=scales.device) // self.group_of(columns)
        if codes.shape[0] != rows or zeros.shape != (rows, groups) or groups != columns // self.group_of(columns):
            raise CheckpointError(
                f"{name}: its tensors do not fit together: {tuple(codes.shape)}, {tuple(scales.shape)}"
            )
        if not torch.equal(tensors["g_idx"].to(order.device), order.to(tensors["g_idx"].dtype)):
            raise CheckpointError(f"{name}: its columns are sorted (desc_act), which is not supported")
        return GPTQWeight(codes, scales.T.half().contiguous(), zeros.to(torch.uint8), self.bits, self.dtype)


@dataclass(frozen=True, eq=False)
class GPTQWeight:
    """Q[i, j] = scales[i, j // g] · (codes[i, j] - zeros[i, j // g]), rounded to `dtype`."""

    codes: Tensor  # (m, n) uint8
    scales: Tensor  # (m, n / g) fp16, each a number that bf16 holds too; may be negative where zeros are 2^(bits-1)
    zeros: Tensor  # (m, n / g) uint8
    bits: int
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes + self.zeros.nbytes

    def dequantize(self) -> Tensor:
        """Q (m, n) in `dtype`: as a layer of gptqmodel computes it, from scales in that dtype."""
        rows, columns = self.shape
        codes, zeros = self.codes.view(rows, self.scales.shape[1], -1), self.zeros.unsqueeze(-1)
        steps = codes.to(torch.int16) - zeros.to(torch.int16)
        return (self.scales.to(self.dtype).unsqueeze(-1) * steps).view(rows, columns)

    @cached_property
    def packed(self) -> Steps | None:
        """The same Q as the fused kernels read it, in memory of its own: codes - zeros in 4 bits. None where they take
        more, with 8 bits, or with 4 and an asymmetric grid; or where 32 does not divide g."""
        if self.bits == 8 or (self.bits == 4 and bool((self.zeros != 8).any())):
            return None
        return Steps.of(self.codes, self.zeros, self.scales, self.dtype)

    def parts(self) -> tuple[list[Tensor], list[Tensor]]:
        return [self.codes, self.zeros], [self.scales]

    def to(self, device: torch.device) -> Self:
        moved = {name: getattr(self, name).to(device) for name in ("codes", "scales", "zeros")}
        return replace(self, **moved)


def pack(codes: Tensor, bits: int) -> Tensor:
    """(k, m) of codes -> (k · bits / 32, m) int32: a stream of bits down each column, low bits first. 32 divides k."""
    count, columns = codes.shape
    words = torch.zeros(count // _WORD, bits, columns, dtype=torch.int64, device=codes.device)
    grouped = codes.reshape(count // _WORD, _WORD, columns)
    for i in range(_WORD):
        word, shift = divmod(i * bits, _WORD)
        value = grouped[:, i].to(torch.int64)
        words[:, word] |= value << shift
        if shift + bits > _WORD:
            words[:, word + 1] |= value >> (_WORD - shift)
    return _as_int32(words & 0xFFFFFFFF).reshape(-1, columns)


def unpack(words: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`: (k · bits / 32, m) int32 -> (k, m) uint8."""
    grouped = words.reshape(-1, bits, words.shape[1]).to(torch.int64) & 0xFFFFFFFF
    codes = torch.empty(len(grouped), _WORD, words.shape[1], dtype=torch.uint8, device=words.device)
    for i in range(_WORD):
        word, shift = divmod(i * bits, _WORD)
        value = grouped[:, word] >> shift
        if shift + bits > _WORD:
            value = value | (grouped[:, word + 1] << (_WORD - shift))
        codes[:, i] = (value & ((1 << bits) - 1)).to(torch.uint8)
    return codes.reshape(-1, words.shape[1])


def _as_int32(words: Tensor) -> Tensor:
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _is_gptqmodel_linear(thing: object) -> bool:
    """Whether it is one, of GPTQ or AWQ. Without importing it: a module of it can only be there where somebody has."""
    if "gptqmodel" not in sys.modules or not isinstance(thing, nn.Module):
        return False
    return type(thing).__module__.startswith("gptqmodel.") and all(hasattr(thing, name) for name in TENSORS[:3])
