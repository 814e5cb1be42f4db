"""The planner: its arithmetic on the largest models, its choices, and its predictions against what is allocated."""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from quailora import ops
from quailora.calibration.block import BlockRun, DeployedLinear
from quailora.calibration.calls import Calls
from quailora.calibration.data import Batch
from quailora.calibration.distributed import Processes
from quailora.calibration.gram import Gram
from quailora.calibration.hidden_states import HiddenStates
from quailora.calibration.hooks import collect
from quailora.cli.app import app
from quailora.errors import QuailoraError
from quailora.memory import planner, sizes
from quailora.memory.budget import parse_bytes
from quailora.memory.depth import comparing, retargeting
from quailora.memory.planner import BudgetError, Plan, make_plan
from quailora.memory.sizes import Calibrated, Device, Weight, activations, block_sizes, solving
from quailora.memory.training import refining
from quailora.modeling.blocks import linear_weight
from quailora.modeling.checkpoint import Checkpoint
from quailora.modeling.streamed_model import StreamedModel
from quailora.ops import reference
from quailora.pipeline.depth import Depth, Streams
from quailora.pipeline.quantize import CalibratedQ
from quailora.pipeline.stages import Stages
from quailora.quantization.bitsandbytes import BitsAndBytes
from quailora.quantization.gptq import GPTQ
from quailora.quantization.rounding import RoundingConfig
from quailora.refinement.blocks import refine_block
from quailora.refinement.config import RefinementConfig
from quailora.solvers.config import SolverConfig
from quailora.solvers.inputs import Linear
from quailora.solvers.solve import solve_group
from tests.helpers import tiny
from tests.helpers.footprint import Footprint

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NF4 = BitsAndBytes("nf4", double=True, blocksize=64, compute_dtype=torch.bfloat16)
INT8 = BitsAndBytes("int8")
KRYLOV = SolverConfig("krylov")
GB, MIB, GIB = 10**9, 2**20, 2**30


@pytest.fixture(autouse=True)
def products_of_torch(slow_halves: Callable[..., None]) -> None:
    """On whatever CPU, without fp32 copies of factors: see `quailora.ops.cpu_matmul`."""
    slow_halves()


# ---- models that are not here: headers of safetensors over empty, sparse files


def write_headers(folder: Path, **changes: Any) -> Path:
    """A Llama checkpoint without a weight, one shard for each block."""
    config = AutoConfig.for_model("llama", dtype="bfloat16", tie_word_embeddings=False, **changes)
    config.save_pretrained(folder)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shards: dict[str, dict[str, Any]] = {}
    for name, tensor in model.state_dict().items():
        part = name.split(".")[2] if ".layers." in name else "rest"
        header = shards.setdefault(f"model-{part}.safetensors", {})
        start = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        offsets = [start, start + 2 * tensor.numel()]
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": offsets}
    for file, header in shards.items():
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + max(entry["data_offsets"][1] for entry in header.values()))
    weight_map = {name: file for file, header in shards.items() for name in header}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def streamed(folder: Path) -> StreamedModel:
    source = Checkpoint(folder)
    return StreamedModel(source, CPU, source.dtype)


def targets_of(stream: StreamedModel, rank: int = 64) -> dict[str, int]:
    return {name: rank for block in stream.blocks for name in block.linears()}


def planned(stream: StreamedModel, memory_budget: int | None, **options: Any) -> Plan:
    defaults: dict[str, Any] = {"samples": 2000, "sequence_length": 2048, "host_memory_budget": 100 * GB}
    settings = options.pop("settings", KRYLOV)
    options = defaults | options
    return make_plan(stream, targets_of(stream), NF4, settings, memory_budget=memory_budget, **options)


def size_of(plan: Plan, name: str, where: str = "device", phase: str | None = None) -> int:
    """Bytes of the part of that name."""
    sizes = {p.bytes for p in plan.parts if p.name == name and p.where == where and phase in (None, p.phase)}
    assert len(sizes) == 1, f"{name}: {sizes}"
    return sizes.pop()


