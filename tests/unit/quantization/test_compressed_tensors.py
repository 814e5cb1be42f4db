"""The pack-quantized form, by hand and against compressed-tensors' own functions."""

import pytest
import torch
from torch import Tensor

from quailora.quantization.compressed_tensors import checkpoint_config, packed
from quailora.quantization.gptq import BITS, GPTQ, GPTQWeight

M, N, GROUP = 64, 96, 32


def example(bits: int, symmetric: bool) -> tuple[GPTQ, GPTQWeight]:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (M, N), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 1 << bits, (M, N // GROUP), generator=generator, dtype=torch.uint8)
    scales = torch.randn(M, N // GROUP, generator=generator).to(torch.bfloat16).half()  # of both signs
    if symmetric:
        zeros.fill_(1 << (bits - 1))
    base = GPTQ(bits, GROUP, symmetric)
    return base, GPTQWeight(codes, scales, zeros, bits, base.dtype)


def stream(codes: Tensor, bits: int) -> list[int]:
    """Words of 32 bits, by arithmetic on one large integer."""
    whole = sum(int(code) << (bits * i) for i, code in enumerate(codes))
    return [(whole >> (32 * word)) & 0xFFFFFFFF for word in range(len(codes) * bits // 32)]


@pytest.mark.parametrize("bits", BITS)
def test_codes_go_along_rows_and_zeros_down_columns(bits: int) -> None:
    base, weight = example(bits, symmetric=False)
    found = packed(weight, base)
    assert found["weight_packed"].shape == (M, N * bits // 32)
    assert found["weight_zero_point"].shape == (M * bits // 32, N // GROUP)
    assert [word & 0xFFFFFFFF for word in found["weight_packed"][5].tolist()] == stream(weight.codes[5], bits)
    assert [word & 0xFFFFFFFF for word in found["weight_zero_point"][:, 1].tolist()] == stream(weight.zeros[:, 1], bits)
    assert found["weight_shape"].tolist() == [M, N] and all(tensor.is_contiguous() for tensor in found.values())
    assert found["weight_scale"].dtype == base.dtype and torch.equal(found["weight_scale"].half(), weight.scales)
    assert "weight_zero_point" not in packed(*example(bits, symmetric=True)[::-1])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_compressed_tensors_unpacks_it_to_q(bits: int, symmetric: bool) -> None:
    reason = "compressed-tensors is not installed"
    compressors = pytest.importorskip("compressed_tensors.compressors", reason=reason)
    quantization = pytest.importorskip("compressed_tensors.quantization", reason=reason)
    base, weight = example(bits, symmetric)
    (group,) = checkpoint_config(base, [])["config_groups"].values()
    scheme = quantization.QuantizationScheme.model_validate(group)
    found = compressors.PackedQuantizationCompressor.decompress(packed(weight, base), scheme)
    assert torch.equal(found["weight"], weight.dequantize())


def test_whole_rows_are_channels() -> None:
    settings = checkpoint_config(GPTQ(3, -1), ["b", "a"])
    assert settings["config_groups"]["group_0"]["weights"] == {
        "num_bits": 3, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None,
    }  # fmt: skip
    assert settings["ignore"] == ["a", "b"]
