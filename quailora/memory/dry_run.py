"""What a run will take, learned by running its code on shapes alone: bytes, FLOPs, and which linears share an input.

Torch's FakeTensorMode computes the shape of every result and no value, so nothing is read and little is allocated.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop

from quailora import ops
from quailora.calibration.calls import NOT_A_CHAIN, replaced_forward, split_call
from quailora.errors import CheckpointError
from quailora.modeling.blocks import Block
from quailora.modeling.streamed_model import StreamedModel
from quailora.modeling.transformers_internals import causal_masks_for_fake_tensors
from quailora.ops.precision import exact_products
from quailora.ops.reference import _PANEL
from quailora.quantization.protocol import QuantizedBase
from quailora.solvers.error_matrix import ErrorMatrices, choose_form
from quailora.solvers.problem import Problem
from quailora.solvers.registry import SOLVERS
from quailora.solvers.solve import _finish

_aten: Any = torch.ops.aten
_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop(q, k, v),
    _aten._grouped_mm: lambda x, experts, *_, **__: 2 * x.numel() * experts.shape[-1],
}

# What no shapes can tell: routing that depends on values.
_NOT_BY_SHAPES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)


class Footprint(TorchDispatchMode):
    """Counts the bytes that are live in tensors made within it, the most there were at a time, and FLOPs.

    What operations allocate inside themselves counts as well, where it is known and not small: `_inside`.
    device: the type of the device that the operations are thought to run on.
    answer: give scalars that are read of fake tensors a value (True, 1) where they have none.
    """

    def __init__(self, device: str = "cpu", answer: bool = False) -> None:
        super().__init__()
        self.live = self.peak = self.flops = 0
        self.answer, self._device = answer, device
        self._counted: set[int] = set()  # addresses of storages

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.answer and function is _aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                self._count(value, 0)  # was there before, or is counted
        if function is _aten._grouped_mm.default and isinstance(args[0], FakeTensor) and args[1].dim() == 3:
            # Experts: (tokens, n) times (experts, n, m). Torch 2.13 has its shape for bf16 only.
            out = args[0].new_empty(args[0].shape[0], args[1].shape[2])
        else:
            out = function(*args, **kwargs)
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._count(value, value.untyped_storage().nbytes())
        inside = _inside(function, args, self._device)
        self.peak = max(self.peak, self.live + inside)
        if (count := _FLOPS.get(getattr(function, "overloadpacket", None))) is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        return out

    def _count(self, tensor: Tensor, nbytes: int) -> None:
        storage = tensor.untyped_storage()
        if (address := storage._cdata) in self._counted:
            return
        self._counted.add(address)
        self.live += nbytes
        weakref.finalize(storage, self._gone, address, nbytes)

    def _gone(self, address: int, nbytes: int) -> None:
        self._counted.discard(address)
        self.live -= nbytes

    def briefly(self, nbytes: int) -> None:
        """So much is allocated, and freed."""
        self.peak = max(self.peak, self.live + nbytes)

    @contextmanager
    def part(self) -> Iterator[dict[str, int]]:
        """The peak above what is live now, and the FLOPs, of what runs within it; neither counts outside."""
        before, peak, flops, self.flops = self.live, self.peak, self.flops, 0
        self.peak = before
        found: dict[str, int] = {}
        try:
            yield found
        finally:
            found |= {"peak": self.peak - before, "flops": self.flops}
            self.peak, self.flops = peak, flops


def _inside(function: Any, args: tuple[Any, ...], device: str) -> int:
    """Bytes that an operation allocates within itself, beside its results."""
    if function is _aten._linalg_eigh.default:
        n = args[0].shape[-1]
        return (2 * n * n + 6 * n + 1) * args[0].element_size()  # the workspace of LAPACK's syevd
    name = function.name()
    if name == "quailora::gram_":
        return _gram_scratch(args[1])
    if device != "cpu" or not name.startswith("bitsandbytes::"):
        return 0  # bitsandbytes' kernels for GPUs write their results alone
    # On a CPU bitsandbytes 0.50 has kernels that read codes, but writes them by torch operations.
    elements = args[0].numel()
    if name == "bitsandbytes::quantize_4bit":
        # The scaled W in fp32, and W if it is not, codes in int32 and in uint8, half of them shifted; FP4's are mapped.
        widened, mapped = args[0].dtype != torch.float32, args[2] != "nf4"
        return (9 + 4 * widened + 14 * mapped) * elements + elements // 2
    if name == "bitsandbytes::int8_vectorwise_quant":
        return 7 * elements  # scaled and rounded, in fp32; beside the result only one of them
    if name == "bitsandbytes::int8_vectorwise_dequant":
        return 4 * elements  # before the division by 127
    return 0


def _gram_scratch(x: Tensor) -> int:
    """Of the extension: 1024 tokens, packed, on a CPU; on a GPU partial sums, which are about as much."""
    return 4 * min(1024, x.shape[:-1].numel()) * x.shape[-1]


def _reference_scratch(x: Tensor) -> int:
    """Of `reference.gram_`: the tokens without padding, and those in fp32; then a panel of H and those in fp32."""
    masked = x.nbytes
    widened, panel = (0 if x.dtype == torch.float32 else 4 * x.numel()), 4 * _PANEL * x.shape[-1]
    return max(masked + widened, (widened or masked) + panel)


# ---- the forward pass


@dataclass(frozen=True)
class Input:
    """A distinct input of a block, and the targeted linears that receive it, by their names in the model."""

    features: int
    linears: tuple[str, ...]


@dataclass(frozen=True)
class BlockRun:
    """One forward pass of a block with hooks, on a micro-batch.

    peak: bytes of activations at their most, with what adding up every H takes beside H, the hidden states out included
        and those in not; all distinct inputs being held.
    peak_in_turn: the same where H is added up before the block goes on, and those of all inputs in one pass.
    arguments: bytes of what the block is called with beside the hidden states: masks, position embeddings.
    exact: whether it ran on shapes alone. If not, these are upper bounds, see `_unseen`.
    """

    inputs: tuple[Input, ...]
    peak: int
    peak_in_turn: int
    arguments: int
    flops: int
    exact: bool


@dataclass(frozen=True)
class ModelRun:
    """A forward pass of the decoder: each block's run, and the peak of what stands outside its blocks."""

    blocks: tuple[BlockRun, ...]
    outside: int


