"""bf16 and fp16 products in fp32: they are what one rounding of the exact ones is, forward and backward."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

import quailora
from quailora import ops
from quailora.evaluate import perplexity
from quailora.memory.sizes import Device, activations, block_sizes
from quailora.modeling.checkpoint import Checkpoint
from quailora.modeling.streamed_model import StreamedModel
from quailora.ops import cpu_matmul as half
from quailora.ops.cpu_matmul import Float32Products
from tests.helpers import tiny

CPU = torch.device("cpu")
HALVES = (torch.bfloat16, torch.float16)
LORA = LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")


def drawn(*shapes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def attention(*inputs: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(*inputs, is_causal=True)


# What a model multiplies by, and the shapes of what it takes.
PRODUCTS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "mm": (torch.mm, [(5, 64), (64, 7)]),
    "linear": (nn.functional.linear, [(2, 5, 64), (7, 64), (7,)]),
    "linear without bias": (nn.functional.linear, [(2, 5, 64), (7, 64)]),
    "Conv1D": (torch.addmm, [(7,), (5, 64), (64, 7)]),
    "matmul": (torch.matmul, [(2, 3, 5, 64), (2, 3, 64, 7)]),
    "bmm": (torch.bmm, [(3, 5, 64), (3, 64, 7)]),
    "baddbmm": (torch.baddbmm, [(3, 5, 7), (3, 5, 64), (3, 64, 7)]),
    "attention": (attention, [(1, 2, 16, 32)] * 3),
}


class Seen(TorchDispatchMode):
    """The dtypes in which products are asked for of torch itself."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(word in func.__name__ for word in ("mm", "attention", "matmul", "linear")):
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", PRODUCTS)
def test_results_and_gradients_are_exact_but_for_a_rounding(name: str, dtype: torch.dtype) -> None:
    product, shapes = PRODUCTS[name]
    inputs = [each.requires_grad_() for each in drawn(*shapes, dtype=dtype)]
    exact_inputs = [each.detach().double().requires_grad_() for each in inputs]
    exact = product(*exact_inputs)
    (gradient,) = drawn(tuple(exact.shape), dtype=dtype)
    with Seen() as seen, Float32Products(dtype):
        found = product(*inputs)
        found.backward(gradient)
    exact.backward(gradient.double())
    assert seen.dtypes and set(seen.dtypes) == {torch.float32}
    assert found.dtype is dtype
    with torch.inference_mode(), Seen() as seen, Float32Products(dtype):
        assert torch.equal(product(*inputs), found)
    assert seen.dtypes and set(seen.dtypes) == {torch.float32}
    # Attention hands its rounded result to its backward pass, and a bias's gradient is summed by torch, in its dtype.
    results = zip([found, *(each.grad for each in inputs)], [exact, *(each.grad for each in exact_inputs)], strict=True)
    for mine, its in results:
        assert mine is not None and its is not None and mine.dtype is dtype
        assert float((mine.detach().double() - its.detach()).norm() / its.detach().norm()) < torch.finfo(dtype).eps
    if name != "attention":
        rounded = (found.double() - exact).abs() / (torch.finfo(dtype).eps / 2 * exact.abs() + 1e-5)
        assert float(rounded.detach().max()) <= 1


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_linears_of_4_bits_are_bitsandbytes_own_but_for_a_rounding(dtype: torch.dtype, nested: bool) -> None:
    layer = Linear4bit(64, 7, compute_dtype=dtype, compress_statistics=nested, quant_type="nf4")
    layer.weight = Params4bit(drawn((7, 64), dtype=dtype)[0], quant_type="nf4", compress_statistics=nested)
    layer = layer.to("cpu")
    (x,) = drawn((2, 5, 64), dtype=dtype)
    weight = dequantize_4bit(layer.weight, layer.weight.quant_state).to(dtype)
    exact = linear(x.double(), weight.double(), layer.bias.detach().double())
    for with_gradient in (False, True):  # bitsandbytes takes different ways
        with torch.set_grad_enabled(with_gradient), Seen() as seen, Float32Products(dtype):
            found = layer(x.requires_grad_(with_gradient))
        assert found.dtype is dtype and set(seen.dtypes) == {torch.float32}
        off = (found.detach().double() - exact).norm() / exact.norm()
        assert float(off) < torch.finfo(dtype).eps / 2


