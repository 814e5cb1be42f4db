"""Memory that a block takes while it runs and while its factors are solved for, from the shapes of its parameters.

These are upper bounds: where shapes do not tell what is in memory at the same time, everything is counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from quailora import ops
from quailora.modeling.blocks import Block, linear_shape
from quailora.modeling.streamed_model import StreamedModel
from quailora.ops.cpu_matmul import NAMES
from quailora.solvers.config import SolverConfig
from quailora.solvers.registry import SOLVERS

_PANEL, _WIDEST = 256, 1024  # features of H at a time in the reference operations: the least, and the most
_ELEMENTS = 2**26  # of E at a time if it is never in memory as a whole
_TOKENS = 1024  # at a time in the extension


class Base(Protocol):
    """What a plan needs to know about the quantized base: see `QuantizedBase.memory`."""

    def memory(self, outputs: int, inputs: int, device: torch.device) -> tuple[int, int]: ...

    @property
    def fused(self) -> bool: ...


@dataclass(frozen=True)
class Calibrated:
    """A base whose codes are chosen by calibration, in turn with the factors (`pipeline.quantize.CalibratedQ`)."""

    base: Base
    magr: bool = False

    @property
    def fused(self) -> bool:
        return self.base.fused

    def memory(self, outputs: int, inputs: int, device: torch.device) -> tuple[int, int]:
        """Codes are there twice, the best and the last. Rounding holds W - A Bᵀ, its errors, and codes as bytes; to
        compare with nearest rounding takes W, Q and E in fp32, and Q in 16 bits. MagR has eight fp32 copies of W at
        work and a scaled H, and one of W stays."""
        codes, work = self.base.memory(outputs, inputs, device)
        elements = outputs * inputs
        work = max(work + 9 * elements, 14 * elements)
        if not self.magr:
            return 2 * codes, work
        return 2 * codes + 4 * elements, max(work, 32 * elements + 4 * inputs * inputs)


@dataclass(frozen=True)
class Device:
    """The device of a run, and what there is fast code for.

    extension: the compiled extension accumulates H. fused: where kernels read the base's codes, products with E never
    have all of E in memory.
    widened: the model's products are computed in fp32, with fp32 copies of the operands.
    """

    device: torch.device
    extension: bool
    fused: bool
    widened: bool

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype) -> Device:
        """As `ops.backends` says. A GPU that is not present is assumed to have Triton and no extension."""
        if device.type == "cuda" and not torch.cuda.is_available():
            return cls(device, extension=False, fused=True, widened=False)
        gram, product = (ops.backends(device)[name].backend for name in ("gram_", "grouped_error_product"))
        widened = dtype in NAMES and ops.backends(device)[f"{NAMES[dtype]}_products"].backend == "fp32"
        return cls(device, gram != "reference", product != "reference", widened)


@dataclass(frozen=True)
class Weight:
    """The weight (m, n) of a linear, in the dtype it is loaded in. transposed: it is a Conv1D's, so it is copied."""

    name: str  # within its block
    outputs: int
    inputs: int
    rank: int
    dtype: torch.dtype
    transposed: bool = False


@dataclass(frozen=True)
class BlockSizes:
    """The sizes of a block, and of all blocks like it.

    groups: the targeted linears, grouped by the input they share.
    weights, loading, cast: bytes of its weights, what loading takes besides, and the largest tensor that is cast.
    features: elements per token of all distinct inputs of its linears.
    outputs: elements per token of the outputs of one module's linears, at most.
    experts: elements per token of inputs and outputs in the fused experts that a token is sent to.
    widest: elements per token of the widest input or output of a linear.
    largest: elements of the largest matrix.
    scan: elements per token of a state-space model's state.
    multiplied: elements of all the matrices that a token is multiplied with.
    """

    groups: tuple[tuple[Weight, ...], ...] = field(repr=False)
    weights: int
    loading: int
    cast: int
    features: int
    outputs: int
    experts: int
    widest: int
    largest: int
    scan: int
    multiplied: int

    @property
    def linears(self) -> list[Weight]:
        return [weight for group in self.groups for weight in group]


