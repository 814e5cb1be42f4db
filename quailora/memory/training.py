"""What a fine-tune of the adapter holds on the device, from shapes.

Counted, for one device that holds the whole model, with gradient checkpointing of its blocks:

    base         quantized linears as their format stores them; the rest (embeddings, norms, head) in the dtype it is
                 loaded in
    adapter      the LoRA factors, in fp32
    gradients    of the adapter, in fp32
    optimizer    AdamW's two moments of the adapter, in fp32
    activations  of one micro-batch: the hidden states that enter each block, and the larger of
                   - what the backward pass of one block needs, and the Q that it multiplies with
                   - the logits and their gradient, in the model's dtype and in fp32 each

Not counted: images of vision-language models; and, but for refinement, what allocators and libraries take besides.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from quailora.memory.budget import describe_bytes
from quailora.memory.sizes import Base, BlockSizes, Device, unfused
from quailora.modeling.blocks import linear_shape
from quailora.modeling.streamed_model import StreamedModel
from quailora.modeling.transformers_internals import tied_weights
from quailora.quantization.protocol import QuantizedBase

_FP32 = 4
_MOMENTS = 8  # bytes of AdamW's two moments of a parameter, in fp32
# Of A and B while a block is refined: the solver's and the copy that is trained, its gradient, Adam's two moments, the
# best so far and what follows it, and copies in the model's dtype.
_COPIES = 8
_LOSS = 16  # bytes for each element of a block's output and its target, in the loss and its gradient


@dataclass(frozen=True)
class Training:
    """Bytes on the device; see the top of this module."""

    format: str
    base: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    overhead: int = 0  # allocators and libraries, where counted

    @property
    def total(self) -> int:
        return self.base + self.adapter + self.gradients + self.optimizer + self.activations + self.overhead

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"total": self.total}

    def parts(self) -> str:
        """Every part in words."""
        names = ("base", "adapter", "gradients", "optimizer", "activations", "overhead")
        return ", ".join(f"{name} {describe_bytes(size)}" for name in names if (size := getattr(self, name)))


def training_memory(
    stream: StreamedModel,
    blocks: Sequence[BlockSizes],
    base: QuantizedBase | None,
    quantized: Collection[str],
    ranks: Mapping[str, int],
    *,
    batch_size: int,
    sequence_length: int,
    device: str = "cuda",
) -> Training:
    """What a fine-tune of `stream`'s model holds, with weights loaded in its dtype. Nothing is read.

    blocks: the sizes of its blocks.
    base: how the model is quantized; None for a base in full precision.
    quantized: the names of the linears that are.
    ranks: those that are adapted, with the rank of each.
    """
    model, size = stream.model, stream.dtype.itemsize
    shapes = {name: linear_shape(model.get_submodule(name)) for name in {*quantized, *ranks}}
    tied = tied_weights(model)
    held = sum(parameter.nbytes for name, parameter in model.named_parameters() if name not in tied)
    if base is not None:
        held += sum(base.loaded(*shapes[name]) - shapes[name][0] * shapes[name][1] * size for name in quantized)
    parameters = sum(rank * sum(shapes[name]) for name, rank in ranks.items())
    config: Any = model.config.get_text_config(decoder=True)
    tokens = batch_size * sequence_length
    states = len(stream.blocks) * tokens * config.hidden_size * size
    logits = 2 * tokens * config.vocab_size * (size + _FP32)
    alike = {id(sizes): (block, sizes) for block, sizes in zip(stream.blocks, blocks, strict=True)}
    work = []
    for block, sizes in alike.values():
        linears = {name: linear_shape(linear) for name, linear in block.linears().items()}
        copies = [m * n * size for name, (m, n) in linears.items() if name in quantized]
        dequantized = 0 if base is None else sum(copies) if base.keeps_q else max(copies, default=0)
        row = backward_row(linears, ranks, sizes, config, size, sequence_length, device)
        work.append(tokens * row + dequantized)
    return Training(
        format=str(stream.dtype).removeprefix("torch.") if base is None else base.name,
        base=held,
        adapter=_FP32 * parameters,
        gradients=_FP32 * parameters,
        optimizer=_MOMENTS * parameters,
        activations=states + max(logits, *work),
    )


def backward_row(
    linears: Mapping[str, tuple[int, int]],
    ranks: Mapping[str, int],
    sizes: BlockSizes,
    config: Any,
    size: int,
    length: int,
    device: str,
) -> int:
    """Bytes that the backward pass of a block takes for each token, at most, on a device of this kind.

    Kept from its forward pass are the input and the output of each linear (m, n); where one is adapted, its input and
    its product with A, in fp32; the hidden states in fp32, of two norms; and the inputs of attention. At work are the
    gradients of the widest linear, in fp32.
    """
    kept = sum(size * (m + n) for m, n in linears.values())
    adapted = sum(_FP32 * (linears[name][1] + rank) for name, rank in ranks.items() if name in linears)
    widest = max((m + n for m, n in linears.values()), default=0)
    scores = config.num_attention_heads * (((2 * size + _FP32) * length) if unfused(config, device) else _FP32)
    experts = 3 * size * sizes.experts + 16 * sizes.scan
    return kept + adapted + 4 * _FP32 * config.hidden_size + scores + experts + _FP32 * widest


def refining(
    block: BlockSizes, stream: StreamedModel, base: Base, batch: int, length: int, on: Device
) -> Iterator[tuple[str, int]]:
    """Bytes that refining a block takes besides its weights, by what they are."""
    tokens, size = batch * length, stream.dtype.itemsize
    shapes = {w.name: (w.outputs, w.inputs) for w in block.linears}
    ranks = {w.name: w.rank for w in block.linears if w.rank}
    codes = sum(base.memory(w.outputs, w.inputs, on.device)[0] for w in block.linears)
    largest = max((w.outputs * w.inputs for w in block.linears), default=0)
    yield "quantized weights", codes + sum(size * m * n for m, n in shapes.values()) + _FP32 * largest
    yield "factors, gradients and Adam", _COPIES * _FP32 * sum(w.rank * (w.outputs + w.inputs) for w in block.linears)
    config: Any = stream.model.config.get_text_config(decoder=True)
    row = backward_row(shapes, ranks, block, config, size, length, on.device.type) + _LOSS * config.hidden_size
    copies = _FP32 * (block.largest + tokens * (block.widest + block.outputs)) if on.widened else 0
    yield "activations and gradients", tokens * row + copies


def training_table(rows: Mapping[int, Training], caption: str, budget: int | None = None) -> Table:
    """For rich to print, by the bits of a quantized weight; with a budget, which of them fit."""
    parts = {"base": "base", "adapter": "adapter", "gradients": "gradients", "AdamW": "optimizer"}
    parts |= {"activations": "activations", "total": "total"}
    unit, size, places = ("MiB", 2**20, 1) if max(row.total for row in rows.values()) < 2**30 else ("GiB", 2**30, 2)
    table = Table("bits", "format", title=f"{unit} on the device", caption=caption, caption_justify="left")
    table.box, table.show_edge, table.padding = SIMPLE, False, (0, 1, 0, 0)  # for 80 columns
    for part in parts:
        table.add_column(part, justify="right")
    if budget is not None:
        table.add_column("fits")
    for bits, row in rows.items():
        sizes = [f"{getattr(row, part) / size:.{places}f}" for part in parts.values()]
        fits = [] if budget is None else ["yes" if row.total <= budget else "no"]
        table.add_row(str(bits), row.format, *sizes, *fits)
    return table