def forward(
    stream: StreamedModel,
    targets: Collection[str],
    batch_size: int,
    length: int,
    *,
    device: str = "cpu",
    gram: str = "reference",
) -> ModelRun:
    """Run the decoder on a micro-batch of shapes, every distinct block once.

    targets: the linears whose inputs are of interest.
    device: the type of the one that the run will be on. gram: the backend that will add up H there, see `ops.backends`.
    """
    decoder, known = stream.decoder, {}
    runs: list[BlockRun] = []
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), ExitStack() as stack:
        stack.enter_context(torch.autocast("cpu", enabled=False))
        values = {name: _empty(tensor) for name, tensor in [*decoder.named_parameters(), *decoder.named_buffers()]}
        tokens = torch.zeros(batch_size, length, dtype=torch.int64)
        # Outside the blocks scalars are read for one thing: whether a mask is needed, and it is not.
        footprint = stack.enter_context(Footprint(device, answer=True))
        stack.enter_context(ops.half_products(torch.device(device), [stream.dtype]))
        stack.enter_context(causal_masks_for_fake_tensors())

        def stand_in(block: Block, *args: Any, **kwargs: Any) -> Any:
            if len(runs) == len(stream.blocks) or block is not stream.blocks[len(runs)]:
                raise CheckpointError(NOT_A_CHAIN)
            hidden, call = split_call(args, kwargs)
            kind = _kind(block, targets, (call.args, call.kwargs))
            if kind not in known:
                footprint.answer = False
                with footprint.part():
                    known[kind] = _run_block(block, targets, _Inputs(footprint, gram), args, kwargs)
                footprint.answer = True
            run, is_tuple = known[kind]
            runs.append(_renamed(run, block))
            return (hidden, None) if is_tuple else hidden

        try:
            with replaced_forward(stream.blocks, stand_in):
                torch.func.functional_call(decoder, values, (), {"input_ids": tokens, "use_cache": False})
        except _NOT_BY_SHAPES:
            pass  # outside the blocks: what was not reached is bounded
    runs += [_unseen(block, targets, batch_size * length) for block in stream.blocks[len(runs) :]]
    return ModelRun(tuple(runs), footprint.peak)


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def _kind(block: Block, targets: Collection[str], call: Any) -> Any:
    """Blocks of which this is equal run alike."""
    places = [(tuple(x.shape), x.dtype) for x in _tensors(call)]
    parameters = [(name, tuple(p.shape), p.dtype) for name, p in block.module.named_parameters()]
    targeted = [name for name in _relative(block) if f"{block.name}.{name}" in targets]
    return type(block.module), tuple(parameters), tuple(targeted), tuple(places)