def block_sizes(stream: StreamedModel, targets: Mapping[str, int]) -> list[BlockSizes]:
    """The sizes of each block; blocks that are alike share one object. targets: name of a linear -> its rank."""
    known: dict[Any, BlockSizes] = {}
    found = []
    for block in stream.blocks:
        kind, cast = [], 0
        for name, p in block.module.named_parameters():
            key = stream.source(f"{block.name}.{name}")
            entry = stream.checkpoint.tensors[key] if key else None
            kind.append((name, p.shape, p.dtype, entry and entry.torch_dtype))
            if entry and entry.torch_dtype != p.dtype:
                cast = max(cast, entry.nbytes)
        ranks = {name.removeprefix(f"{block.name}."): targets.get(name) for name in block.linears()}
        alike = tuple(kind), tuple(ranks.items())
        if alike not in known:
            known[alike] = _measure(stream, block, ranks, cast)
        found.append(known[alike])
    return found


def _measure(stream: StreamedModel, block: Block, ranks: Mapping[str, int | None], cast: int) -> BlockSizes:
    config = stream.model.config.get_text_config(decoder=True)
    linears = {name: block.module.get_submodule(name) for name in ranks}
    shapes = {name: linear_shape(linear) for name, linear in linears.items()}
    groups = _sharing(shapes, config.hidden_size)
    by_module: dict[str, int] = {}
    for name, (outputs, _) in shapes.items():
        parent = name.rpartition(".")[0]
        by_module[parent] = by_module.get(parent, 0) + outputs
    fused = [p.shape for p in block.module.parameters() if p.dim() == 3]  # (experts, outputs, inputs)
    chosen = getattr(config, "num_experts_per_tok", None) or max((shape[0] for shape in fused), default=0)
    matrices = {name: p.numel() for name, p in block.module.named_parameters() if p.dim() == 2}
    scans = [size for name, size in matrices.items() if name.endswith("A_log")]  # every Mamba's name for it

    def weight(name: str) -> Weight:
        parameter = linears[name].get_parameter("weight")
        outputs, inputs = shapes[name]
        return Weight(
            name, outputs, inputs, ranks[name] or 0, parameter.dtype, not isinstance(linears[name], nn.Linear)
        )

    targeted = [[weight(name) for name in group if ranks[name] is not None] for group in groups]
    prefix = f"{block.name}."
    return BlockSizes(
        groups=tuple(tuple(group) for group in targeted if group),
        weights=stream.nbytes(prefix),
        loading=stream.loading_nbytes(prefix),
        cast=cast,
        features=sum(shapes[group[0]][1] for group in groups),
        outputs=max(by_module.values(), default=0),
        experts=chosen * sum(shape[1] + shape[2] for shape in fused),
        widest=max((max(shape) for shape in shapes.values()), default=0),
        largest=max(matrices.values(), default=0),
        scan=max(scans, default=0),
        multiplied=sum(matrices.values()) + chosen * sum(shape[1:].numel() for shape in fused),
    )


def _sharing(shapes: Mapping[str, tuple[int, int]], hidden: int) -> list[list[str]]:
    """Linears grouped by the input they share, as far as shapes tell: those of one module with the same number of
    inputs, except the last one that maps back to the hidden size, as o_proj and down_proj do. (A run compares the
    tensors themselves.)"""
    by_module: dict[str, list[str]] = {}
    for name in shapes:
        by_module.setdefault(name.rpartition(".")[0], []).append(name)
    groups: dict[tuple[str, int, str], list[str]] = {}
    for parent, names in by_module.items():
        ends = next((name for name in reversed(names) if len(names) > 1 and shapes[name][0] == hidden), None)
        for name in names:
            inputs = shapes[name][1]
            back = name if name == ends else ""
            groups.setdefault((parent, inputs, back), []).append(name)
    return list(groups.values())


def called_with(stream: StreamedModel, batch: int, length: int) -> int:
    """Bytes of what blocks are called with besides the hidden states: position embeddings, and up to two masks with a
    value for each pair of tokens."""
    config = stream.model.config.get_text_config(decoder=True)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return batch * length * stream.dtype.itemsize * (4 * head + 2 * length)


def outside(stream: StreamedModel, batch: int, length: int) -> int:
    """Bytes of activations outside the blocks: hidden states, the final norm in fp32, and what blocks are called
    with."""
    config = stream.model.config.get_text_config(decoder=True)
    return batch * length * config.hidden_size * (2 * stream.dtype.itemsize + 12) + called_with(stream, batch, length)


