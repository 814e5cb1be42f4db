"""The host's part of a solve on a GPU, run without one (benchmarks/common/fake_cuda.py): what makes it wait is found,
and what kernels are launched with is checked."""

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import fake_cuda
from benchmarks.common.fake_cuda import CUDA
from quailora.calibration import hooks
from quailora.calibration.gram import Gram
from quailora.calibration.hidden_states import HiddenStates
from quailora.calibration.hooks import collect
from quailora.ops import dispatch
from quailora.quantization.bitsandbytes_weights import EightBit, FourBit, NestedAbsmax
from quailora.quantization.gptq import GPTQ, GPTQWeight
from quailora.solvers import als, inputs, krylov, solve, svd
from quailora.solvers.config import SolverConfig
from quailora.solvers.inputs import Linear
from quailora.solvers.problem import Problem, to_host
from quailora.solvers.solve import LoraFactors, solve_group

triton = pytest.importorskip("triton", reason="Triton is not installed")

from quailora.kernels import cholesky, error_products, gram_product, quantize_columns  # noqa: E402  (they need it)
from quailora.kernels.variants import Variant  # noqa: E402

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
FORMS = ("nf4", "fp4", "nested", "gptq", "int8", "dense")
SOLVERS = ("krylov", "als", "svd", "eigh")


OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")