def _tensors(call: Any) -> list[Tensor]:
    return [value for value in tree_leaves(call) if isinstance(value, Tensor)]


def _relative(block: Block) -> list[str]:
    return [name.removeprefix(f"{block.name}.") for name in block.linears()]


def _renamed(run: BlockRun, block: Block) -> BlockRun:
    """What was found with the names of linears within the block, for that block."""
    inputs = [Input(one.features, tuple(f"{block.name}.{name}" for name in one.linears)) for one in run.inputs]
    return replace(run, inputs=tuple(inputs))


@dataclass
class _Inputs:
    """What `hooks.Collector` is in a run, on shapes."""

    footprint: Footprint
    backend: str  # that adds up H
    found: dict[str, tuple[int, list[str]]] = field(default_factory=dict)  # by the first to receive it: features, names
    held: list[tuple[Tensor, int, str]] = field(default_factory=list)
    grams: list[Tensor] = field(default_factory=list)

    def receive(self, name: str, x: Tensor, hold: bool, with_grams: bool) -> None:
        if not any(name in names for _, names in self.found.values()):
            for seen, edits, leader in self.held:
                if seen is x and x._version == edits:
                    self.found[leader][1].append(name)
                    return
            self.found[name] = x.shape[-1], [name]
        if name not in self.found:
            return
        if hold:
            self.held.append((x, x._version, name))
        if with_grams:
            self.grams.append(x.new_empty(x.shape[-1], x.shape[-1], dtype=torch.float32))
        self.footprint.briefly((_reference_scratch if self.backend == "reference" else _gram_scratch)(x))


