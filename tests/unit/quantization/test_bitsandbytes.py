"""The quantized weight is bit for bit what transformers loads, and Q is what the forward pass multiplies with."""

import dataclasses
import json
import logging
import warnings
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, get_4bit_type, has_avx512bf16
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPTQConfig,
    LlamaConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from quailora.errors import AdapterError, CheckpointError
from quailora.quantization.bitsandbytes import BLOCKSIZES, BitsAndBytes
from quailora.quantization.bitsandbytes_weights import EightBit, FourBit, NestedAbsmax
from quailora.quantization.protocol import QuantizedWeight
from quailora.quantization.registry import from_module, is_quantized, read

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NF4 = BitsAndBytes("nf4", double=True, blocksize=64, compute_dtype=torch.bfloat16, storage=torch.uint8)
INT8 = BitsAndBytes("int8", threshold=6.0)
# bitsandbytes repacks a 4-bit weight where the CPU has AVX512-BF16, so only there can it be tested.
repacks = pytest.mark.skipif(not has_avx512bf16(), reason="no AVX512-BF16 on this CPU")

# Inputs in whole blocks of 64 and outputs in multiples of 32: bitsandbytes' own CPU kernels are right for no others.
TINY = {
    "llama": LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    ),
    "gpt2": GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0),
}


@pytest.fixture(scope="module", params=list(product(TINY, DTYPES)), ids=lambda p: f"{p[0]}-{p[1]}")
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random model, for each architecture and dtype."""
    family, dtype = request.param
    path = tmp_path_factory.mktemp("checkpoint")
    AutoModelForCausalLM.from_config(TINY[family], dtype=dtype).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    AutoModelForCausalLM.from_config(TINY["llama"], dtype=torch.float32).save_pretrained(path)
    return path


def load(path: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, device_map="cpu", **options)


def linears(model: PreTrainedModel) -> dict[str, Any]:
    found = {name: module for name, module in model.named_modules() if is_quantized(module)}
    assert found
    return found


def full_precision(path: Path, name: str, module: Any) -> Tensor:
    """The checkpoint's weight as outputs by inputs."""
    weight = load_file(path / "model.safetensors")[f"{name}.weight"]
    return weight.T if module.source_cls is Conv1D else weight


def parts(weight: QuantizedWeight | NestedAbsmax) -> dict[str, object]:
    """The fields, those of a nested absmax among them."""
    values: dict[str, object] = {}
    for field in dataclasses.fields(weight):
        value = getattr(weight, field.name)
        nested = parts(value) if isinstance(value, NestedAbsmax) else {"": value}
        values |= {f"{field.name}.{key}": part for key, part in nested.items()}
    return values


def assert_same(actual: QuantizedWeight, expected: QuantizedWeight) -> None:
    """Equal in every bit."""
    mine, theirs = parts(actual), parts(expected)
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(mine[name], value, rtol=0, atol=0)
        else:
            assert mine[name] == value, name