def test_only_what_is_asked_for_is_made_in_fp32() -> None:
    with Seen() as seen, Float32Products(torch.float16):
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            assert torch.mm(*drawn((3, 4), (4, 5), dtype=dtype)).dtype is dtype
    assert seen.dtypes == [torch.bfloat16, torch.float32, torch.float32, torch.float64]


def test_on_a_cpu_that_multiplies_them_nothing_is_put_between(slow_halves: Callable[..., None]) -> None:
    slow_halves()
    with Seen() as seen, ops.half_products(CPU, HALVES):
        torch.mm(*drawn((3, 4), (4, 5), dtype=torch.bfloat16))
    assert seen.dtypes == [torch.bfloat16]
    assert ops.backends(CPU)["bf16_products"].backend == "torch"


def test_it_says_why(slow_halves: Callable[..., None]) -> None:
    slow_halves(torch.float16)
    services = ops.backends(CPU)
    assert (services["bf16_products"].backend, services["fp16_products"].backend) == ("torch", "fp32")
    assert "no products in float16 for this CPU" in services["fp16_products"].others["torch"]
    assert half.obstacle(torch.float16)(torch.device("cuda")) is None
    with Seen() as seen, ops.half_products(CPU, HALVES):
        for dtype in HALVES:
            torch.mm(*drawn((3, 4), (4, 5), dtype=dtype))
    assert seen.dtypes == [torch.bfloat16, torch.float32]
    with Seen() as seen, ops.half_products(CPU, [torch.bfloat16]):
        torch.mm(*drawn((3, 4), (4, 5), dtype=torch.float16))
    assert seen.dtypes == [torch.float16]


def test_factors_that_do_not_go_together_stay_an_error() -> None:
    (left,), (right,) = drawn((3, 4), dtype=torch.bfloat16), drawn((4, 5), dtype=torch.float32)
    with Float32Products(torch.bfloat16):
        for factors in ((left, right), (right.T, left.T)):
            with pytest.raises(RuntimeError, match="same dtype"):
                torch.mm(*factors)


def test_what_is_slow_is_what_onednn_does_not_support(monkeypatch: pytest.MonkeyPatch) -> None:
    for bf16, fp16, slow in ((True, True, ()), (True, False, HALVES[1:]), (False, True, HALVES[:1])):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda bf16=bf16: bf16)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda fp16=fp16: fp16)
        assert half.slow_dtypes() == slow
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert half.slow_dtypes() == HALVES


# ---- Where models run


def test_a_streamed_forward_pass_takes_them(slow_halves: Callable[..., None], tmp_path: Path) -> None:
    slow_halves(*HALVES)
    checkpoint = tiny.checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    with Seen() as seen:
        quailora.build_adapter(checkpoint, LORA, tiny.sequences(2), tmp_path / "adapter", progress=False)
    assert torch.bfloat16 not in seen.dtypes


def test_what_they_take_is_planned(slow_halves: Callable[..., None], tmp_path: Path) -> None:
    stream = StreamedModel(Checkpoint(tiny.checkpoint(tmp_path, dtype=torch.bfloat16)), CPU, torch.bfloat16)

    def peak(*slow: torch.dtype) -> int:
        slow_halves(*slow)
        return activations(block_sizes(stream, {})[0], stream, 1, 8, Device.of(CPU, torch.bfloat16))

    largest = max(p.numel() for p in stream.blocks[0].module.parameters())
    assert peak(*HALVES) - peak() >= 4 * largest  # the fp32 copy of a weight


def test_models_are_scored_with_them(slow_halves: Callable[..., None]) -> None:
    slow_halves(torch.bfloat16)
    with Seen() as seen:
        perplexity(tiny.model(dtype=torch.bfloat16), [torch.ones(1, 4, dtype=torch.int64)])
    assert seen.dtypes and torch.bfloat16 not in seen.dtypes
    with Seen() as seen, ops.half_products(torch.device("cuda"), HALVES):
        torch.mm(*drawn((3, 4), (4, 5), dtype=torch.bfloat16))
    assert seen.dtypes == [torch.bfloat16]