def _run_block(
    block: Block, targets: Collection[str], inputs: _Inputs, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[BlockRun, bool]:
    """The run, its linears named within the block, and whether the block returns a tuple."""
    module, footprint = block.module, inputs.footprint
    linears = {name: block.linears()[f"{block.name}.{name}"] for name in _relative(block)}
    linears = {name: linear for name, linear in linears.items() if f"{block.name}.{name}" in targets}

    def once(hold: bool, with_grams: bool) -> tuple[dict[str, int], Any]:
        with footprint.part() as taken, ExitStack() as hooks:
            for name, linear in linears.items():

                def hook(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                    inputs.receive(name, args[0] if args else kwargs["input"], hold, with_grams)

                hooks.callback(linear.register_forward_pre_hook(hook, with_kwargs=True).remove)
            try:
                out = type(module).forward(module, *args, **kwargs)
            except _NOT_BY_SHAPES:
                out = None
        inputs.held.clear()
        inputs.grams.clear()
        return taken, out

    # All inputs held, as they are in the first batch, and on a GPU for as long as H is added up beside the block.
    held, out = once(hold=True, with_grams=False)
    is_tuple, exact = isinstance(out, tuple), out is not None
    del out
    # The first batch makes each H when its input comes; later ones find them all, and hold no input.
    first, later = once(hold=True, with_grams=True)[0], once(hold=False, with_grams=False)[0]
    grams = sum(4 * features**2 for features, _ in inputs.found.values())
    hidden, call = split_call(args, kwargs)
    seen = [Input(features, tuple(names)) for features, names in inputs.found.values()]
    missed = [name for name in linears if not any(name in one.linears for one in seen)]
    run = BlockRun(
        inputs=(*seen, *(Input(_features(linears[name]), (name,)) for name in missed)),
        peak=held["peak"],
        peak_in_turn=max(first["peak"] - grams, later["peak"]),
        arguments=sum(x.nbytes for x in _tensors((call.args, call.kwargs))),
        flops=held["flops"],
        exact=exact,
    )
    if not exact:
        bound = _unseen(block, (), hidden.shape[:-1].numel())
        most = max(run.peak, bound.peak)
        run = replace(run, peak=most, peak_in_turn=most, flops=bound.flops)
    return run, is_tuple


def _features(linear: nn.Module) -> int:
    return linear.in_features if isinstance(linear, nn.Linear) else linear.get_parameter("weight").shape[0]


def _unseen(block: Block, targets: Collection[str], tokens: int) -> BlockRun:
    """Bounds: every token passes every expert, all results are kept in fp32, and of the largest weight there is a copy
    too, as products in fp32 may take it; no two linears share an input."""
    linears = {name: linear for name, linear in block.linears().items() if name in targets}
    weights = [p for p in block.module.parameters() if p.dim() > 1]
    outputs = sum(p.shape[:-1].numel() for p in weights)
    peak = 4 * (tokens * outputs + max((p.shape[-2:].numel() for p in weights), default=0))
    return BlockRun(
        inputs=tuple(Input(_features(linear), (name,)) for name, linear in linears.items()),
        peak=peak,
        peak_in_turn=peak,
        arguments=0,
        flops=2 * tokens * sum(p.numel() for p in block.module.parameters()),
        exact=False,
    )


# ---- quantizing and solving


@dataclass(frozen=True)
class Weight:
    """The weight (m, n) of a linear, in the dtype it is resident in. transposed: of a Conv1D, so that it is copied."""

    outputs: int
    inputs: int
    rank: int
    dtype: torch.dtype
    transposed: bool = False


def solve(
    weights: Sequence[Weight],
    form: QuantizedBase,
    solver: str,
    iterations: int | None,
    *,
    overwrite: bool,
    device: str = "cpu",
    products: str = "reference",
) -> tuple[int, int]:
    """The bytes of their quantized weights, and the most that quantizing and solving linears of one input take beside
    their weights and H, the quantized weights included.

    overwrite: W is not needed any more. products: the backend of `ops.grouped_error_product`; kernels never have E in
    memory, and what they allocate is at most what the reference does.
    """
    _warm_up(form)
    method = SOLVERS[solver]
    steps = (method.iterations or 0) if iterations is None else iterations
    n, copies = weights[0].inputs, sum(w.outputs * w.inputs * w.dtype.itemsize for w in weights if w.transposed)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), exact_products(torch.device("cpu")):
        dense = [torch.empty(w.outputs, n, dtype=w.dtype) for w in weights]
        h = torch.empty(n, n)
        with Footprint(device, answer=True) as footprint:
            quantized = [form.quantize(w) for w in dense]
            if products == "reference":
                forms = [choose_form(w, q, 0, overwrite) for w, q in zip(dense, quantized, strict=True)]
                errors = ErrorMatrices(dense, quantized, forms)
            else:
                errors = _Unformed(dense)
            for i in range(len(dense)):
                for _, panel in errors.panels(i):  # a walk over H takes the same at each step: two are enough
                    ops.gram_energy(h[: 2 * _PANEL, : 2 * _PANEL], panel[:, : 2 * _PANEL])
            ones = [1.0] * len(dense)
            problem = Problem(errors, h, 1.0, ones, ones, [w.rank for w in weights], steps, seed=0)
            _finish(problem, method.run(problem), ones, [0.0] * len(dense))
            codes = sum(q.nbytes for q in quantized)
    return codes, copies + footprint.peak


class _Unformed(ErrorMatrices):
    """E that is never in memory as a whole: products with it allocate their results alone."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.shapes = [(weight.shape[0], weight.shape[1]) for weight in weights]
        self.device, self.precision, self.products = weights[0].device, "tf32", 0
        self._errors = [(weight, weight) for weight in weights]
        self._kinds = [()] * len(weights)

    @property
    def coarse(self) -> bool:
        return True

    def _products(self, operation: Any, thins: Sequence[Tensor], precision: str | None) -> list[Tensor]:
        side = 1 if operation is ops.grouped_error_product_t else 0
        return [thin.new_empty(shape[side], thin.shape[1]) for shape, thin in zip(self.shapes, thins, strict=True)]

    def panels(self, index: int, whole: bool = True) -> Iterator[tuple[slice, Tensor]]:
        rows, columns = self.shapes[index]
        yield slice(0, min(rows, 1024)), torch.empty(min(rows, 1024), columns)


def _warm_up(form: QuantizedBase) -> None:
    """A library keeps its tables from their first use on, which must not be by fake tensors."""
    form.quantize(torch.zeros(1, 64))