def decoded(weight: FourBit) -> Tensor:
    """Q by the definition, in plain torch."""
    size = weight.shape[0] * weight.shape[1]
    codes = torch.stack((weight.codes >> 4, weight.codes & 15), 1).reshape(-1)[:size].int()
    absmax = weight.absmax
    if isinstance(absmax, NestedAbsmax):
        blocks = torch.arange(absmax.codes.numel()) // absmax.blocksize
        absmax = absmax.table[absmax.codes.int()] * absmax.absmax[blocks] + absmax.offset
    spread = absmax[torch.arange(size) // weight.blocksize]
    return (get_4bit_type(weight.quant_type, "cpu")[codes] * spread).to(weight.dtype).view(weight.shape)


def linear4bit(weight: Tensor, record: BitsAndBytes, compute_dtype: torch.dtype | None) -> Any:
    """As bitsandbytes makes one, in training mode."""
    m, n = weight.shape
    layer: Any = bnb.nn.Linear4bit(
        n, m, False, compute_dtype, record.double, record.method, record.storage or torch.uint8, device="meta"
    )
    parameter: Any = bnb.nn.Params4bit(weight.clone(), False, **layer.weight.__dict__)
    layer.weight = parameter.to("cpu")
    return layer


def linear8bit(weight: Tensor, threshold: float = 0.0) -> Any:
    m, n = weight.shape
    layer: Any = bnb.nn.Linear8bitLt(n, m, False, has_fp16_weights=False, threshold=threshold, device="meta")
    parameter: Any = bnb.nn.Int8Params(weight.clone(), requires_grad=False)
    layer.weight = parameter.to("cpu")
    return layer


def random_weight(m: int, n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return (0.02 * torch.randn(m, n, generator=torch.Generator().manual_seed(seed))).to(dtype)


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("method", ["nf4", "fp4"])
def test_four_bits_are_those_that_transformers_loads(checkpoint: Path, method: str, double: bool) -> None:
    dtype = next(iter(load_file(checkpoint / "model.safetensors").values())).dtype
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=method,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype,
    )
    record = BitsAndBytes.from_config(config)
    for name, module in linears(load(checkpoint, quantization_config=config)).items():
        weight = full_precision(checkpoint, name, module)
        made, state = record.quantize(weight), module.weight.quant_state

        assert isinstance(made, FourBit)
        assert made.shape == (module.out_features, module.in_features)
        assert torch.equal(made.codes, module.weight.data.view(-1))
        absmax = made.absmax
        assert isinstance(absmax, NestedAbsmax) == double
        assert torch.equal(absmax.codes if isinstance(absmax, NestedAbsmax) else absmax, state.absmax)
        q = made.dequantize()
        assert q.dtype == dtype
        assert torch.equal(q, dequantize_4bit(module.weight.data, state))
        assert torch.equal(q, decoded(made))
        assert_same(read(module), made)
        assert from_module(module) == record


def test_int8_is_what_transformers_loads(checkpoint: Path) -> None:
    config = BitsAndBytesConfig(load_in_8bit=True)
    model = load(checkpoint, quantization_config=config)
    for name, module in linears(model).items():
        made = INT8.quantize(full_precision(checkpoint, name, module))

        assert isinstance(made, EightBit)
        assert torch.equal(made.codes, module.weight.data)
        assert torch.equal(made.absmax, module.weight.SCB)
        assert made.shape == (module.out_features, module.in_features)
        assert_same(read(module), made)
        assert from_module(module) == BitsAndBytes.from_config(config) == INT8
        module(torch.ones(1, module.in_features))  # moves the absmax to module.state
        assert module.weight.SCB is None
        assert_same(read(module), made)


def test_weight_is_quantized_from_the_dtype_the_model_is_loaded_in(llama: Path) -> None:
    for name, module in linears(load(llama, quantization_config=NF4.to_config(), dtype=torch.bfloat16)).items():
        weight = full_precision(llama, name, module)
        assert weight.dtype == torch.float32
        assert_same(read(module), NF4.quantize(weight.bfloat16()))


@pytest.mark.parametrize("record", [NF4, dataclasses.replace(NF4, double=False), INT8], ids=["double", "plain", "int8"])
def test_read_of_a_checkpoint_saved_quantized(llama: Path, tmp_path: Path, record: BitsAndBytes) -> None:
    load(llama, quantization_config=record.to_config()).save_pretrained(tmp_path)
    for name, module in linears(load(tmp_path)).items():
        assert_same(read(module), record.quantize(full_precision(llama, name, module)))
        assert from_module(module) == record


def test_storage_dtype_changes_no_bit(llama: Path) -> None:
    record = dataclasses.replace(NF4, storage=torch.bfloat16)
    for name, module in linears(load(llama, quantization_config=record.to_config())).items():
        assert module.weight.dtype == torch.bfloat16
        assert_same(read(module), NF4.quantize(full_precision(llama, name, module)))
        assert from_module(module) == record
    assert not NF4.differences(record)


def test_state_outlives_a_weight_that_lost_it() -> None:
    """As under FSDP, which makes plain parameters of all."""
    layer = linear4bit(random_weight(32, 64, torch.bfloat16), NF4, NF4.compute_dtype)
    before = read(layer)
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
    assert_same(read(layer), before)


@pytest.mark.parametrize("method", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compute_dtype", DTYPES)
def test_forward_pass_multiplies_with_q(
    method: str, double: bool, dtype: torch.dtype, compute_dtype: torch.dtype
) -> None:
    """On the identity the output is Q itself, exactly: every sum has one term."""
    record = dataclasses.replace(NF4, method=method, double=double)
    layer = linear4bit(random_weight(64, 128, dtype), record, compute_dtype)
    q = read(layer).dequantize()
    assert q.dtype == compute_dtype
    assert torch.equal(layer(torch.eye(128, dtype=compute_dtype)).T, q)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_without_compute_dtype_takes_that_of_its_input(dtype: torch.dtype) -> None:
    layer = linear4bit(random_weight(64, 128, dtype), NF4, None)
    q = read(layer).dequantize()
    assert q.dtype == dtype
    assert torch.equal(layer(torch.eye(128, dtype=dtype)).T, q)


@repacks
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("method", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compute_dtype", DTYPES)
def test_read_of_a_layer_repacked_in_eval_mode(
    storage: torch.dtype, method: str, double: bool, dtype: torch.dtype, compute_dtype: torch.dtype
) -> None:
    record = dataclasses.replace(NF4, method=method, double=double, compute_dtype=compute_dtype, storage=storage)
    weight = random_weight(64, 128, dtype)
    made = record.quantize(weight)
    assert isinstance(made, FourBit)
    plain = made.absmax.dequantize() if isinstance(made.absmax, NestedAbsmax) else made.absmax
    layer = linear4bit(weight, record, compute_dtype).eval()
    output = layer(torch.eye(128, dtype=compute_dtype)).T
    assert layer.weight.quant_state.packing_format_for_cpu

    held = layer.weight.data.clone(), dict(layer.weight.quant_state.__dict__)
    again = read(layer)
    assert torch.equal(layer.weight.data, held[0])
    assert layer.weight.quant_state.__dict__ == held[1]  # the same objects: none was written to or replaced

    # The codes are all there; of absmax bitsandbytes keeps bf16. That of a bf16 weight is one of its elements: exact.
    assert_same(again, dataclasses.replace(made, absmax=plain.bfloat16().float()))
    assert from_module(layer) == record
    if dtype == torch.bfloat16 and not double:
        assert torch.equal(again.dequantize(), made.dequantize())
    # Here the forward pass multiplies with table * absmax where both factors, and the product, are rounded to bf16:
    # beside the absmax, two roundings more than Q has, and Q may have one of its own. Each is within 2⁻⁸.
    torch.testing.assert_close(output.float(), again.dequantize().float(), rtol=4 * 2**-8, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_forward_pass_multiplies_with_q_of_int8(training: bool) -> None:
    layer = linear8bit(random_weight(64, 128, torch.float32)).train(training)
    q = read(layer).dequantize()
    assert q.dtype == torch.float32
    # In training on a CPU: three roundings on either side. In eval mode bitsandbytes scales the sum of products by
    # 6.200124e-05 for 1/127², which is off by 1.81e-5.
    torch.testing.assert_close(layer(torch.eye(128)).T, q, rtol=6 * 2**-24 if training else 1.9e-5, atol=0)


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("method", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(3, 50), (7, 9), (1, 1), (64, 32), (64, 96), (257, 64)])
def test_shapes_that_blocks_do_not_divide(shape: tuple[int, int], method: str, double: bool) -> None:
    record = dataclasses.replace(NF4, method=method, double=double, compute_dtype=torch.float32)
    weight = random_weight(*shape, torch.float32)
    made = record.quantize(weight)
    assert isinstance(made, FourBit)
    assert torch.equal(made.dequantize(), decoded(made))
    assert_same(read(linear4bit(weight, record, torch.float32)), made)
    # The widest gap between neighbors in either table is a third of absmax: no element is further than half of that
    # off. Double quantization moves absmax itself by less than a twentieth.
    gap = max(b - a for a, b in pairwise(sorted(get_4bit_type(method, "cpu").tolist())))
    allowed = (gap / 2 + (0.05 if double else 0)) * weight.abs().max() + 2**-23
    assert (made.dequantize() - weight).abs().max() <= allowed


@pytest.mark.parametrize("blocksize", [32, 128, 256])
def test_other_block_sizes(blocksize: int) -> None:
    weight = random_weight(64, 192, torch.bfloat16)
    made = dataclasses.replace(NF4, double=False, blocksize=blocksize).quantize(weight)
    assert isinstance(made, FourBit) and isinstance(made.absmax, Tensor)
    assert torch.equal(made.absmax, weight.view(-1, blocksize).abs().amax(1).float())
    assert torch.equal(made.dequantize(), decoded(made))


def test_decoding_by_hand() -> None:
    # NF4 codes 0 15 | 7 8: the ends, zero, and the first value above it.
    codes = torch.tensor([0x0F, 0x78], dtype=torch.uint8)
    nf4 = FourBit(codes, torch.tensor([2.0]), 64, "nf4", (2, 2), torch.float32)
    torch.testing.assert_close(nf4.dequantize(), torch.tensor([[-2.0, 2.0], [0.0, 2 * 0.0795803]]), rtol=1e-6, atol=0)
    # FP4, in twelfths of absmax: 0b0001 is 1/16, 0b0011 is 12, 0b1101 is -6, and 0 is 0. Three rows of one.
    codes = torch.tensor([0b0001_0011, 0b1101_0000], dtype=torch.uint8)
    fp4 = FourBit(codes, torch.tensor([12.0]), 64, "fp4", (3, 1), torch.bfloat16)
    assert fp4.dequantize().flatten().tolist() == [0.0625, 12.0, -6.0]
    # table[4] * 0.5 + 1 = 3 and table[0] * 0.5 + 1 = 1.
    nested = NestedAbsmax(
        torch.tensor([4, 0], dtype=torch.uint8), torch.arange(256.0), torch.tensor([0.5]), torch.tensor(1.0), 256
    )
    assert nested.dequantize().tolist() == [3.0, 1.0]
    ones = FourBit(torch.full((32,), 0xFF, dtype=torch.uint8), nested, 32, "nf4", (2, 32), torch.float32)
    assert ones.dequantize()[:, 0].tolist() == [3.0, 1.0]
    int8 = EightBit(torch.tensor([[127, -127], [1, 0]], dtype=torch.int8), torch.tensor([0.5, 127.0]))
    # fp32, three roundings
    torch.testing.assert_close(int8.dequantize(), torch.tensor([[0.5, -0.5], [1.0, 0.0]]), rtol=3 * 2**-24, atol=0)


def test_bytes_held() -> None:
    weight, blocks = random_weight(64, 128, torch.bfloat16), 64 * 128 // 64
    assert dataclasses.replace(NF4, double=False).quantize(weight).nbytes == 64 * 128 // 2 + 4 * blocks
    assert NF4.quantize(weight).nbytes == 64 * 128 // 2 + blocks + 4 * (256 + 1 + 1)
    assert INT8.quantize(weight).nbytes == 64 * 128 + 4 * 64


@pytest.mark.parametrize("record", [INT8, NF4, dataclasses.replace(NF4, double=False)], ids=["int8", "nested", "plain"])
def test_all_of_it_goes_to_another_device(record: BitsAndBytes) -> None:
    quantized = record.quantize(random_weight(64, 128, torch.bfloat16))
    assert {part.device.type for part in tensors_of(quantized.to(torch.device("meta")))} == {"meta"}
    stayed = quantized.to(torch.device("cpu"))
    assert all(before is after for before, after in zip(tensors_of(quantized), tensors_of(stayed), strict=True))


def tensors_of(quantized: Any) -> list[Tensor]:
    parts = [getattr(quantized, field.name) for field in dataclasses.fields(quantized)]
    inner = [tensor for part in parts if isinstance(part, NestedAbsmax) for tensor in tensors_of(part)]
    return [part for part in parts if isinstance(part, Tensor)] + inner


def test_nothing_is_said_on_the_way(caplog: pytest.LogCaptureFixture) -> None:
    weight = random_weight(64, 128, torch.bfloat16)
    layers = linear4bit(weight, NF4, NF4.compute_dtype), linear8bit(weight)
    with warnings.catch_warnings(), caplog.at_level(logging.INFO):
        warnings.simplefilter("error")
        for layer in layers:
            record = from_module(layer)
            assert torch.equal(record.quantize(weight).dequantize(), read(layer).dequantize())
    assert not caplog.records


@pytest.mark.parametrize(
    "record",
    [NF4, INT8, dataclasses.replace(NF4, method="fp4", double=False, skip_modules=("lm_head", "q_proj"))],
    ids=BitsAndBytes.describe,
)
def test_record_survives_json_and_config(record: BitsAndBytes) -> None:
    assert BitsAndBytes.from_dict(json.loads(json.dumps(record.to_dict()))) == record
    assert BitsAndBytes.from_config(record.to_config()) == record
    assert not record.differences(record)


def test_description() -> None:
    assert NF4.describe() == "NF4, double quantization, blocks of 64, compute bf16"
    assert INT8.describe() == "LLM.int8, outliers from 6"


def test_differences_are_named() -> None:
    assert NF4.differences(dataclasses.replace(NF4, method="fp4")) == ["method NF4 against FP4"]
    assert NF4.differences(INT8) == ["method NF4 against LLM.int8"]
    other = BitsAndBytes("nf4", blocksize=128, compute_dtype=torch.float32, skip_modules=("q_proj",))
    assert NF4.differences(other) == [
        "unquantized layers by default against q_proj",
        "absmax in 8 bits (double quantization) against in fp32",
        "block size 64 against 128",
        "compute dtype bf16 against fp32",
    ]
    assert not INT8.differences(dataclasses.replace(INT8, threshold=0.0))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (BitsAndBytesConfig(), "load_in_8bit=True"),
        (BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="int4"), "bnb_4bit_quant_type"),
        (BitsAndBytesConfig(load_in_8bit=True, llm_int8_has_fp16_weight=True), "llm_int8_has_fp16_weight"),
        (BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float64), "float64"),
        (GPTQConfig(bits=4), "GPTQConfig"),
        (None, "NoneType"),
    ],
    ids=["nothing asked", "int4", "fp16 weights", "fp64", "GPTQ", "none"],
)
def test_configurations_that_are_refused(config: object, said: str) -> None:
    with pytest.raises(AdapterError, match=said):
        BitsAndBytes.from_config(config)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "'method'"),
        ({"method": "nf4", "bits": 4}, "'bits'"),
        ({"method": "nf3"}, "'nf3'"),
        ({"method": "nf4", "blocksize": 48, "compute_dtype": "bfloat16"}, "48"),
        ({"method": "nf4", "blocksize": 64}, "compute dtype None"),
        ({"method": "nf4", "blocksize": 64, "compute_dtype": "half-ish"}, "'half-ish'"),
        ({"method": "int8", "double": True}, "double=True"),
    ],
)
def test_records_that_are_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(AdapterError, match=said):
        BitsAndBytes.from_dict(values)


def test_config_cannot_ask_for_a_block_size() -> None:
    assert 128 in BLOCKSIZES
    with pytest.raises(AdapterError, match="blocks of 128"):
        dataclasses.replace(NF4, blocksize=128).to_config()


def test_modules_that_are_refused() -> None:
    weight = random_weight(32, 64, torch.float32)
    on_meta = bnb.nn.Linear4bit(64, 32, device="meta")
    fp16 = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=True)
    for module, said in [
        (nn.Linear(64, 32), "base_layer"),
        (on_meta, r"Linear4bit\(64, 32\) is on the meta device"),
        (bnb.nn.Linear4bit(64, 32), "not quantized yet"),
        (bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False), "not quantized yet"),
        (fp16, "has_fp16_weights=False"),
    ]:
        with pytest.raises(AdapterError, match=said):
            read(module)
    assert is_quantized(on_meta) and not is_quantized(nn.Linear(64, 32))
    for unfit in (weight.double(), weight[0], weight.to("meta"), weight.to(torch.float8_e4m3fn)):
        with pytest.raises(CheckpointError, match="cannot quantize"):
            NF4.quantize(unfit)