def check_arithmetic(plan: Plan, d: int, key_value: int, ffn: int, layers: int, vocabulary: int) -> None:
    """A Llama's parts, by hand. bf16 is 2 bytes, H fp32; 2000 x 2048 tokens, micro-batches of 4 sequences."""
    tokens, micro = 2000 * 2048, 4 * 2048
    weights = 2 * (2 * d * d + 2 * d * key_value + 3 * d * ffn + 2 * d)  # q and o, k and v, gate, up and down; norms
    assert size_of(plan, "weights") == size_of(plan, "weights of the next block") == weights
    for name in ("q_proj, k_proj, v_proj", "o_proj", "gate_proj, up_proj"):
        assert size_of(plan, f"H of {name}") == 4 * d * d
    assert size_of(plan, "H of down_proj") == 4 * ffn * ffn
    assert size_of(plan, "embeddings and norm") == 2 * (vocabulary * d + d)
    states = next(part for part in plan.parts if part.name == "hidden states")
    assert states.bytes == tokens * d * 2
    factors = 4 * 64 * (2 * 2 * d + 2 * (key_value + d) + 3 * (ffn + d))
    assert size_of(plan, "factors of all blocks", "disk") == layers * factors
    # NF4 of the largest group, whichever it is: 4 bits, and 8 bits of absmax for each 64 elements with 4 for 256 of it.
    nf4 = [size * (1 / 2 + 1 / 64 + 4 / 64 / 256) for size in (2 * d * ffn, d * ffn, d * d + 2 * d * key_value)]
    assert any(size_of(plan, "quantized weights") == pytest.approx(bytes, rel=1e-3) for bytes in nf4)
    # Activations are widest after SiLU(gate) and up were multiplied: these three, hidden states before the MLP and its
    # input; the inputs of q, k, v and of o are held besides. Where H has no code of its own, it takes the input of
    # down_proj without padding and in fp32 too.
    least = 2 * micro * (4 * d + 3 * ffn)
    reference = 6 * micro * ffn
    assert least <= size_of(plan, "activations", phase="forward") <= 1.5 * least + reference
    # FLOPs: two for each weight and token; attention's 4 t d for each, QKᵀ and its product with V.
    per_token = layers * (weights + 4 * 2048 * d)
    assert plan.flops["forward"] == pytest.approx(tokens * per_token, rel=0.01)
    assert plan.flops["H"] == tokens * layers * (3 * d * d + ffn * ffn)
    forward = [part.bytes for part in plan.parts if part.where == "device" and part.phase in ("forward", "all")]
    assert plan.peak == sum(forward) or plan.device == "cpu"
    assert plan.read == layers * weights + 2 * (vocabulary * d + d)


@pytest.fixture(scope="module")
def llama_2_70b(tmp_path_factory: pytest.TempPathFactory) -> StreamedModel:
    shape = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 32000}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 4096}
    return streamed(write_headers(tmp_path_factory.mktemp("70B"), **shape, **heads))


@pytest.mark.parametrize("device", [CUDA, CPU], ids=str)
def test_70b_in_24_gib(device: torch.device, llama_2_70b: StreamedModel) -> None:
    plan = planned(llama_2_70b, 24 * GIB, device=device)
    check_arithmetic(plan, d=8192, key_value=1024, ffn=28672, layers=80, vocabulary=32000)
    assert (plan.batch_size, plan.prefetch, {len(turns) for turns in plan.passes}) == (4, True, {1})
    # By hand, in GB: 1.71 + 1.71 for two blocks; H 3 x 0.27 + 3.29; activations about 2; little else.
    assert plan.peak == pytest.approx((2 * 1.71 + 3 * 0.268 + 3.288 + 2.4) * GB, rel=0.25)
    assert plan.peak <= 24 * GIB
    # 67 GB of hidden states: within 100 GB of host memory beside a GPU, and where they are not, on disk.
    assert 67.1 * GB < 2000 * 2048 * 8192 * 2 < 67.2 * GB
    assert plan.states == ("host" if device == CUDA else "disk")
    kept = plan.host if device == CUDA else plan.disk
    assert 67.1 * GB < kept < (67.1 + 4) * GB
    cramped = planned(llama_2_70b, 24 * GIB, device=device, host_memory_budget=60 * GB)
    assert cramped.states == "disk" and cramped.disk > 67.1 * GB and cramped.host < GB


def test_405b_in_80_gib(tmp_path: Path) -> None:
    shape = {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "vocab_size": 128256}
    heads = {"num_attention_heads": 128, "num_key_value_heads": 8, "max_position_embeddings": 131072}
    stream = streamed(write_headers(tmp_path, **shape, **heads))
    plan = planned(stream, 80 * GIB, device=CUDA, host_memory_budget=1000 * GB)
    check_arithmetic(plan, d=16384, key_value=1024, ffn=53248, layers=126, vocabulary=128256)
    # By hand, in GB: 6.38 + 6.38 for two blocks; H 3 x 1.07 + 11.3; activations about 4.3.
    assert plan.peak == pytest.approx((2 * 6.38 + 3 * 1.074 + 11.34 + 4.6) * GB, rel=0.25)
    assert plan.peak <= 80 * GIB and plan.states == "host"
    assert planned(stream, 80 * GIB, device=CUDA).states == "disk"  # 134 GB, in 100 of host memory


# ---- choices


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> StreamedModel:
    """Two blocks of 29 MiB."""
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2, "vocab_size": 512}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4}
    return streamed(write_headers(tmp_path_factory.mktemp("small"), **shape, **heads))


