"""The bitsandbytes base: NF4 and FP4 (plain or nested absmax) and LLM.int8.

m and n are a linear's outputs and inputs; b is the number of elements that share one absmax.
"""

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeGuard

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from quailora.errors import AdapterError, CheckpointError
from quailora.ops import cpu_matmul
from quailora.quantization.bitsandbytes_weights import EightBit, FourBit, NestedAbsmax
from quailora.quantization.feedback import Curvature, round_with_feedback
from quailora.quantization.protocol import QuantizedBase

_LABELS = {"nf4": "NF4", "fp4": "FP4", "int8": "LLM.int8"}
# What bitsandbytes quantizes from, and what it computes in.
_FLOATS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
# What bitsandbytes.functional.quantize_4bit accepts.
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

_LAYERS = "unquantized layers"

BitsAndBytesLinear = bnb.nn.Linear4bit | bnb.nn.Linear8bitLt


@dataclass(frozen=True)
class BitsAndBytes(QuantizedBase):
    """How bitsandbytes quantizes a base.

    Raises AdapterError, on construction, for a method, block size or dtype that bitsandbytes does not have.
    """

    library = "bitsandbytes"
    formats = tuple(_LABELS)

    method: str  # "nf4", "fp4" or "int8"
    double: bool = False  # double quantization: absmax is itself held in 8 bits
    blocksize: int | None = None  # b; None for int8, which has one absmax to a row
    compute_dtype: torch.dtype | None = None  # a 4-bit layer casts its input, and rounds Q, to this; None for int8
    storage: torch.dtype | None = None  # what the packed bytes are viewed as: uint8, unless for FSDP; None for int8
    threshold: float | None = None  # inputs of this magnitude are multiplied in 16 bits, 0 for none; None for 4 bits
    skip_modules: tuple[str, ...] | None = None  # layers left unquantized; None for transformers' choice

    def __post_init__(self) -> None:
        if self.method not in _LABELS:
            raise AdapterError(f"quantization method {self.method!r} is not known; take one of {', '.join(_LABELS)}")
        if self.method == "int8":
            if self.double or self.blocksize is not None or self.compute_dtype is not None:
                raise AdapterError(f"int8 has one absmax to a row, so no double, blocksize or compute_dtype: {self}")
            return
        if self.blocksize not in BLOCKSIZES:
            raise AdapterError(f"block size {self.blocksize} is not one that bitsandbytes has: {BLOCKSIZES}")
        if self.compute_dtype not in _FLOATS:
            raise AdapterError(f"compute dtype {self.compute_dtype} is not one of float32, float16 and bfloat16")

    @classmethod
    def matches(cls, thing: object) -> TypeGuard[BitsAndBytesConfig | BitsAndBytesLinear]:
        """Whether it is a BitsAndBytesConfig, or a linear of bitsandbytes, its weight loaded or not."""
        return isinstance(thing, BitsAndBytesConfig | BitsAndBytesLinear)

    @classmethod
    def from_config(cls, config: object) -> "BitsAndBytes":
        """From a BitsAndBytesConfig; the block size is the one that the installed bitsandbytes uses.

        llm_int8_enable_fp32_cpu_offload is ignored: what it leaves unquantized depends on a device map.
        Raises AdapterError for any other config, and for llm_int8_has_fp16_weight.
        """
        method = config.quantization_method() if isinstance(config, BitsAndBytesConfig) else None
        if not isinstance(config, BitsAndBytesConfig) or method is None:
            raise AdapterError(
                f"{type(config).__name__} does not quantize to NF4, FP4 or LLM.int8: give a BitsAndBytesConfig with"
                " load_in_8bit=True, or load_in_4bit=True and bnb_4bit_quant_type 'nf4' or 'fp4'"
            )
        skip = None if config.llm_int8_skip_modules is None else tuple(sorted(set(config.llm_int8_skip_modules)))
        if method == "llm_int8":
            if config.llm_int8_has_fp16_weight:
                raise AdapterError("llm_int8_has_fp16_weight=True leaves the weights unquantized; set it to False")
            return cls("int8", threshold=config.llm_int8_threshold, skip_modules=skip)
        return cls(
            method,
            double=config.bnb_4bit_use_double_quant,
            blocksize=_default_blocksize(),
            compute_dtype=config.bnb_4bit_compute_dtype,
            storage=config.bnb_4bit_quant_storage,
            skip_modules=skip,
        )

    @classmethod
    def config_for(cls, name: str, dtype: torch.dtype, *, double: bool, compute: torch.dtype | None) -> Any:
        if name == "int8":
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=name,
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=compute or (torch.bfloat16 if dtype == torch.float32 else dtype),
        )

    def to_config(self) -> BitsAndBytesConfig:
        """The BitsAndBytesConfig that quantizes so. Raises AdapterError for a block size it has no setting for."""
        skip = None if self.skip_modules is None else list(self.skip_modules)
        if self.method == "int8":
            outliers = {} if self.threshold is None else {"llm_int8_threshold": self.threshold}
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip, **outliers)
        if self.blocksize != _default_blocksize():
            raise AdapterError(
                f"a BitsAndBytesConfig cannot ask for blocks of {self.blocksize}, it gives {_default_blocksize()}:"
                " load the base from a checkpoint that was saved quantized so"
            )
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.method,
            bnb_4bit_use_double_quant=self.double,
            bnb_4bit_compute_dtype=self.compute_dtype,
            bnb_4bit_quant_storage=self.storage,
            llm_int8_skip_modules=skip,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; dtypes by their names in torch."""
        values: dict[str, Any] = {"library": self.library, **asdict(self)}
        for name in ("compute_dtype", "storage"):
            values[name] = values[name] and str(values[name]).removeprefix("torch.")
        values["skip_modules"] = None if self.skip_modules is None else list(self.skip_modules)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "BitsAndBytes":
        """The inverse of `to_dict`. Raises AdapterError for anything else."""
        values = {name: value for name, value in values.items() if name != "library"}
        known = {field.name for field in fields(cls)}
        if "method" not in values or not set(values) <= known:
            raise AdapterError(
                f"not a record of a {cls.library} base: it has the keys {sorted(values)}, expected {sorted(known)}"
            )
        for name in ("compute_dtype", "storage"):
            if values.get(name) is not None:
                dtype = getattr(torch, str(values[name]), None)
                if not isinstance(dtype, torch.dtype):
                    raise AdapterError(f"{name} {values[name]!r} in the record of a base is not a dtype of torch")
                values[name] = dtype
        if values.get("skip_modules") is not None:
            values["skip_modules"] = tuple(values["skip_modules"])
        return cls(**values)

    @classmethod
    def from_module(cls, module: nn.Module, config: object = None) -> "BitsAndBytes":
        """From one loaded linear; `skip_modules` is that of `config`, None without one.

        A Linear4bit built without a compute dtype computes in that of its first input; until then this is taken to be
        the dtype of the weight it was made from.
        Raises AdapterError for any other module, or one whose weight is not quantized yet or not in memory.
        """
        if not isinstance(module, BitsAndBytesLinear):
            raise AdapterError(
                f"{type(module).__name__} is not a Linear4bit or Linear8bitLt of bitsandbytes, so it has no quantized "
                "weight; a PEFT layer has it in base_layer"
            )
        layer = f"{type(module).__name__}({module.in_features}, {module.out_features})"
        if module.weight.is_meta:
            raise AdapterError(f"the weight of {layer} is on the meta device: load the model without offloading it")
        skip = cls.from_config(config).skip_modules if isinstance(config, BitsAndBytesConfig) else None
        if isinstance(module, bnb.nn.Linear8bitLt):
            if module.state.has_fp16_weights:
                raise AdapterError(f"{layer} keeps its weight in 16 bits: build it with has_fp16_weights=False")
            if _int8_absmax(module) is None:
                raise AdapterError(f"the weight of {layer} is not quantized yet: move it to its device first")
            return cls("int8", threshold=module.state.threshold, skip_modules=skip)
        state = _quant_state(module)
        if state is None:
            raise AdapterError(f"the weight of {layer} is not quantized yet: move it to its device first")
        repacked = _is_repacked(state)
        return cls(
            state.quant_type,
            double=state.original_nested if repacked else state.nested,
            blocksize=state.blocksize,
            compute_dtype=module.compute_dtype or (state.original_dtype if repacked else state.dtype),
            storage=getattr(state, "original_storage_type", torch.uint8) if repacked else module.weight.dtype,
            skip_modules=skip,
        )

    @property
    def name(self) -> str:
        return _LABELS[self.method]

    @property
    def tags(self) -> list[str]:
        return [self.library, self.method]

    def describe(self) -> str:
        """One line, such as "NF4, double quantization, blocks of 64, compute bf16"."""
        words = [self.name]
        if self.double:
            words.append("double quantization")
        if self.blocksize is not None:
            words.append(f"blocks of {self.blocksize}")
        if self.compute_dtype is not None:
            words.append(f"compute {_FLOATS[self.compute_dtype]}")
        if self.threshold:
            words.append(f"outliers from {self.threshold:g}")
        return ", ".join(words)

    def differences(self, other: QuantizedBase, *, layers: bool = True) -> list[str]:
        """What gives `other` a different Q, as the protocol has it. `storage` and `threshold` do not change Q."""
        if not isinstance(other, BitsAndBytes):
            return [f"method {self.name} against {other.name}"]
        mine, theirs = self._facts(), other._facts()
        if not layers:
            del mine[_LAYERS]
        shared = [name for name in mine if name in theirs]
        return [f"{name} {mine[name]} against {theirs[name]}" for name in shared if mine[name] != theirs[name]]

    def _facts(self) -> dict[str, str]:
        facts = {
            "method": self.name,
            _LAYERS: "by default" if self.skip_modules is None else ", ".join(self.skip_modules) or "none",
        }
        if self.compute_dtype is not None:
            facts["absmax"] = "in 8 bits (double quantization)" if self.double else "in fp32"
            facts["block size"] = str(self.blocksize)
            facts["compute dtype"] = _FLOATS[self.compute_dtype]
        return facts

    @classmethod
    def read(cls, module: nn.Module) -> FourBit | EightBit:
        """The quantized weight of a loaded linear, which is left as it is; they share memory.

        A CPU with AVX512-BF16 repacks a 4-bit weight at its first forward pass in eval mode. From then on its absmax is
        no longer nested and is rounded to bf16; it is read back so.
        Raises AdapterError as `from_module` does.
        """
        base = cls.from_module(module)
        weight: Any = module.weight
        if base.method == "int8":
            return EightBit(weight.data, _int8_absmax(module))
        codes, state = weight.data, _quant_state(module)
        if _is_repacked(state):
            absmax = state.absmax.T.reshape(-1).float()  # (n / b, m) to (m n / b,)
            state = copy.copy(state)
            state.original_nested = False  # or the inverse would quantize the rounded absmax once more
            codes, state = bnb.functional._convert_weight_packed_for_cpu_inverse(codes, state)
            state.absmax = absmax
        return base._four_bit(codes, state)

    def memory(self, outputs: int, inputs: int, device: torch.device) -> tuple[int, int]:
        """See `QuantizedBase.memory`. On a CPU, bitsandbytes 0.50 quantizes by torch operations: W scaled in fp32,
        codes in int32 and uint8, half of them shifted; FP4's mapped besides. Its GPU kernels write only results."""
        elements = outputs * inputs
        if self.blocksize is None:
            return elements + 4 * outputs, (2 if device.type == "cuda" else 9) * elements  # W in fp16 first
        scales = -(-elements // self.blocksize)
        nested = -(-scales // 256)
        stored = -(-elements // 2) + (scales + 4 * nested + 4 * 257 if self.double else 4 * scales)
        if device.type == "cuda":
            return stored, 4 * scales
        return stored, (28 if self.method == "fp4" else 14) * elements + 4 * scales

    @property
    def fused(self) -> bool:
        return True

    def loaded(self, outputs: int, inputs: int) -> int:
        levels = 0 if self.blocksize is None else 4 * 16
        return super().loaded(outputs, inputs) + levels

    def quantize(self, weight: Tensor) -> FourBit | EightBit:
        """Quantize W to exactly the bits that transformers' from_pretrained gives it under the same config.

        weight: (m, n), outputs by inputs (a Conv1D weight transposed), in the dtype that the model is loaded in and on
        the device it is quantized on: bitsandbytes' kernels of different devices may round ties differently.
        Raises CheckpointError for a weight that bitsandbytes cannot quantize.
        """
        if weight.ndim != 2 or weight.dtype not in _FLOATS or weight.is_meta:
            raise CheckpointError(
                f"cannot quantize a weight of shape {tuple(weight.shape)} and {weight.dtype} on {weight.device}:"
                " it must be a matrix of float32, float16 or bfloat16, in memory"
            )
        weight = weight.detach().contiguous()
        if self.method == "int8":
            codes, absmax, _ = bnb.functional.int8_vectorwise_quant(weight.to(torch.float16))
            return EightBit(codes, absmax)
        codes, state = bnb.functional.quantize_4bit(
            weight, blocksize=self.blocksize, compress_statistics=self.double, quant_type=self.method
        )
        return self._four_bit(codes, state)

    def calibrated(self, weight: Tensor, curvature: Curvature) -> FourBit:
        """As the protocol has it: absmax is that of nearest rounding, and codes are chosen with errors fed back."""
        if self.blocksize is None:
            return super().calibrated(weight, curvature)  # type: ignore[return-value]  # raises
        rows, columns = weight.shape
        if columns % self.blocksize:
            raise CheckpointError(
                f"its {columns} inputs are not whole blocks of {self.blocksize}, which calibrated rounding to "
                f"{self.name} takes: use --rounding nearest (rounding='nearest')"
            )
        nearest = self.quantize(weight)
        assert isinstance(nearest, FourBit)
        absmax = nearest.absmax.dequantize() if isinstance(nearest.absmax, NestedAbsmax) else nearest.absmax
        levels, codes_of = bnb.functional.get_4bit_type(self.method, weight.device).sort()
        rounded = round_with_feedback(
            weight,
            curvature,
            bits=4,
            symmetric=True,
            group=self.blocksize,
            scales=absmax.view(rows, columns // self.blocksize),
            levels=levels,
        )
        codes = codes_of.to(torch.uint8)[rounded.codes.long()].view(-1, 2)
        return replace(nearest, codes=codes[:, 0] << 4 | codes[:, 1])

    def group_of(self, columns: int) -> int:
        return columns if self.blocksize is None else self.blocksize

    def checkpoint_config(self, blocks: str) -> dict[str, Any]:
        if self.blocksize is None:
            return super().checkpoint_config(blocks)  # raises
        return self.to_config().to_dict()

    def tensors(self, weight: FourBit, dtype: torch.dtype) -> dict[str, Tensor]:
        absmax, offset, nested = weight.absmax, None, None
        if isinstance(absmax, NestedAbsmax):
            nested = bnb.functional.QuantState(
                absmax=absmax.absmax, code=absmax.table, blocksize=absmax.blocksize, dtype=torch.float32
            )
            offset, absmax = absmax.offset, absmax.codes
        state = bnb.functional.QuantState(
            absmax=absmax,
            shape=torch.Size(weight.shape),
            code=bnb.functional.get_4bit_type(weight.quant_type, "cpu"),
            blocksize=weight.blocksize,
            quant_type=weight.quant_type,
            dtype=dtype,
            offset=offset,
            state2=nested,
        )
        packed = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
        return {"weight": weight.codes.view(-1, 1)} | packed

    def load(self, name: str, tensor: Callable[[str], Tensor]) -> FourBit:
        parts = ["absmax", "quant_map", f"quant_state.bitsandbytes__{self.method}"]
        if self.double:
            parts += ["nested_absmax", "nested_quant_map"]
        try:
            state = bnb.functional.QuantState.from_dict(
                {f"weight.{part}": tensor(f"weight.{part}") for part in parts}, torch.device("cpu")
            )
            return self._four_bit(tensor("weight"), state)
        except (KeyError, ValueError, AssertionError) as error:
            raise CheckpointError(f"{name} is not a whole {self.name} weight of bitsandbytes: {error!r}") from error

    def _four_bit(self, codes: Tensor, state: Any) -> FourBit:
        """From codes in any storage dtype and a bitsandbytes QuantState."""
        assert self.compute_dtype is not None  # as for every 4-bit method
        absmax: Tensor | NestedAbsmax = state.absmax
        if state.nested:
            nested = state.state2
            absmax = NestedAbsmax(state.absmax, nested.code, nested.absmax, state.offset, nested.blocksize)
        return FourBit(
            codes.reshape(-1).view(torch.uint8),
            absmax,
            state.blocksize,
            state.quant_type,
            tuple(state.shape),
            self.compute_dtype,
        )

    @classmethod
    def kernel_examples(cls) -> dict[str, tuple[torch.dtype, QuantizedBase]]:
        def four_bit(method: str, double: bool, dtype: torch.dtype) -> tuple[torch.dtype, QuantizedBase]:
            return dtype, cls(method, double=double, blocksize=64, compute_dtype=dtype)

        return {
            "NF4": four_bit("nf4", True, torch.bfloat16),
            "FP4": four_bit("fp4", False, torch.float16),
            "NF4, fp32": four_bit("nf4", False, torch.float32),
            "LLM.int8": (torch.bfloat16, cls("int8")),
        }

    @staticmethod
    def transposed(module: nn.Module) -> bool:
        source: Any = getattr(module, "source_cls", nn.Linear)  # transformers keeps the class that it replaced
        return issubclass(source, Conv1D)

    def linear(self, device: torch.device) -> BitsAndBytesLinear:
        linear: BitsAndBytesLinear
        if self.method == "int8":
            linear = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
        else:
            linear = bnb.nn.Linear4bit(
                64, 64, bias=False, compute_dtype=self.compute_dtype, compress_statistics=self.double,
                quant_type=self.method, quant_storage=self.storage or torch.uint8,
            )  # fmt: skip
        return linear.to(device)

    @staticmethod
    @contextmanager
    def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
        """Without repacking and without a warning for every layer and batch.

        On a CPU with AVX512-BF16, a Linear4bit in eval mode would repack its weight for good: absmax rounded to bf16,
        and no gradient through the layer ever after, so that a model scored midway could not be trained on.
        """
        repacking: list[Any] = [m for m in modules if getattr(m, "support_avx512bf16_for_cpu", False)]
        with ExitStack() as undo:
            for module in repacking:
                undo.callback(setattr, module, "support_avx512bf16_for_cpu", True)
                module.support_avx512bf16_for_cpu = False
            log = logging.getLogger("bitsandbytes.autograd._functions")
            log.addFilter(_not_about_casts)
            undo.callback(log.removeFilter, _not_about_casts)
            yield


def _default_blocksize() -> int:
    # Neither transformers nor Linear4bit has a setting for it.
    return bnb.nn.Params4bit().blocksize


def _quant_state(module: Any) -> Any:
    # FSDP makes a plain parameter of the Params4bit; the layer still has the state then.
    state = getattr(module.weight, "quant_state", None)
    return module.quant_state if state is None else state


def _is_repacked(state: Any) -> bool:
    return getattr(state, "packing_format_for_cpu", False)


def _int8_absmax(module: Any) -> Any:
    # The first forward pass moves it from the weight to the layer's state.
    absmax = getattr(module.weight, "SCB", None)
    return module.state.SCB if absmax is None else absmax


def _not_about_casts(entry: logging.LogRecord) -> bool:
    """Drop the warning that LLM.int8 logs for every layer and batch of a model that is not in fp16."""
    return not str(entry.msg).startswith("MatMul8bitLt: inputs will be cast")


def _gemm_4bit(
    x: Tensor,
    codes: Tensor,
    shape: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    kind: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    """bitsandbytes' operation of that name, in operations that the mode can intercept. With double quantization
    `absmax` holds one scale for each 256 values of `absmax_8bit`."""
    operations = torch.ops.bitsandbytes
    if absmax_8bit is not None:
        absmax = operations.dequantize_blockwise(absmax_8bit, absmax, absmax_code, 256, torch.float32) + absmax_offset
    weight = operations.dequantize_4bit(codes, absmax, blocksize, kind, shape, x.dtype)
    return nn.functional.linear(x, weight, bias)


if hasattr(torch.ops.bitsandbytes, "gemm_4bit"):  # since bitsandbytes 0.50
    cpu_matmul.DECOMPOSED[torch.ops.bitsandbytes.gemm_4bit] = _gemm_4bit
