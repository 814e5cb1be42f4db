"""GPTQ's codes in the layout that the fused kernels read: the same Q to the bit."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from quailora.quantization.gptq import BITS, GPTQ, GPTQWeight
from quailora.quantization.steps import Steps

HALVES = (torch.bfloat16, torch.float16)


def any_codes(bits: int, group: int, symmetric: bool, dtype: torch.dtype) -> GPTQWeight:
    """(6, 192), with every code and zero that the format holds, and scales of either sign that bf16 does not hold."""
    generator = torch.Generator().manual_seed(bits)
    top, groups = 1 << bits, 192 // group

    def integers(*shape: int) -> Tensor:
        return torch.randint(0, top, shape, generator=generator, dtype=torch.uint8)

    zeros = torch.full((6, groups), top // 2, dtype=torch.uint8) if symmetric else integers(6, groups)
    scales = torch.randn(6, groups, generator=generator).half()
    return GPTQWeight(integers(6, 192), scales, zeros, bits, dtype)


@pytest.mark.parametrize("group", [32, 64, 96, 192])
@pytest.mark.parametrize("bits, symmetric", [(2, True), (2, False), (3, True), (3, False), (4, True)])
def test_the_same_q_to_the_bit(bits: int, symmetric: bool, group: int) -> None:
    for dtype in HALVES:
        weight = any_codes(bits, group, symmetric, dtype)
        found = weight.packed
        assert found is not None and found.dtype == found.dequantize().dtype == dtype
        assert torch.equal(found.dequantize(), weight.dequantize())
        assert found.codes.nbytes == 6 * 192 // 2
        assert found.absmax.numel() == 6 * 192 // found.blocksize and found.blocksize == (32 if group % 64 else 64)


def test_the_layout_is_that_of_bitsandbytes() -> None:
    """The first of two codes in the high nibble, and 0 in the middle of 16."""
    codes = torch.tensor([[0, 1, 2, 3] * 16], dtype=torch.uint8)
    found = Steps.of(codes, torch.full((1, 2), 2, dtype=torch.uint8), torch.tensor([[1.5, -2.0]]), torch.bfloat16)
    assert found is not None
    assert found.codes.tolist() == [0x67, 0x89] * 16 and found.absmax.tolist() == [1.5, -2.0]
    assert found.dequantize()[0, 30:36].tolist() == [0.0, 1.5, 4.0, 2.0, 0.0, -2.0]


def test_what_takes_more_than_4_bits_or_less_than_a_block_has_no_such_form() -> None:
    assert any_codes(4, 64, False, torch.bfloat16).packed is None
    assert any_codes(8, 64, True, torch.bfloat16).packed is None
    assert any_codes(3, 48, True, torch.bfloat16).packed is None


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_the_base_says_which_have_one(bits: int, symmetric: bool) -> None:
    """And plans for it, on a GPU: 4 bits for each weight, and an fp32 scale for each block."""
    for group, dtype in product((32, 128), HALVES):
        base = GPTQ(bits, group, symmetric, dtype)
        weight: Any = base.quantize(torch.randn(64, 128, generator=torch.Generator().manual_seed(0)))
        on_cpu, on_gpu = (base.memory(64, 128, torch.device(device))[0] for device in ("cpu", "cuda"))
        assert base.fused == (weight.packed is not None)
        packed = weight.packed.codes.nbytes + weight.packed.absmax.nbytes if base.fused else 0
        assert on_cpu == weight.nbytes and on_gpu - on_cpu == packed


def test_it_is_made_once_and_only_where_it_is_asked_for() -> None:
    weight = any_codes(3, 64, False, torch.bfloat16)
    assert "packed" not in vars(weight)
    assert weight.packed is weight.packed