SMALL: dict[str, Any] = {"samples": 64, "sequence_length": 512, "host_memory_budget": GIB}


def choice(plan: Plan) -> tuple[int, int, str, bool]:
    return max(map(len, plan.passes)), plan.batch_size, plan.states, plan.prefetch


def plan_of(facts: planner._Planner, chosen: tuple[int, int, str, bool]) -> Plan:
    passes, batch, states, ahead = chosen
    return facts.plan(states, ahead, batch, passes, GIB)[0]


@pytest.mark.parametrize("device", [CUDA, CPU], ids=str)
def test_the_fastest_that_fits(device: torch.device, small: StreamedModel) -> None:
    everything = planned(small, None if device == CPU else 80 * GIB, device=device, **SMALL)
    fastest = (1, 16, "device" if device == CUDA else "host", True)  # 16 x 512 = 8192 tokens
    assert choice(everything) == fastest
    facts = planner._Planner(small, targets_of(small), NF4, KRYLOV, 64, 512, device, 0)
    order = [(passes, *rest) for *rest, passes in facts.preferences(planner._batches(64, 512), GIB)]
    order = [(passes, batch, states, ahead) for passes, states, ahead, batch in order]
    # What is given up first: batches down to 2048 tokens, reading ahead, memory for hidden states, batches, one pass.
    milestones = [(1, 16, "device", True)] if device == CUDA else []
    milestones += [(1, 16, "host", True), (1, 8, "host", True), (1, 4, "host", True), (1, 16, "host", False)]
    milestones += [(1, 16, "disk", True), (1, 4, "disk", False)] if device == CPU else []
    milestones += [(1, 2, "host", True), (1, 1, "host", False), (2, 16, "host", True), (4, 1, "host", False)]
    assert [each for each in order if each in milestones] == milestones
    assert [each for each in order if each[2] == "device"] == milestones[:1] * (device == CUDA)
    chosen = []
    plan = everything
    try:
        while True:
            plan = planned(small, plan.peak - 1, device=device, **SMALL)
            assert plan.peak <= plan.budget
            chosen.append(order.index(choice(plan)))
            assert all(plan_of(facts, other).peak > plan.budget for other in order[: chosen[-1]])
    except BudgetError:
        pass
    assert chosen == sorted(chosen) and len(chosen) >= 6
    # Every linear in one pass, and the largest H in the last, after which its weights may be written to.
    names = list(targets_of(small))
    assert sorted(name for turns in plan.passes for turn in turns for name in turn) == sorted(names)
    for turns in plan.passes:
        assert any(name.endswith("down_proj") for name in turns[-1])


@pytest.mark.parametrize("device", [CUDA, CPU], ids=str)
@pytest.mark.parametrize("batch_size", [None, 5])
def test_the_smallest_budget(device: torch.device, batch_size: int | None, small: StreamedModel) -> None:
    with pytest.raises(BudgetError, match="H of down_proj 64 MiB") as refused:
        planned(small, 8 * MIB, device=device, batch_size=batch_size, **SMALL)
    assert ("(--batch-size) 5" in str(refused.value)) == (batch_size == 5)
    match = re.search(r"smallest that would do is (\d+ MiB), which the (\w+) phase of (\S+) needs", str(refused.value))
    assert match and match[2] in ("forward", "solve") and match[3].startswith("model.layers.")
    plan = planned(small, least := parse_bytes(match[1]), device=device, batch_size=batch_size, **SMALL)
    assert least - MIB < plan.peak <= least and plan.batch_size in (batch_size, 1, 2)
    with pytest.raises(BudgetError):
        planned(small, plan.peak - 1, device=device, batch_size=batch_size, **SMALL)


def planner_of(stream: StreamedModel) -> planner._Planner:
    return planner._Planner(stream, targets_of(stream), NF4, KRYLOV, 64, 512, CPU, 0)