def activations(sizes: BlockSizes, stream: StreamedModel, batch: int, length: int, on: Device) -> int:
    """Peak bytes of a forward pass, with the scratch memory for accumulating H but without H itself.

    In memory are all inputs of linears, the outputs of one module's linears, and the hidden states before, within and
    after the block. Attention without a fused kernel has a score for each head and pair of tokens.
    """
    config = stream.model.config.get_text_config(decoder=True)
    tokens, size = batch * length, stream.dtype.itemsize
    row = size * (6 * config.hidden_size + sizes.features + sizes.outputs + sizes.experts)
    scores = (2 * size + 4) * length if unfused(config, on.device.type) else 4  # else: log-sum-exps
    row += config.num_attention_heads * scores
    total = tokens * (row + 16 * sizes.scan)  # without a fused kernel: four times in fp32
    if on.widened:  # fp32 copies of a weight, its input and its output, and of the inputs of attention
        total += 4 * (sizes.largest + tokens * (sizes.widest + sizes.outputs))
    n = max((w.inputs for w in sizes.linears), default=0)
    return total + adding_up(tokens, n, size, on.extension)


def adding_up(tokens: int, n: int, size: int, extension: bool) -> int:
    """Scratch bytes for accumulating an H. The extension packs 1024 tokens at a time, and on a GPU its partial sums
    take about as much; plain PyTorch needs the tokens without padding in fp32, and a panel of H."""
    if extension:
        return 4 * min(_TOKENS, tokens) * n
    masked, widened = size * tokens * n, (0 if size == 4 else 4 * tokens * n)
    return max(masked + widened, (widened or masked) + 4 * _PANEL * n)


def unfused(config: Any, device: str) -> bool:
    """Whether attention has a score in memory for each pair of tokens. Torch has no fused attention on CPUs if values
    and keys have different widths, as in DeepSeek."""
    latent = hasattr(config, "qk_nope_head_dim") and device == "cpu"
    return latent or config._attn_implementation not in ("sdpa", "flash_attention_2")


def solving(group: Sequence[Weight], base: Base, solver: SolverConfig, on: Device, overwrite: bool) -> tuple[int, int]:
    """Bytes of the quantized weights of linears that share an input, and of what solving for them takes besides.

    overwrite: W is no longer needed, so E may overwrite an fp32 W.
    """
    n = group[0].inputs
    codes, work = zip(*(base.memory(w.outputs, n, on.device) for w in group), strict=True)
    copies = sum(w.outputs * n * w.dtype.itemsize for w in group if w.transposed)
    tallest = max(w.outputs for w in group)
    largest, fused = tallest * n, on.fused and base.fused
    if fused:  # some rows of E, their products with two panels of H, and sums of H
        rows, width = min(tallest, _ELEMENTS // n + 1), max(_PANEL, min(n // 8 + 1, _WIDEST))
        errors, making = 0, 4 * rows * (n + 2 * width) + 96 * n
    else:
        in_place = overwrite and group[0].dtype == torch.float32
        errors, making = (
            (0 if in_place else sum(4 * w.outputs * n for w in group)),
            8 * largest + largest // 8 + 12 * n * min(_PANEL, tallest),
        )
    thin = _thin(group, solver)
    curvature = known = 0
    if isinstance(base, Calibrated):
        curvature = 4 * n * n  # U; what it is made from is as large
        known = sum(4 * w.rank * (w.outputs + n) for w in group)  # the factors found before
    if SOLVERS[solver.name].dense and fused:
        thin += 4 * largest
    return sum(codes), copies + curvature + known + max(curvature, max(work), errors + max(making, thin))


def _thin(group: Sequence[Weight], solver: SolverConfig) -> int:
    """Bytes of a solver's matrices besides E and H. Intermediate results of a linear are in fp64. Kernels
    orthonormalize for all linears at once, in fp32, with zeros up to the height of the tallest."""
    method, n = SOLVERS[solver.name], group[0].inputs
    m, rank = max(w.outputs for w in group), max(w.rank for w in group)
    if method.dense:
        k = min(m, n)
        return 8 * (n * n + 3 * m * n + 5 * k * k)
    blocks = method.blocks(solver.steps)
    width = rank * blocks
    spans = sum(4 * w.rank * blocks * (w.outputs + 2 * n) for w in group)
    orthonormalizing = max(8 * m * (width + 6 * rank), 4 * len(group) * m * (2 * width + 6 * rank))
    ritz = 8 * (2 * n * width + 6 * width * width)
    results = sum(8 * w.rank * (w.outputs + 4 * n) for w in group)
    return spans + results + max(orthonormalizing, ritz)
