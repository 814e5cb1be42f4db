"""The GPTQ base: its format, and what is refused."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AwqConfig, GPTQConfig

from quailora.errors import AdapterError, CheckpointError
from quailora.quantization.gptq import BITS, GPTQ, pack, unpack
from quailora.quantization.registry import from_config, from_dict, from_module, is_quantized, read


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bit_stream(codes: Tensor, bits: int) -> list[int]:
    """The words that a column packs to, by arithmetic on one large integer."""
    stream = sum(int(code) << (bits * i) for i, code in enumerate(codes))
    return [(stream >> (32 * word)) & 0xFFFFFFFF for word in range(len(codes) * bits // 32)]


@pytest.mark.parametrize("bits", BITS)
def test_codes_are_a_stream_of_bits_down_each_column(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (96, 5), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    words = pack(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (96 * bits // 32, 5)
    for column in range(5):
        assert [word & 0xFFFFFFFF for word in words[:, column].tolist()] == bit_stream(codes[:, column], bits)
    assert torch.equal(unpack(words, bits), codes)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("bits", BITS)
def test_a_weight_is_read_as_it_was_written(bits: int, group_size: int, symmetric: bool) -> None:
    base = GPTQ(bits, group_size, symmetric)
    weight = base.quantize(random(64, 128))
    tensors = base.tensors(weight, torch.bfloat16)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        "qweight": ((128 * bits // 32, 64), torch.int32),
        "qzeros": ((tensors["scales"].shape[0], 64 * bits // 32), torch.int32),
        "scales": ((1 if group_size < 0 else 128 // group_size, 64), torch.float16),
        "g_idx": ((128,), torch.int32),
    }
    found = base.load("linear", tensors.__getitem__)
    assert torch.equal(found.codes, weight.codes) and torch.equal(found.scales, weight.scales)
    assert torch.equal(found.zeros, weight.zeros) and torch.equal(found.dequantize(), weight.dequantize())


@pytest.mark.parametrize("bits", BITS)
def test_no_zero_is_the_code_0_which_version_1_cannot_hold(bits: int) -> None:
    """Stored less one it would borrow from its neighbor, once a loader adds the one to whole words."""
    weight = GPTQ(bits, 32, symmetric=False).quantize(random(64, 64).abs() + 1)
    assert weight.zeros.min() >= 1


@pytest.mark.parametrize("bits", BITS)
def test_scales_are_the_same_in_fp16_and_bf16(bits: int) -> None:
    for size in (1e-6, 0.02, 3.0):
        scales = GPTQ(bits, 32).quantize(size * random(64, 64)).scales
        assert torch.equal(scales.bfloat16().float(), scales.float())


def test_a_symmetric_grid_may_have_negative_scales() -> None:
    """The side with one level more then serves the larger values: at 2 bits -2, -1, 0, 1 or 2, 1, 0, -1."""
    one_sided = torch.tensor([[2.0] + [-1.0, 1.0, 0.0] * 21])
    padded = torch.cat([one_sided, -one_sided]).repeat_interleave(32, 0)
    weight = GPTQ(2, 64).quantize(padded)
    assert torch.equal(weight.dequantize().float(), padded)
    assert (weight.scales[:32] < 0).all() and (weight.scales[32:] > 0).all()


def test_nearest_rounding_is_off_by_half_a_step_where_nothing_is_clipped() -> None:
    base, weight = GPTQ(8, 32), random(64, 64)
    q = base.quantize(weight)
    steps = q.scales.float().abs().repeat_interleave(32, 1)
    unclipped = q.codes.float().sub(128).abs() < 127
    off = (weight - q.scales.float().repeat_interleave(32, 1) * q.codes.float().sub(128)).abs()
    assert (off[unclipped] <= 0.5001 * steps[unclipped]).all()


def test_the_config_of_transformers_there_and_back() -> None:
    config = GPTQConfig(bits=3, group_size=64, sym=True, desc_act=False)
    base = from_config(config)
    assert base == GPTQ(3, 64, True)
    assert from_config(base.to_config()) == base and from_dict(base.to_dict()) == base
    written = base.checkpoint_config("model.layers")
    assert from_config(GPTQConfig.from_dict(written)) == base
    some = base.of_modules(("mlp.down_proj",))
    assert from_dict(some.to_dict()) == some
    assert some.checkpoint_config("model.layers")["modules_in_block_to_quantize"] == [["mlp.down_proj"]]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"bits": 5}, "2, 3, 4, 8 bits, not 5"),
        ({"bits": 4, "group_size": 48}, "group size 48"),
        ({"bits": 4, "dtype": torch.float32}, "not in torch.float32"),
    ],
)
def test_settings_that_the_format_does_not_hold_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        GPTQ(**settings)


def test_sorted_columns_are_refused() -> None:
    with pytest.raises(AdapterError, match="desc_act=False"):
        from_config(GPTQConfig(bits=4, group_size=64, desc_act=True))


def test_awq_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AdapterError, match=r"AWQ moves scales between norms and linears.*--bits 4"):
        from_config(AwqConfig(bits=4, group_size=64))
    monkeypatch.setitem(sys.modules, "gptqmodel", ModuleType("gptqmodel"))
    kind = type("AwqTorchLinear", (nn.Module,), {"__module__": "gptqmodel.nn_modules.qlinear.torch_awq"})
    linear: Any = kind()
    linear.qweight = linear.qzeros = linear.scales = torch.zeros(1)
    assert is_quantized(linear)
    for of_base in (from_module, read):
        with pytest.raises(AdapterError, match="AwqTorchLinear: AWQ moves scales"):
            of_base(linear)
    base = GPTQ(4, 32)
    tensors = base.tensors(base.quantize(random(32, 64)), torch.bfloat16)
    tensors["g_idx"] = tensors["g_idx"].flip(0)
    with pytest.raises(CheckpointError, match="desc_act"):
        base.load("linear", tensors.__getitem__)


def test_a_width_that_no_group_divides_is_refused_with_one_that_does() -> None:
    with pytest.raises(AdapterError, match="96 inputs are not whole groups of 64: take group_size 32"):
        GPTQ(4, 64).obstacle(64, 96)
    assert "words" in str(GPTQ(4, 64).obstacle(1, 64))
    assert GPTQ(4, -1).obstacle(64, 96) is None


def test_a_weight_that_is_not_finite_is_refused() -> None:
    weight = random(32, 32)
    weight[3, 5] = torch.inf
    with pytest.raises(CheckpointError, match="not finite"):
        GPTQ(4, 32).quantize(weight)


def test_a_scale_that_only_fp16_cannot_hold_is_an_error() -> None:
    """fp16 holds 65500, but scales are rounded to bf16 first, which makes it 65536."""
    weight = torch.tensor([-131000.0, 65500.0]).repeat(2, 32)
    with pytest.raises(CheckpointError, match="too large for scales in fp16"):
        GPTQ(2, 64, True, torch.bfloat16).quantize(weight)