def test_the_time_of_h_goes_by_what_adds_it_up(small: StreamedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(small, GIB, **SMALL)
    monkeypatch.setattr(planner, "_rate", lambda device, dtype: 1e9 if dtype == torch.float32 else 1e10)
    found = []
    for extension in (True, False):
        on = Device(CPU, extension, fused=False, widened=False)
        monkeypatch.setattr(Device, "of", lambda *_, on=on: on)
        found.append(planner_of(small).seconds(plan))
    assert None not in found
    assert found[1] - found[0] == pytest.approx(plan.flops["H"] * (1e-9 - 1e-10))


def test_what_counts(small: StreamedModel) -> None:
    plan = planned(small, GIB, **SMALL)
    assert planned(small, GIB, held=100 * MIB, **SMALL).peak == plan.peak + 100 * MIB
    with pytest.raises(BudgetError):
        planned(small, GIB, held=GIB, **SMALL)
    assert planned(small, GIB, batch_size=3, **SMALL).batch_size == 3
    assert planned(small, GIB, **(SMALL | {"samples": 7})).batch_size == 7
    # While gate and up are solved for, of all H only theirs and the one after are left.
    solving = [part.name for part in plan.parts if part.phase == "solve" and part.name.startswith("H of")]
    assert solving == ["H of gate_proj, up_proj", "H of down_proj"]
    # Hidden states in memory count on a CPU, and on a GPU with room for them; else, beside a GPU, for the host.
    assert size_of(plan, "hidden states") == 64 * 512 * 1024 * 2
    on_gpu = planned(small, GIB, device=CUDA, **SMALL)
    assert size_of(on_gpu, "hidden states") == 64 * 512 * 1024 * 2
    beside = planned(small, on_gpu.peak - 1, device=CUDA, **SMALL)
    assert size_of(beside, "hidden states", "host") == 64 * 512 * 1024 * 2
    # Less what a batch takes when it comes from the host, and of the slack that is added to all.
    saved = (64 - 16) * 512 * 1024 * 2
    assert saved <= on_gpu.peak - beside.peak < 1.2 * saved
    # In page-locked memory each batch takes a power of two: 5 x 512 x 2 KiB is 5 MiB, and takes 8.
    most = planned(small, GIB, device=CUDA, batch_size=5, **SMALL).peak
    odd = planned(small, most - 1, device=CUDA, batch_size=5, **SMALL)
    assert size_of(odd, "hidden states", "host") == math.ceil(64 / 5) * 8 * MIB
    with pytest.raises(QuailoraError, match="give memory_budget"):
        planned(small, None, device=CUDA, **SMALL)


def test_inputs_that_are_called_alike(tmp_path: Path) -> None:
    """GPT-2 has two c_proj in a block."""
    stream = streamed(tiny.checkpoint(tmp_path, "gpt2"))
    options: dict[str, Any] = {"samples": 4, "sequence_length": 16, "host_memory_budget": None}
    plan = make_plan(stream, targets_of(stream, 8), NF4, KRYLOV, memory_budget=GIB, **options)
    grams = [part for part in plan.parts if part.phase == "forward" and part.name.startswith("H of")]
    assert [(part.name, part.bytes) for part in grams] == [
        ("H of c_attn", 4 * 64**2), ("H of c_proj", 4 * 64**2), ("H of c_fc", 4 * 64**2), ("H of c_proj", 4 * 256**2)
    ]  # fmt: skip


def test_weights_are_overwritten_in_the_last_pass_only(small: StreamedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, bool]] = []

    def watched(group: tuple[Weight, ...], *args: Any) -> tuple[int, int]:
        asked.append((group[0].inputs, args[-1]))
        return solving(group, *args)

    monkeypatch.setattr(planner, "solving", watched)
    plan, _ = planner_of(small).plan("host", True, 4, 2, GIB)
    assert {len(turns) for turns in plan.passes} == {2}
    assert set(asked) == {(1024, False), (4096, True)}


# ---- the forward pass


def measure_block(stream: StreamedModel, index: int, call: Any, hidden: torch.Tensor) -> tuple[int, list[Any]]:
    """Peak bytes of two batches, without every H; and the linears of each input."""
    block = stream.blocks[index]
    with stream.resident(f"{block.name}."), collect(block.linears()) as collector, Footprint() as footprint:
        keep = torch.ones(hidden.shape[:2], dtype=torch.bool)
        for _ in range(2):
            with ops.half_products(CPU, [stream.dtype]), collector.batch(keep):
                call.run(block.module, hidden)
        grams = collector.grams
        h = sum(4 * gram.features**2 for gram in {id(gram): gram for gram in grams.values()}.values())
    of_one = {id(gram): tuple(name for name, its in grams.items() if its is gram) for gram in grams.values()}
    return footprint.peak - h, list(of_one.values())


# Where shapes do not tell that modules share an input, or that a linear's hook is not called: an H too many is planned.
SEPARATE = ("falcon", "qwen2_moe", "jamba")
# In this tiny one all ranks are the hidden size, as in no real one, so linears of different inputs look alike.
ALIKE = ("deepseek_v3",)