class Launches(list[tuple[str, dict[str, Any]]]):
    """Name of a kernel and its arguments, options of the launch included, for each launch."""

    current: torch.device | None = None

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device
        yield
        self.current = before

    def run(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        bound = inspect.signature(kernel.fn).bind(*args, **{k: v for k, v in keywords.items() if k not in OPTIONS})
        assert self.current == CUDA, f"{kernel.fn.__name__} is launched on whatever device is current"
        arguments = dict(bound.arguments) | {name: keywords[name] for name in OPTIONS if name in keywords}
        assert all(isinstance(size, int) and 0 < size < 2**31 for size in grid), grid
        assert all(0 < size < 2**16 for size in grid[1:]), grid
        for name, value in arguments.items():
            if isinstance(value, Tensor):
                assert isinstance(value, FakeTensor) and value.device == CUDA, name
            elif isinstance(value, int):
                assert abs(value) < 2**31, (name, value)  # or Triton would compile for 64 bits
        self.append((kernel.fn.__name__, arguments))


class Indexing(fake_cuda.Indexing):
    def copied(self, source: Tensor) -> None:
        assert source.device == CUDA or not NoHostTraffic.active, "copied from the host"


aten = torch.ops.aten

# What makes the host wait, to learn a size or whether it went well, or may do so with one of cuSOLVER's algorithms.
# (With FakeTensorMode what the host reads itself is an error anyway.)
WAITING = (
    aten._linalg_eigh, aten._linalg_svd, aten._linalg_check_errors, aten.linalg_qr, aten.linalg_lstsq,
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.unique_dim, aten._unique2, aten.equal,
)  # fmt: skip


class NoHostTraffic(TorchDispatchMode):
    """Raises where the host would wait for the device, or its memory be copied to or from the device: what no CUDA
    graph can capture."""

    active = 0  # how many are entered, for `Indexing`, whose functions come here no more

    def __init__(self) -> None:
        super().__init__()
        self.numbers: list[Tensor] = []  # Python's, as tensors: they go to the device as arguments of a launch

    def __enter__(self) -> "NoHostTraffic":
        NoHostTraffic.active += 1
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        NoHostTraffic.active -= 1
        super().__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert function is not aten.lift_fresh.default, "a tensor is made of Python numbers"
        assert function.overloadpacket not in WAITING, f"{function}: the host waits"
        assert not kwargs.get("check_errors"), f"{function}: the host waits"
        if function is aten.index.Tensor:
            assert not any(index is not None and index.dtype == torch.bool for index in args[1]), "the host waits"
        leaves = torch.utils._pytree.tree_leaves
        for value in leaves((args, kwargs)):
            if isinstance(value, Tensor) and not any(value is number for number in self.numbers):
                assert value.device == CUDA, f"{function} reads the host's memory"
        results = function(*args, **kwargs)
        if function is aten.scalar_tensor.default:
            self.numbers.append(results)
            return results
        for value in leaves(results):
            if isinstance(value, Tensor):
                assert value.device == CUDA, f"{function} writes to the host's memory"
        return results


@pytest.fixture
def launches() -> Iterator[Launches]:
    made = Launches()
    with fake_cuda.fake_cuda(made.run, made.device, Indexing()):
        yield made


waits: list[str] = []  # who read from the device


def read_nothing(scalars: Sequence[Tensor]) -> list[float]:
    """What `to_floats` would read for a sound problem."""
    assert len({scalar.device for scalar in scalars}) == 1 and not any(scalar.dim() for scalar in scalars)
    reader = sys._getframe(1).f_code.co_name
    if scalars[0].device == CUDA:
        waits.append(reader)
    if reader == "measure":
        return [1.0, 1.0, 0.0, *[1.0] * (len(scalars) - 3)]
    return [0.0 if reader in ("_check_jitter", "_unsettled") else 1.0] * len(scalars)


def transfer(matrices: Sequence[Tensor]) -> list[Tensor]:
    assert all(matrix.device == CUDA for matrix in matrices)
    waits.append(sys._getframe(1).f_code.co_name)
    return to_host(matrices)


def linear(
    method: str, m: int, n: int, dtype: torch.dtype, rank: int = 8, compute: torch.dtype | None = None
) -> Linear:
    weight = torch.empty(m, n, dtype=dtype, device=CUDA)
    if method == "dense":
        return Linear(weight, torch.empty(m, n, dtype=dtype, device=CUDA), rank)
    if method == "int8":
        return Linear(weight, EightBit(weight.to(torch.int8), torch.empty(m, device=CUDA)), rank)
    if method == "gptq":
        base, groups = GPTQ(3).loaded_in(dtype), (m, n // 64 if n % 64 == 0 else 1)  # no kernel reads groups of 511
        scales, zeros = (torch.empty(groups, dtype=kind, device=CUDA) for kind in (torch.float16, torch.uint8))
        return Linear(weight, GPTQWeight(weight.to(torch.uint8), scales, zeros, 3, base.dtype), rank)
    blocks = -(-m * n // 64)
    absmax: Tensor | NestedAbsmax = torch.empty(blocks, device=CUDA)
    if method == "nested":
        coarse = torch.empty(-(-blocks // 256), device=CUDA)
        codes, table = torch.empty(blocks, dtype=torch.uint8, device=CUDA), torch.empty(256, device=CUDA)
        absmax = NestedAbsmax(codes, table, coarse, torch.empty((), device=CUDA), 256)
    codes = torch.empty(-(-m * n // 2), dtype=torch.uint8, device=CUDA)
    kind = "fp4" if method == "fp4" else "nf4"
    return Linear(weight, FourBit(codes, absmax, 64, kind, (m, n), compute or dtype), rank)


def solved(
    linears: list[Linear],
    monkeypatch: pytest.MonkeyPatch,
    *,
    solver: str = "krylov",
    iterations: int | None = None,
    damping: float = 0.0,
    **options: Any,
) -> list[LoraFactors]:
    for module in (inputs, krylov, solve):
        monkeypatch.setattr(module, "to_floats", read_nothing)
    for module in (krylov, solve):
        monkeypatch.setattr(module, "to_host", transfer)
    n = linears[0].weight.shape[1]
    config = SolverConfig(solver, iterations, damping)
    found = solve_group(linears, torch.empty(n, n, device=CUDA), config, **options)
    for factors, each in zip(found, linears, strict=True):
        (m, n), r = each.weight.shape, each.rank
        assert (factors.A.shape, factors.B.shape) == ((m, r), (n, r))
        assert factors.A.device == factors.B.device == CUDA
    return found


def cases() -> Iterator[Any]:
    for solver, method, dtype, overwrite in product(SOLVERS, FORMS, FLOATS, (False, True)):
        usual = dtype == torch.bfloat16 and (method == "nf4" or (method, solver) == ("gptq", "krylov"))
        quick = usual or (solver == "krylov" and method != "gptq")
        marks = [] if quick else [pytest.mark.slow]
        name = f"{solver}-{method}-{dtype}-{'cached' if overwrite else 'fused'}"
        yield pytest.param(solver, method, dtype, overwrite, marks=marks, id=name)


@pytest.mark.parametrize(("solver", "method", "dtype", "overwrite"), list(cases()))
def test_solve(
    solver: str, method: str, dtype: torch.dtype, overwrite: bool, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = [linear(method, m, 192, dtype) for m in (128, 64)]
    few = {"als": 2}  # one step is like the next
    solved(group, monkeypatch, solver=solver, iterations=few.get(solver), overwrite_weights=overwrite, damping=1e-4)
    bits = {call["BITS"] for name, call in launches if name == "error_product_kernel"}
    # What the 4 or 8 bits are read for: by every product, or once; and a dense Q not by a kernel.
    read_once = method == "dense" or (
        overwrite and solver in ("krylov", "als", "svd") and method in ("nf4", "nested") and dtype != FLOATS[2]
    )
    packed = 8 if method == "int8" else 4
    if solver != "eigh":
        assert bits == {0 if read_once else packed}


def test_products_are_grouped(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    solved([linear("nf4", m, 192, torch.bfloat16) for m in (192, 64, 64)], monkeypatch, iterations=1)
    products = [call for name, call in launches if name == "error_product_kernel"]
    # E H Ω, Eᵀ Y₀, E H .., Eᵀ Y₁, and Eᵀ A anew: one launch for all three linears.
    assert [call["TRANSPOSED"] for call in products] == [False, True, False, True, True]
    assert [call["PRECISION"] for call in products] == ["tf32"] * 4 + ["bf16x3"]
    assert all((call["m_0"], call["m_1"], call["m_2"]) == (192, 64, 64) for call in products)
    with_h = [call for name, call in launches if name == "_gram_product_kernel"]
    assert [(call["k"], call["PRECISION"]) for call in with_h] == [(32, "bf16x3")] * 4  # 24 columns and zeros


@pytest.mark.parametrize("rank", [1, 16, 100, 256, 300])
def test_any_rank(rank: int, launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    solved([linear("nf4", 512, 320, torch.bfloat16, rank)], monkeypatch)
    assert launches


def test_large_shapes(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama-3.1-405B's: the grids and the sizes passed stay within 32 bits."""
    solved([linear("nested", 53248, 16384, torch.bfloat16, 64)], monkeypatch)
    assert launches


POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.uint8: "*u8", torch.int8: "*i8", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


@cache
def shipped() -> dict[str, list[Variant]]:
    """Kernel -> its variants on the GPU of `launches`."""
    by_kernel: dict[str, list[Variant]] = {}
    for module in (error_products, gram_product, cholesky):
        for variant in module.variants("sm_90"):
            by_kernel.setdefault(variant.kernel.fn.__name__, []).append(variant)
    return by_kernel


def is_form(variant: Variant, call: dict[str, Any]) -> bool:
    """Whether Triton compiles the call to this variant: its constants and options, and the types of its arguments."""
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, "maxnreg": variant.maxnreg}
    if any(call.get(key) != value for key, value in (dict(variant.constexprs) | options).items()):
        return False
    if any(call[key] is None or POINTERS[call[key].dtype] != kind for key, kind in pointers_of(variant)):
        return False
    # Triton compiles anew for sizes that are 1 or divisible by 16.
    free = {each.name for each in variant.kernel.params if each.do_not_specialize}
    sizes = {key for key, kind in variant.signature.items() if kind == "i32"} - free
    aligned = {key for key in sizes if call[key] % 16 == 0}
    return sizes & set(variant.attrs) == aligned and all(call[key] != 1 for key in sizes)


def pointers_of(variant: Variant) -> Iterator[tuple[str, str]]:
    return ((key, kind) for key, kind in variant.signature.items() if kind.startswith("*"))


def launched_cases() -> Iterator[Any]:
    for solver, method, dtype, rank in product(SOLVERS, FORMS, FLOATS, (16, 64, 256)):
        quick = solver in ("krylov", "als") and (method, dtype, rank) == ("nf4", FLOATS[0], 64)
        name = f"{solver}-{method}-{dtype}-r{rank}"
        yield pytest.param(solver, method, dtype, rank, marks=[] if quick else pytest.mark.slow, id=name)


@pytest.mark.parametrize(("solver", "method", "dtype", "rank"), list(launched_cases()))
def test_what_is_launched_is_what_is_shipped(
    solver: str, method: str, dtype: torch.dtype, rank: int, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`tests/kernels/test_compiled.py` compiles what `variants` lists: it means something only if launches use nothing
    else."""
    for module in (als, svd):
        monkeypatch.setattr(module, "SVD_DEPTH", 1)
    iterations = {"krylov": 3, "svd": 3, "als": 3}.get(solver)  # the least with which E is cached, where it may
    # bitsandbytes computes in fp32 unless told; and bf16 is what one tells it.
    computes = {dtype, torch.float32 if dtype != torch.float32 else torch.bfloat16} if method == "nf4" else {dtype}
    for (m, n), overwrite, compute in product(((512, 512), (576, 576), (511, 511)), (False, True), computes):
        if compute == dtype or not overwrite:
            group = [linear(method, m, n, dtype, rank, compute)]
            solved(group, monkeypatch, solver=solver, iterations=iterations, overwrite_weights=overwrite)
    different: dict[Any, tuple[str, dict[str, Any]]] = {}
    for name, call in launches:
        call.setdefault("maxnreg", None)
        key = tuple((k, v.dtype if isinstance(v, Tensor) else v) for k, v in call.items())
        different.setdefault((name, key), (name, call))
    strange = [
        each for each in different.values() if not any(is_form(variant, each[1]) for variant in shipped()[each[0]])
    ]
    assert strange == [], strange
    if solver == "als" and method != "dense":
        assert {name for name, _ in launches} == shipped().keys()


@pytest.mark.parametrize("n", [192, 187])
def test_columns_are_rounded_by_what_is_shipped(n: int, launches: Launches) -> None:
    """Blocks of 128 columns and of what is left, as parts of whole matrices, for every kind of grid."""
    m, group = 40, 32 if n % 32 == 0 else 11
    weight, feedback, factor = (torch.empty(size, n, device=CUDA) for size in (m, m, n))
    importance, scales = torch.empty(n, device=CUDA), torch.empty(m, n // group, device=CUDA)
    zeros = torch.empty(m, n // group, dtype=torch.uint8, device=CUDA)
    grids: list[dict[str, Any]] = [{"scales": None}, {"scales": scales}, {"scales": scales, "zeros": zeros}]
    grids += [{"scales": scales, "levels": torch.empty(size, device=CUDA)} for size in (4, 16, 256)]
    wide = 128 - 128 % group
    for grid, symmetric, start in product(grids, (False, True), (0, wide)):
        stop, names = min(start + wide, n), ("scales", "zeros")
        given = {
            name: of.narrow(1, start // group, (stop - start) // group) if name in names and of is not None else of
            for name, of in grid.items()
        }
        bits = len(given["levels"]).bit_length() - 1 if "levels" in given else 3
        found = dispatch.quantize_columns(
            weight[:, start:stop], feedback[:, start:stop], factor[start:stop, start:stop], importance[start:stop],
            group=group, bits=bits, symmetric=symmetric, clips=(1.0, 0.9), **given,
        )  # fmt: skip
        assert found.codes.shape == found.errors.shape == (m, stop - start)
        assert found.scales.shape == found.zeros.shape == (m, (stop - start) // group)
        assert {part.device for part in found} == {CUDA}
    used = set()
    for _, call in launches:
        call.setdefault("maxnreg", None)
        [form] = [variant.name for variant in quantize_columns.variants("sm_90") if is_form(variant, call)]
        used.add(form)
    kinds = {variant.name.removesuffix("-ragged") for variant in quantize_columns.variants("sm_90")}
    assert used == {kind if n % 32 == 0 else f"{kind}-ragged" for kind in kinds}
    assert len(launches) == 2 * 2 * len(grids)


@pytest.mark.parametrize("coarse", ["ieee", "bf16x3", "tf32", "bf16"])
def test_any_precision(coarse: str, launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    solved([linear("nf4", 128, 192, torch.bfloat16)], monkeypatch, precision=coarse)
    used = {call["PRECISION"] for name, call in launches if name == "error_product_kernel"}
    assert used == {coarse, *(["bf16x3"] if coarse in ("tf32", "bf16") else [])}


LOOPS = {"krylov": ["_span"], "als": ["_span", "_alternate"]}  # als starts with the SVD of E


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the loops that were run, each under NoHostTraffic."""
    ran: list[str] = []

    def guard(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            ran.append(function.__name__)
            with NoHostTraffic():
                return function(*args)

        return run

    for module, name in ((krylov, "_span"), (als, "_alternate")):
        monkeypatch.setattr(module, name, guard(getattr(module, name)))
    return ran


@pytest.mark.parametrize("solver", LOOPS)
def test_the_iteration_can_be_captured(
    solver: str, launches: Launches, guarded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    solved([linear("nf4", 128, 192, torch.bfloat16)], monkeypatch, solver=solver)
    assert guarded == LOOPS[solver]


FAULTS: dict[str, Callable[[Tensor], object]] = {
    "eigh": lambda b: torch.linalg.eigh(b.T @ b),
    "svd": torch.linalg.svd,
    "qr": torch.linalg.qr,
    "cholesky": lambda b: torch.linalg.cholesky(b.T @ b),
    "cholesky_ex": lambda b: torch.linalg.cholesky_ex(b.T @ b, check_errors=True),
    "nonzero": aten.nonzero.default,
    "copy to": lambda b: b.copy_(torch.ones(b.shape, device="cpu")),
    "to": lambda b: torch.ones(b.shape, device="cpu").to(CUDA),
    "one number": lambda b: b * torch.ones((), device="cpu"),
    "copy from": lambda b: b.sum().cpu(),
    "read": lambda b: b.sum().item(),
    "Python numbers": lambda b: torch.tensor([1.0, 2.0], device=CUDA),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("loop", ["_span", "_alternate"])
def test_what_cannot_be_captured_is_found(
    loop: str, name: str, launches: Launches, guarded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    apply_gram = Problem.apply_gram

    def faulty(problem: Problem, rights: Sequence[Tensor]) -> list[Tensor]:
        products = apply_gram(problem, rights)
        if guarded[-1:] == [loop] and NoHostTraffic.active:
            FAULTS[name](products[0])
        return products

    monkeypatch.setattr(Problem, "apply_gram", faulty)
    for module in (als, svd):
        monkeypatch.setattr(module, "SVD_DEPTH", 1)
    with pytest.raises(
        (AssertionError, DataDependentOutputException), match=r"host|Python numbers|_local_scalar_dense"
    ):
        solved([linear("nf4", 128, 192, torch.bfloat16)], monkeypatch, solver="als", iterations=1)
    assert guarded == LOOPS["als"][: 1 + (loop == "_alternate")]  # it is in there that it was found


def test_the_host_reads_before_and_after(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    als_only = ["_finish", "_balance", "_balance"]  # the objectives; and of factors whose A is not orthonormal
    for solver, middle, last in (("krylov", [], []), ("als", ["_check_jitter"], als_only)):
        waits.clear()
        solved([linear("nf4", m, 192, torch.bfloat16) for m in (128, 64)], monkeypatch, solver=solver)
        assert waits == ["measure", "_find_ritz", *middle, "_finish", *last]


def test_a_wait_would_be_seen(launches: Launches) -> None:
    with pytest.raises(DataDependentOutputException):
        torch.ones(3, device=CUDA).sum().item()
    with pytest.raises(AssertionError, match="Python numbers"), NoHostTraffic():
        torch.tensor([1.0], device=CUDA)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gram(dtype: torch.dtype, launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    gram = Gram(192, CUDA)
    gram.update(torch.empty(2, 100, 192, dtype=dtype, device=CUDA))
    gram.update(torch.empty(2, 100, 192, dtype=dtype, device=CUDA), torch.ones(2, 100, device=CUDA).bool())
    gram.merge(gram)
    monkeypatch.setattr(Gram, "tokens", 800)  # to read how many there are would be to wait
    assert gram.matrix().shape == (192, 192)


class Stream:
    """What a stream is asked for, by name."""

    def __init__(self, events: list[str], name: str) -> None:
        self.events, self.name, self.device = events, name, CUDA

    def wait_stream(self, other: "Stream") -> None:
        self.events.append(f"{self.name} waits for {other.name}")

    def __enter__(self) -> None:
        self.events.append(f"on {self.name}")

    def __exit__(self, *error: Any) -> None:
        self.events.append("back")


class Block(torch.nn.Module):
    """Two layers, the first of whose input is edited in place after it, if so told."""

    def __init__(self, editing: bool) -> None:
        super().__init__()
        self.editing = editing
        self.first, self.second = torch.nn.SiLU(), torch.nn.SiLU()  # any module takes hooks

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if self.editing:
            x.add_(1)
        return self.second(y)


@pytest.mark.parametrize("editing", [False, True])
def test_h_is_added_up_beside_the_forward_pass(
    editing: bool, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    side, main = Stream(events, "side"), Stream(events, "main")
    monkeypatch.setattr(hooks, "_side_stream", cache(hooks._side_stream.__wrapped__))
    streams = iter([side])  # one for all blocks
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: next(streams))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    block = Block(editing)
    with torch.no_grad(), collect({"first": block.first, "second": block.second}) as collector:
        with collector.batch(None):
            block(torch.empty(2, 5, 8, device=CUDA))
        assert events == []  # it is not known yet what is edited
        with collector.batch(None):
            block(torch.empty(2, 5, 8, device=CUDA))
    once = ["side waits for main", "on side", "back"]
    assert events == [*once * (1 if editing else 2), "main waits for side"]
    events.clear()
    # What the side stream reads is held until the main one waits for it: at the first input of the next batch.
    with torch.no_grad(), collect({"first": block.first, "second": block.second}) as collector:
        for number in range(3):
            with collector.batch(None):
                assert len(collector._in_use) == (0 if number < 2 else 2 if editing else 4)
                block(torch.empty(2, 5, 8, device=CUDA))
    assert events == [*once * (1 if editing else 2), "main waits for side"] * 2
    assert not collector._in_use
    events.clear()
    with pytest.raises(RuntimeError), torch.no_grad(), collect({"first": block.first}) as collector:
        for _ in range(2):
            with collector.batch(None):
                block.first(torch.empty(2, 5, 8, device=CUDA))
        assert block.first._forward_pre_hooks
        raise RuntimeError
    assert events == [*once, "main waits for side"]
    assert not block.first._forward_pre_hooks


def test_page_locked_memory_is_given_back_after_the_last_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    states = HiddenStates(CUDA)
    states._memory[0] = torch.zeros(1)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append(f"{len(states._memory)} left"))
    monkeypatch.setattr(torch.accelerator, "empty_host_cache", lambda: events.append(f"{len(states._memory)} kept"))
    with states:
        pass
    assert events == ["1 left", "0 kept"]


def test_hidden_states_stay_on_the_device_where_they_may(launches: Launches) -> None:
    states, hidden = HiddenStates(CUDA, on_device=True), torch.empty(4, 3, 8, device=CUDA)
    with NoHostTraffic():
        states[0] = hidden
        assert states[0] is hidden
    assert states.edits == 1