@pytest.mark.parametrize("slow", [(), (torch.bfloat16,)], ids=["bf16", "bf16 in fp32"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_block_by_its_shapes(
    family: str, slow: tuple[torch.dtype, ...], slow_halves: Callable[..., None], tmp_path: Path
) -> None:
    """Which linears share an input, and the activations, against a run of the model."""
    slow_halves(*slow)
    stream = streamed(tiny.checkpoint(tmp_path, family, torch.bfloat16))
    tokens = torch.randint(2, tiny.VOCABULARY, (16, 64))
    found = block_sizes(stream, targets_of(stream))
    with torch.no_grad(), stream.resident(*stream.outside_blocks()):
        calls = Calls(stream)
        calls.record(Batch(tokens[:1], None))  # learns what blocks return
        with Footprint() as footprint:
            hidden, of_blocks = calls.record(Batch(tokens, None))
    assert footprint.peak <= sizes.outside(stream, 16, 64)
    for index in {0, len(stream.blocks) - 1}:
        with torch.no_grad():
            peak, groups = measure_block(stream, index, of_blocks[index], hidden)
        prefix = f"{stream.blocks[index].name}."
        planned = [tuple(f"{prefix}{weight.name}" for weight in group) for group in found[index].groups]
        predicted = activations(found[index], stream, 16, 64, Device.of(CPU, stream.dtype))
        if family not in (*SEPARATE, *ALIKE):
            assert set(map(frozenset, planned)) == set(map(frozenset, groups))
        assert len(planned) >= len(groups) or family in ALIKE
        assert peak <= predicted <= 3 * peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_h_without_code_of_its_own(dtype: torch.dtype, tmp_path: Path) -> None:
    x, h, keep = torch.ones(4, 256, 512, dtype=dtype), torch.zeros(512, 512), torch.ones(4, 256, dtype=torch.bool)
    with Footprint() as footprint:
        reference.gram_(h, x, keep)
    assert sizes.adding_up(x.shape[:-1].numel(), 512, dtype.itemsize, extension=False) == pytest.approx(
        footprint.peak, rel=0.02
    )


# ---- the solver

# Of one input: (m of each linear, n, rank)
GROUPS = {"pair": ((256, 128), 512, 16), "tall": ((768,), 256, 24), "wide": ((128,), 1024, 8)}


def solve_cases() -> Iterator[Any]:
    for solver, group, dtype in product(("krylov", "als", "svd", "eigh"), GROUPS, (torch.float32, torch.bfloat16)):
        form, overwrite = (INT8, True) if group == "pair" else (NF4, group == "wide")
        yield pytest.param(solver, group, dtype, form, overwrite, id=f"{solver}-{group}-{dtype}")


def few(solver: str) -> int | None:
    return 2 if solver == "als" else None  # one step is like the next


@pytest.mark.parametrize(("solver", "group", "dtype", "form", "overwrite"), list(solve_cases()))
def test_quantizing_and_solving(
    solver: str, group: str, dtype: torch.dtype, form: BitsAndBytes, overwrite: bool
) -> None:
    heights, n, rank = GROUPS[group]
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(m, n, generator=generator).to(dtype) for m in heights]
    x = torch.randn(2 * n, n, generator=generator)
    gram = x.T @ x
    config = SolverConfig(solver, few(solver), damping=1e-4)
    with Footprint() as footprint:
        quantized = [form.quantize(weight) for weight in weights]
        linears = [Linear(*each, rank) for each in zip(weights, quantized, strict=True)]
        solve_group(linears, gram, config, overwrite_weights=overwrite)
    shapes = [Weight(str(m), m, n, rank, dtype) for m in heights]
    codes, besides = solving(shapes, form, config, Device(CPU, False, False, False), overwrite)
    assert codes == sum(q.nbytes for q in quantized)
    assert footprint.peak <= codes + besides < 2.1 * footprint.peak


@pytest.mark.parametrize("magr", [0.0, 1e-3], ids=["", "MagR"])
@pytest.mark.parametrize("form", [NF4, GPTQ(3, 64)], ids=["NF4", "int3"])
@pytest.mark.parametrize("group", GROUPS)
def test_codes_chosen_by_calibration(group: str, form: Any, magr: float) -> None:
    heights, n, rank = GROUPS[group]
    generator = torch.Generator().manual_seed(0)
    weights = {str(m): torch.randn(m, n, generator=generator).bfloat16() for m in heights}
    x = torch.randn(2 * n, n, generator=generator)
    gram = Gram(n)
    gram.update(x)
    step = CalibratedQ(form, RoundingConfig(alternations=1, magr=magr), KRYLOV, Stages())
    with Footprint() as footprint:
        step(weights, dict.fromkeys(weights, rank), gram, overwrite=False)
    shapes = [Weight(str(m), m, n, rank, torch.bfloat16) for m in heights]
    codes, besides = solving(shapes, Calibrated(form, magr > 0), KRYLOV, Device(CPU, False, False, False), False)
    assert footprint.peak <= codes + besides < 2.1 * footprint.peak


def test_an_fp32_weight_makes_room_for_its_error() -> None:
    shapes = [Weight("w", 1024, 1024, 8, torch.float32)] * 6
    on = Device(CPU, False, False, False)
    (_, kept), (_, given_up) = (
        solving(shapes, INT8, SolverConfig("krylov", 0), on, overwrite) for overwrite in (False, True)
    )
    assert kept - given_up > (6 - 2) * 4 * MIB  # 24 MiB; but that of quantizing, 10 for the last one, is left
    conv1d = [replace(one, transposed=True) for one in shapes]
    assert solving(conv1d, INT8, SolverConfig("krylov", 0), on, True)[1] == given_up + 6 * 4 * MIB


# ---- refining blocks


@pytest.mark.parametrize("slow", [(), (torch.bfloat16,)], ids=["bf16", "bf16 in fp32"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_refining_a_block(
    family: str, slow: tuple[torch.dtype, ...], slow_halves: Callable[..., None], tmp_path: Path
) -> None:
    """All that is allocated besides the block's weights and the hidden states."""
    slow_halves(*slow)
    wide = {"n_embd": 256} if family == "gpt2" else {"hidden_size": 256, "intermediate_size": 512}
    stream = streamed(tiny.checkpoint(tmp_path, family, torch.bfloat16, **wide))
    batches = [Batch(torch.randint(2, tiny.VOCABULARY, (4, 64)), None) for _ in range(2)]
    full, quantized = HiddenStates(CPU), HiddenStates(CPU)
    with torch.no_grad(), stream.resident(*stream.outside_blocks()):
        calls = Calls(stream)
        for number, batch in enumerate(batches):
            full[number], of_blocks = calls.record(batch)
            quantized[number] = full[number] + 0.01
    block = stream.blocks[0]
    run = BlockRun(block.module, CPU, stream.dtype, batches, [of_blocks[0]] * 2)
    with stream.resident(f"{block.name}."), torch.no_grad(), Footprint() as footprint:
        deployed = {}
        for name, linear in block.linears().items():
            m, n = linear_weight(linear).shape
            q = NF4.quantize(linear_weight(linear))
            deployed[name] = DeployedLinear(q.dequantize(), 0.1 * torch.randn(m, 16), 0.1 * torch.randn(n, 16))
        config = RefinementConfig(steps=3, every=1, tokens=4 * 64)
        refine_block(run, block.linears(), deployed, quantized, full, config, Processes(), name=block.name)
    sizes = block_sizes(stream, targets_of(stream, rank=16))[0]
    planned = sum(dict(refining(sizes, stream, NF4, 4, 64, Device.of(CPU, stream.dtype))).values())
    assert footprint.peak <= planned <= 3 * footprint.peak


@pytest.mark.parametrize("device", [CUDA, CPU], ids=str)
def test_with_refinement(device: torch.device, small: StreamedModel) -> None:
    """A second stream of hidden states, steps for micro-batches, and what a step takes."""
    options = SMALL | {"device": device}
    plain, plan = (planned(small, 80 * GIB, refinement=each, **options) for each in (None, RefinementConfig()))
    assert (plain.batch_size, plan.batch_size) == (16, 4)  # 4 x 512 tokens, a step
    assert size_of(plan, "hidden states") == 2 * size_of(plain, "hidden states")
    factors = 64 * sum(m + n for m, n in [(1024, 1024)] * 2 + [(256, 1024)] * 2 + [(4096, 1024)] * 3)
    assert size_of(plan, "factors, gradients and Adam", phase="refine") == 8 * 4 * factors
    assert "refine" in plan.text() and "refine" not in plain.flops
    # 48 steps of 2048 tokens, three times as much as a forward pass, and one pass through the quantized block.
    assert plan.flops["refine"] == pytest.approx((3 * 48 * 2048 / (64 * 512) + 1) * plan.flops["forward"], rel=1e-6)
    assert planned(small, 80 * GIB, refinement=RefinementConfig(), batch_size=64, **options).batch_size == 32
    tight = planned(small, 300 * MIB, refinement=RefinementConfig(), **options)
    assert tight.batch_size < 4 and tight.peak <= 300 * MIB


# ---- inputs behind quantized layers


@pytest.mark.parametrize("slow", [(), (torch.bfloat16,)], ids=["bf16", "bf16 in fp32"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_fitting_behind_quantized_layers(
    family: str, slow: tuple[torch.dtype, ...], slow_halves: Callable[..., None], tmp_path: Path
) -> None:
    """All that is allocated for each group besides the block's weights and the hidden states: on the way to it in both
    models, and for its targets, Q and factors."""
    slow_halves(*slow)
    wide = {"n_embd": 256} if family == "gpt2" else {"hidden_size": 256, "intermediate_size": 512}
    stream = streamed(tiny.checkpoint(tmp_path, family, torch.bfloat16, **wide))
    keep = torch.arange(64) < torch.tensor([64, 64, 50, 30])[:, None]
    batches = [Batch(torch.randint(2, tiny.VOCABULARY, (4, 64)), keep) for _ in range(2)]
    streams = Streams(HiddenStates(CPU), HiddenStates(CPU))
    assert streams.quantized is not None
    with torch.no_grad(), stream.resident(*stream.outside_blocks()):
        calls = Calls(stream)
        for number, batch in enumerate(batches):
            streams.full[number], of_blocks = calls.record(batch)
            streams.quantized[number] = streams.full[number] + 0.01
    block = stream.blocks[0]
    run = BlockRun(block.module, CPU, stream.dtype, batches, [of_blocks[0]] * 2)
    found, on = block_sizes(stream, targets_of(stream, rank=16))[0], Device.of(CPU, stream.dtype)
    tokens, size, base = 4 * 64, stream.dtype.itemsize, Calibrated(NF4)
    active = activations(found, stream, 4, 64, on)
    with stream.resident(f"{block.name}."), torch.no_grad():
        linears = block.linears()
        groups = Depth.groups(run, linears, streams)
        peaks: dict[str, list[tuple[int, int]]] = {"forward": [], "solve": []}
        for group in groups:
            sizes_of = [w for w in found.linears if f"{block.name}.{w.name}" in group]
            with Footprint() as footprint:
                deployed = {}
                for name in linears.keys() - set(group):
                    q, (m, n) = NF4.quantize(linear_weight(linears[name])), linear_weight(linears[name]).shape
                    deployed[name] = DeployedLinear(q.dequantize(), 0.1 * torch.randn(m, 16), 0.1 * torch.randn(n, 16))
                    del q
                pair = Depth.compare(run, linears, group[0], deployed, streams, propagate=group is groups[-1])
            parts = dict(comparing(sizes_of, found, base, on, size, tokens))
            peaks["forward"].append((footprint.peak, sum(parts.values()) + active))
            del deployed
            with Footprint() as footprint:
                targets = pair.targets({name: linear_weight(linears[name]) for name in group})
                step = CalibratedQ(NF4, RoundingConfig(alternations=1), KRYLOV, Stages())
                step(targets, dict.fromkeys(group, 16), pair.gram, overwrite=False)
            del targets
            parts = dict(retargeting(sizes_of, found, base, KRYLOV, on, size))
            del parts["deployed linears"]
            gram = 4 * sizes_of[0].inputs ** 2  # it was there before, as D was, and is counted apart
            peaks["solve"].append((footprint.peak, sum(parts.values()) + gram))
    for of_groups in peaks.values():
        assert all(peak <= planned for peak, planned in of_groups)
        peak, planned = (max(each) for each in zip(*of_groups, strict=True))
        assert planned <= 2.5 * peak


@pytest.mark.parametrize("device", [CUDA, CPU], ids=str)
def test_with_inputs_behind_quantized_layers(device: torch.device, small: StreamedModel) -> None:
    """A second stream of hidden states, D beside H, targets, and the parts of passes."""
    options = SMALL | {"device": device}
    plain, plan = (planned(small, 80 * GIB, quantized_inputs=each, **options) for each in (False, True))
    assert size_of(plan, "hidden states") == 2 * size_of(plain, "hidden states")
    assert size_of(plan, "H of the quantized model's inputs, and D") == 2 * 4 * 4096**2
    assert size_of(plan, "targets", phase="solve") == 4 * 1024 * 4096
    deployed = 2 * (2 * 1024**2 + 2 * 256 * 1024 + 2 * 4096 * 1024)  # all but down_proj
    assert size_of(plan, "deployed linears", phase="forward") > deployed
    # Both models up to o_proj, gate_proj and up_proj, and down_proj; the full one on, and then the quantized one again.
    assert 2 * plan.flops["forward"] < plan.flops["inputs"] - 2 * plan.flops["H"] < 3 * plan.flops["forward"]
    assert "inputs" not in plain.flops and "a part of a pass for each input" in plan.text()
    both = planned(small, 80 * GIB, quantized_inputs=True, refinement=RefinementConfig(), **options)
    assert size_of(both, "hidden states") == size_of(plan, "hidden states")
    assert both.flops["inputs"] == plan.flops["inputs"] - plan.flops["forward"]  # that of the refined blocks
    tight = planned(small, 430 * MIB, quantized_inputs=True, **options)
    assert tight.batch_size < plan.batch_size and tight.peak <= 430 * MIB


def test_an_error_is_in_memory_on_a_gpu_where_no_kernel_reads_the_codes() -> None:
    shapes, config = [Weight("w", 1024, 1024, 8, torch.bfloat16)] * 12, SolverConfig("krylov", 0)
    on = Device(CUDA, extension=False, fused=True, widened=False)
    read, not_read = (solving(shapes, GPTQ(4, 64, symmetric), config, on, True) for symmetric in (True, False))
    assert not_read[1] - read[1] > (12 - 6) * 4 * MIB  # 48 MiB; but that of quantizing, 21 for the last one, is left
    assert read[0] - not_read[0] == 12 * (2**20 // 2 + 4 * 2**20 // 64)


# ---- a GPU, by the sizes seen under FakeTensorMode

try:
    from tests.integration.test_fake_cuda import launches, linear, solved  # a fixture
except pytest.skip.Exception:
    launches = None


@pytest.mark.skipif(launches is None, reason="Triton is not installed")
@pytest.mark.parametrize("solver", ["krylov", "als", "svd", "eigh"])
@pytest.mark.parametrize(
    ("heights", "n", "method"),
    [
        ((4096, 1024, 1024), 4096, "nested"),
        pytest.param((4096,), 14336, "nested", marks=pytest.mark.slow),
        pytest.param((4096, 1024, 1024), 4096, "gptq", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_device_bytes_on_a_gpu(
    solver: str, heights: tuple[int, ...], n: int, method: str, launches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is on the device while a group is solved: weights, codes, H and the solver's."""
    weights = [Weight(str(m), m, n, 64, torch.bfloat16) for m in heights]
    on = Device(CUDA, extension=False, fused=True, widened=False)
    base: Any = NF4
    if method == "gptq":  # whose codes are given
        base = SimpleNamespace(fused=True, memory=lambda *of: (GPTQ(3, 64).memory(*of)[0], 0))
    codes, besides = solving(weights, base, SolverConfig(solver, few(solver)), on, overwrite=True)
    monkeypatch.setattr(launches, "append", lambda launch: None, raising=False)  # it would keep what is allocated
    group = [linear(method, m, n, torch.bfloat16, 64) for m in heights]
    with Footprint("cuda") as footprint:
        solved(group, monkeypatch, solver=solver, iterations=few(solver), overwrite_weights=True)
    around = sum(2 * m * n for m in heights)
    seen = around + sum(each.quantized.nbytes for each in group) + footprint.peak
    planned = around + codes + 4 * n * n + besides
    assert seen <= planned < 1.5 * seen


# ---- for a person


def test_to_dict(small: StreamedModel) -> None:
    plan = planned(small, GIB, **SMALL)
    values = json.loads(json.dumps(plan.to_dict()))
    assert values["peak"] == plan.peak and values["batch_size"] == 16
    assert {part["name"] for part in values["parts"]} == {part.name for part in plan.parts}


def test_command(tmp_path: Path) -> None:
    folder = write_headers(
        tmp_path, hidden_size=1024, intermediate_size=4096, num_hidden_layers=2, vocab_size=512,
        num_attention_heads=16, num_key_value_heads=4, max_position_embeddings=1024,
    )  # fmt: skip

    def run(*options: str) -> Any:
        return CliRunner().invoke(app, ["plan", str(folder), "--samples", "64", *options])

    shown = run("--memory-budget", "1GiB")
    assert shown.exit_code == 0, shown.output
    assert "H of down_proj" in shown.output and "64 MiB" in shown.output and "about" in shown.output
    on_gpu = run("--memory-budget", "1GiB", "--device", "cuda", "--json", "--sequence-length", "512", "--rank", "8")
    values = json.loads(on_gpu.stdout)
    assert values["device"] == "cuda" and values["batch_size"] == 16
    assert values["seconds"] is None or torch.cuda.is_available()
    refused = run("--memory-budget", "8MiB")
    assert isinstance(refused.exception, BudgetError)
    assert isinstance(run("--memory-budget", "8 elephants").exception, QuailoraError)
    some = run("--memory-budget", "1GiB", "--target-modules", "q_proj,v_proj", "--json", "--quant", "int8")
    one_pass = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]
    assert json.loads(some.stdout)["passes"][0] == [one_pass]

    def solving_bytes(*options: str) -> int:
        chosen = run("--memory-budget", "1GiB", "--target-modules", "q_proj", "--json", "--device", "cpu", *options)
        return sum(part["bytes"] for part in json.loads(chosen.stdout)["parts"] if part["phase"] == "solve")

    # Of a base that is written, every linear is quantized, and feedback takes a matrix as large as H.
    nearest, calibrated = solving_bytes(), solving_bytes("--rounding", "calibrated", "--inputs", "full")
    assert calibrated > nearest + 4 * 4096**2
    assert solving_bytes("--bits", "3", "--group-size", "128") > nearest + 4 * 4096**2
    # And of inputs behind quantized layers, targets in fp32 (of down_proj, the largest).
    behind = solving_bytes("--rounding", "calibrated")
    assert behind > calibrated + 4 * 1024 * 4096
    for options, message in (
        (("--group-size", "64"), "--group-size goes with --bits"),
        (("--bits", "3", "--training"), "--bits is not for --training"),
        (("--rounding", "gptq"), "--rounding"),
        (("--inputs", "quantized"), "takes codes that are chosen by calibration"),
    ):
        assert message in str(run(*options).exception)
