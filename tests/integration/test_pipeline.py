"""From checkpoint to adapter: the result is an ordinary PEFT adapter, right for every LoRA setting."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

import quailora
import quailora.pipeline.build
import quailora.pipeline.initialize
import quailora.pipeline.loop
from quailora import ops
from quailora.adapters.targets import find_targets
from quailora.calibration.data import Calibration
from quailora.errors import MismatchError, QuailoraError
from quailora.memory import allocator as heap
from quailora.memory.budget import Meter
from quailora.memory.planner import Plan
from quailora.modeling.checkpoint import Checkpoint
from quailora.modeling.streamed_model import StreamedModel
from quailora.ops.dispatch import Service
from quailora.ops.precision import exact_products
from quailora.pipeline.setup import Run
from quailora.quantization.registry import is_quantized, read
from quailora.reporting.report import Report
from tests.helpers import tiny

DATA = Calibration(tiny.sequences(), "random tokens")


def four_bits(kind: str = "nf4", double: bool = True, compute: torch.dtype = torch.float32) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=compute,
    )


QUANTIZATIONS = {
    "nf4-double": four_bits(),
    "nf4-bf16": four_bits(compute=torch.bfloat16),
    "fp4": four_bits("fp4", double=False),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | changes)


def build(
    folder: Path, output: Path, config: LoraConfig | None = None, data: Calibration = DATA, **options: Any
) -> Report:
    options = {"quantization": four_bits(), "progress": False} | options
    return quailora.build_adapter(folder, config or lora(), data, output, **options)


def load_base(folder: Path, quantization: BitsAndBytesConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=quantization, device_map="cpu")


@torch.no_grad()
def products(model: PeftModel, adapter: str = "default") -> dict[str, Tensor]:
    """scaling * B A of every adapted linear, in fp64."""
    return {
        name: (layer.lora_B[adapter].weight.double() @ layer.lora_A[adapter].weight.double()) * layer.scaling[adapter]
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, LoraLayer) and adapter in layer.lora_A
    }


def dense_twin(folder: Path, model: PeftModel, dtype: torch.dtype) -> PreTrainedModel:
    """The plain model with Q + scaling B A for weights, computed here and not by PEFT or bitsandbytes."""
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    added = products(model)
    for name, module in model.get_base_model().named_modules():
        base = module.get_base_layer() if isinstance(module, LoraLayer) else module
        if is_quantized(base) and not name.endswith("base_layer"):
            weight = read(base).dequantize().double() + added.get(name, 0)
            twin.get_parameter(f"{name}.weight").data = weight.to(dtype)
    return twin


def logits(model: nn.Module, seed: int = 1) -> Tensor:
    """In training mode, without dropout: where bitsandbytes on a CPU multiplies with Q itself."""
    model.train()
    with torch.no_grad():
        out: Tensor = model(input_ids=torch.stack([s[:8] for s in tiny.sequences(seed=seed)]), use_cache=False).logits
    return out.float()


@pytest.mark.parametrize("kind", [kind for kind in QUANTIZATIONS if kind != "int8"])
def test_loaded_the_ordinary_way_it_computes_q_plus_the_product(kind: str, tmp_path: Path) -> None:
    folder, quantization = tiny.checkpoint(tmp_path / "model"), QUANTIZATIONS[kind]
    build(folder, tmp_path / "adapter", quantization=quantization)
    model = PeftModel.from_pretrained(load_base(folder, quantization), str(tmp_path / "adapter"))
    got, expected = logits(model), logits(dense_twin(folder, model, torch.float32))
    # fp32: sums in another order. bf16 compute: inputs of the base's products are rounded to 8 bits, layer by layer.
    tolerance = 2e-2 if kind == "nf4-bf16" else 1e-5
    assert (got - expected).norm() < tolerance * expected.norm()


def test_in_eight_bits_the_weights_are_q_plus_the_product(tmp_path: Path) -> None:
    """LLM.int8 also quantizes activations, so weights are compared: what is left of E by hand equals the report's."""
    folder = tiny.checkpoint(tmp_path / "model")
    report = build(folder, tmp_path / "adapter", quantization=QUANTIZATIONS["int8"])
    model = PeftModel.from_pretrained(load_base(folder, QUANTIZATIONS["int8"]), str(tmp_path / "adapter"))
    full, twin = AutoModelForCausalLM.from_pretrained(folder), dense_twin(folder, model, torch.float32)
    for layer in report.layers:
        left = full.get_parameter(f"{layer.name}.weight") - twin.get_parameter(f"{layer.name}.weight")
        # The dense twin's weights are rounded to fp32: 6e-8 of weights some 100 times E.
        assert left.norm().item() == pytest.approx(layer.weight_error_after, rel=1e-3)
        assert layer.weight_error_after < layer.weight_error


def test_it_loads_in_a_fresh_process_without_quailora(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    build(folder, tmp_path / "adapter")
    script = f"""
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
base = AutoModelForCausalLM.from_pretrained({str(folder)!r}, quantization_config=config, device_map="cpu")
model = PeftModel.from_pretrained(base, {str(tmp_path / "adapter")!r}, is_trainable=True).train()
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(2, 20)[None]).logits, {str(tmp_path / "logits.pt")!r})
assert not any(name.startswith("quailora") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, capture_output=True)
    model = PeftModel.from_pretrained(load_base(folder, four_bits()), str(tmp_path / "adapter")).train()
    with torch.no_grad():
        here = model(input_ids=torch.arange(2, 20)[None]).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt"), here)


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_alpha": 1},
        {"lora_alpha": 64},
        {"use_rslora": True},
        {"use_rslora": True, "lora_alpha": 3},
        {"alpha_pattern": {"q_proj": 40, "down_proj": 2}},
        {"init_lora_weights": "gaussian"},
        {"lora_dropout": 0.1},
    ],
    ids=str,
)
def test_the_product_does_not_depend_on_how_peft_scales_it(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    found = []
    for number, config in enumerate((lora(), lora(**changes))):
        build(folder, tmp_path / str(number), config)
        found.append(PeftModel.from_pretrained(load_base(folder, four_bits()), str(tmp_path / str(number))))
    plain, scaled = map(products, found)
    assert plain.keys() == scaled.keys()
    for name, product in plain.items():
        assert torch.allclose(product, scaled[name], rtol=1e-5, atol=1e-6 * float(product.abs().max()))


def test_ranks_follow_the_pattern_and_more_rank_leaves_less(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    config = lora(r=4, rank_pattern={r"layers\.1\..*": 16, "k_proj": 32})
    ranked = {layer.name: layer for layer in build(folder, tmp_path / "ranked", config).layers}
    plain = {layer.name: layer for layer in build(folder, tmp_path / "plain", lora(r=4)).layers}
    assert {layer.rank for name, layer in ranked.items() if "layers.1" in name and "k_proj" not in name} == {16}
    assert ranked["model.layers.0.self_attn.k_proj"].rank == 32
    assert ranked["model.layers.0.self_attn.q_proj"].rank == 4
    for name, layer in ranked.items():
        if layer.rank > 4:
            assert layer.output_error_after < plain[name].output_error_after


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, {"q_proj", "v_proj"}),
        ({"target_modules": r".*\.mlp\.(gate|up)_proj"}, {"gate_proj", "up_proj"}),
        ({"target_modules": "all-linear", "exclude_modules": ["o_proj", "down_proj"]}, None),
    ],
    ids=["names", "regular expression", "exclude_modules"],
)
def test_targets_are_what_peft_says(changes: dict[str, Any], expected: set[str] | None, tmp_path: Path) -> None:
    report = build(tiny.checkpoint(tmp_path / "model"), tmp_path / "adapter", lora(**changes))
    kinds = {layer.name.rpartition(".")[2] for layer in report.layers}
    assert kinds == (expected or {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"})


def test_only_the_layers_asked_for_are_transformed(tmp_path: Path) -> None:
    config = lora(target_modules=["q_proj"], layers_to_transform=[0])
    report = build(tiny.checkpoint(tmp_path / "model"), tmp_path / "adapter", config)
    assert [layer.name for layer in report.layers] == ["model.layers.0.self_attn.q_proj"]


def test_modules_to_save_come_from_the_checkpoint(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model", tie_word_embeddings=False)
    build(folder, tmp_path / "adapter", lora(modules_to_save=["lm_head"]))
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    assert torch.equal(saved, load_file(folder / "model.safetensors")["lm_head.weight"])


def test_what_the_base_keeps_in_full_precision_starts_at_the_lora_default_and_is_named(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model", tie_word_embeddings=False)
    config = lora(target_modules=["q_proj", "lm_head", "embed_tokens"])
    report = build(folder, tmp_path / "adapter", config)
    assert set(report.left) == {"lm_head", "model.embed_tokens"}
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    head = {name: value for name, value in weights.items() if "lm_head" in name}
    assert head["base_model.model.lm_head.lora_A.weight"].abs().sum() > 0
    assert head["base_model.model.lm_head.lora_B.weight"].abs().sum() == 0
    PeftModel.from_pretrained(load_base(folder, four_bits()), str(tmp_path / "adapter"))


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_initialize_in_place_equals_build_adapter(kind: str, tmp_path: Path) -> None:
    folder, quantization = tiny.checkpoint(tmp_path / "model", dtype=torch.bfloat16), QUANTIZATIONS[kind]
    built = build(folder, tmp_path / "adapter", quantization=quantization)
    expected = products(
        PeftModel.from_pretrained(load_base(folder, quantization, torch.bfloat16), str(tmp_path / "adapter"))
    )
    model = get_peft_model(load_base(folder, quantization, torch.bfloat16), lora())
    report = quailora.initialize(model, DATA, checkpoint=folder, progress=False)
    for name, product in products(model).items():
        assert torch.equal(product, expected[name])
    assert [replace(row, seconds=0) for row in report.layers] == [replace(row, seconds=0) for row in built.layers]
    assert report.record["base"] == built.record["base"]


def test_initialize_over_a_base_that_was_saved_quantized(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    quantization = four_bits(compute=torch.bfloat16)
    load_base(folder, quantization, torch.bfloat16).save_pretrained(tmp_path / "quantized")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", device_map="cpu")
    model = get_peft_model(base, lora())
    quailora.initialize(model, DATA, checkpoint=folder, progress=False)
    build(folder, tmp_path / "adapter", quantization=quantization)
    expected = products(
        PeftModel.from_pretrained(load_base(folder, quantization, torch.bfloat16), str(tmp_path / "adapter"))
    )
    for name, product in products(model).items():
        assert torch.equal(product, expected[name])


def test_initialize_names_what_it_leaves_and_the_saved_report_tells_the_base(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model", tie_word_embeddings=False)
    model = get_peft_model(load_base(folder, four_bits()), lora(target_modules=["q_proj", "lm_head"]))
    before = model.get_base_model().lm_head.lora_A["default"].weight.clone()
    report = quailora.initialize(model, DATA, checkpoint=folder, progress=False)
    assert list(report.left) == ["lm_head"]
    assert torch.equal(model.get_base_model().lm_head.lora_A["default"].weight, before)
    model.save_pretrained(tmp_path / "adapter")
    report.save(tmp_path / "adapter")
    assert Report.load(tmp_path / "adapter").record["base"]["quantization"]["method"] == "nf4"


def test_the_same_run_gives_the_same_bits(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    for number in range(2):
        build(folder, tmp_path / str(number))
    for name in ("adapter_model.safetensors", "adapter_config.json", "quailora.json"):
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "1" / name).read_bytes(), name
    written = json.loads((tmp_path / "0" / "adapter_config.json").read_text())["target_modules"]
    assert written == sorted(written)


def test_padding_never_enters(tmp_path: Path) -> None:
    """One batch of unequal lengths, padded, against one sequence at a time."""
    folder = tiny.checkpoint(tmp_path / "model", "gemma2")
    together = build(folder, tmp_path / "together", batch_size=10)
    alone = build(folder, tmp_path / "alone", batch_size=1)
    for one, other in zip(together.layers, alone.layers, strict=True):
        assert one.tokens == other.tokens == DATA.tokens
        # fp32 sums in another order, carried through two blocks.
        assert one.output_error_after == pytest.approx(other.output_error_after, rel=1e-4)


def test_a_dead_channel_and_fewer_tokens_than_inputs_are_no_problem(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.input_layernorm.weight"][3] = 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    few = Calibration((tiny.sequences()[0][:6],), "six tokens")
    for solver in ("krylov", "als", "eigh", "svd"):
        report = quailora.build_adapter(
            folder, lora(r=16), few, tmp_path / solver, quantization=four_bits(), solver=solver, progress=False
        )
        assert all(row.output_error_after <= row.output_error * (1 + 1e-6) for row in report.layers)


def test_a_relative_of_the_base_is_refused_and_the_model_left_as_it_was(tmp_path: Path) -> None:
    """A fine-tune: weights 2 % away, of which 4 bits keep most codes but not nearly all."""
    folder, related = tiny.checkpoint(tmp_path / "model"), tiny.model()
    generator = torch.Generator().manual_seed(1)
    for parameter in related.parameters():
        parameter.data += 0.02 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    related.save_pretrained(tmp_path / "related")
    model = get_peft_model(load_base(folder, four_bits()), lora())
    before = {name: value.clone() for name, value in model.state_dict().items() if "lora_" in name}
    with pytest.raises(MismatchError, match="is not the quantized weight of"):
        quailora.initialize(model, DATA, checkpoint=tmp_path / "related", progress=False)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_pairs_with_nothing_to_approximate_can_still_learn(tmp_path: Path) -> None:
    """At zero on both sides a pair has no gradient: it starts as LoRA's own do."""
    model = get_peft_model(load_base(tiny.checkpoint(tmp_path / "model"), four_bits()), lora(r=4))
    target = find_targets(model)[0][0]
    weight = torch.outer(torch.ones(target.base.out_features), torch.ones(target.base.in_features))
    factors = quailora.solve(weight, torch.zeros_like(weight), torch.eye(weight.shape[1]), 4)
    assert factors.effective_rank == 1
    target.assign(factors)
    down, up = target.layer.lora_A["default"].weight, target.layer.lora_B["default"].weight
    assert (up[:, 1:] == 0).all()
    assert (down[1:].abs().amax(1) > 0).all()
    assert torch.allclose(products(model)[target.name], weight.double(), atol=1e-5)


def test_the_configuration_that_was_given_is_left_alone(tmp_path: Path) -> None:
    config = lora()
    before = config.to_dict()
    build(tiny.checkpoint(tmp_path / "model"), tmp_path / "adapter", config)
    assert config.to_dict() == before


def test_by_default_sequences_are_as_long_as_the_model_has_positions(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model", "gpt2")
    stream = torch.randint(2, tiny.VOCABULARY, (200,), generator=torch.Generator().manual_seed(0))
    report = quailora.build_adapter(folder, lora(), stream, tmp_path / "adapter", samples=2, progress=False)
    assert report.record["calibration"]["sequence_length"] == 64


@pytest.mark.parametrize(
    "where", [(quailora.pipeline.quantize, "solve_group"), (StreamedModel, "_load")], ids=["solve", "load"]
)
def test_out_of_memory_says_what_to_lower(
    where: tuple[Any, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(*where, full)
    with pytest.raises(QuailoraError, match="batch_size"):
        build(tiny.checkpoint(tmp_path / "model"), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_the_callers_precision_settings_neither_reach_h_and_e_nor_get_lost(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    build(folder, tmp_path / "plain")
    try:
        torch.set_float32_matmul_precision("medium")  # bf16 products on a CPU that has them, TF32 on a GPU
        with exact_products(torch.device("cpu")):
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == "medium"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            build(folder, tmp_path / "autocast")
    finally:
        torch.set_float32_matmul_precision("highest")
    plain, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "autocast"))
    # The forward pass of the blocks is the caller's to make less precise; what is added up from it is not.
    assert all((plain[name] - other[name]).norm() < 0.05 * plain[name].norm() for name in plain)


def test_at_most_one_block_is_in_memory_and_neither_model_is_ever_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    load = StreamedModel._load

    def spy(stream: StreamedModel, names: list[str]) -> None:
        load(stream, names)
        blocks = sum(any(not p.is_meta for p in block.module.parameters()) for block in stream.blocks)
        outside = sum(not p.is_meta for p in dict(stream.model.named_parameters()).values()) > 0 and blocks == 0
        seen.append((blocks, int(outside)))

    monkeypatch.setattr(StreamedModel, "_load", spy)
    build(tiny.checkpoint(tmp_path / "model", num_hidden_layers=5), tmp_path / "adapter")
    # The embeddings, then block 0 beside them (to see what a block returns), then every block by itself.
    assert seen == [(0, 1), (1, 0), *[(1, 0)] * 5]


def test_the_revision_of_the_base_goes_into_the_adapters_configuration(tmp_path: Path) -> None:
    build(Checkpoint(tiny.checkpoint(tmp_path / "model"), revision="v1"), tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["revision"] == "v1"


@pytest.mark.parametrize("built", [False, True])
def test_the_report_says_where_h_took_the_slow_path(
    built: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, gram = ops.backends, Service("extension" if built else "reference", {"extension": "it was not built"})
    monkeypatch.setattr(ops, "backends", lambda device: real(device) | {"gram_": gram})
    report = build(tiny.checkpoint(tmp_path / "model"), tmp_path / "adapter")
    said = [note for note in report.notes if "plain PyTorch" in note and note.endswith("it was not built")]
    assert len(said) == (0 if built else 1)


def test_the_report_says_where_the_data_is_little_or_was_passed_over(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    enough = Calibration(tiny.sequences(40, longest=60), "much")  # 128 inputs at most
    assert enough.tokens > 8 * 128
    assert [note for note in build(folder, tmp_path / "much", data=enough).notes if "tokens" in note] == []
    little = Calibration(enough.sequences[:15], "little", empty=3)
    assert 8 * 64 < little.tokens < 8 * 128
    report = build(folder, tmp_path / "little", data=little)
    few, passed = (next(note for note in report.notes if words in note) for words in ("fewer than 8", "passed over"))
    name = "model.layers.0.mlp.down_proj"  # one a block
    assert few.startswith(
        f"2 linears saw fewer than 8 tokens for each of their inputs ({name}: {little.tokens} tokens, "
    )
    assert passed == "passed over 3 records of little without tokens"


USES_HEAP = """
from quailora.memory.allocator import _glibc, freed_at_once
with freed_at_once():
    print(_glibc() is not None)
"""


@pytest.mark.slow
@pytest.mark.skipif(heap._glibc() is None, reason="malloc is not that of glibc")
@pytest.mark.parametrize("malloc", ["glibc's", "without mapped pages", "another"])
def test_whatever_malloc_is_there_is_borne(malloc: str, tmp_path: Path) -> None:
    environment = dict(os.environ)
    if malloc == "without mapped pages":
        environment["MALLOC_MMAP_MAX_"] = "0"
    elif malloc == "another":  # with nothing before its chunks that could be read
        if (compiler := shutil.which("cc")) is None:
            pytest.skip("there is no C compiler")
        (tmp_path / "other.c").write_text(OTHER_MALLOC)
        other = tmp_path / "other.so"
        subprocess.run([compiler, "-shared", "-fPIC", "-o", other, tmp_path / "other.c"], check=True)
        environment["LD_PRELOAD"] = str(other)
    command = [sys.executable, "-P", "-c", USES_HEAP]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == str(malloc != "another")


OTHER_MALLOC = """
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
/* A page of its own for each chunk, its size at the start. */
void *malloc(size_t n) {
    size_t *p = mmap(0, n + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return 0;
    p[0] = n;
    return (char *)p + 64;
}
void free(void *p) { if (p) munmap((char *)p - 64, ((size_t *)((char *)p - 64))[0] + 4096); }
void *calloc(size_t a, size_t b) { return malloc(a * b); }
void *realloc(void *p, size_t n) {
    void *q = malloc(n);
    if (p && q) {
        size_t old = ((size_t *)((char *)p - 64))[0];
        memcpy(q, p, old < n ? old : n);
        free(p);
    }
    return q;
}
"""


@pytest.mark.parametrize("made_by", ["build_adapter", "initialize"])
def test_skeletons_are_made_while_the_heap_is_kept_from_gaps(
    made_by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of their parameters is on the CPU for a moment, so many blocks would leave many gaps."""
    within: list[bool] = [False]
    seen: list[bool] = []

    @contextmanager
    def setting_up(self: Meter) -> Iterator[None]:
        within[0] = True
        yield
        within[0] = False

    def spy(owner: Any, name: str) -> None:
        make = getattr(owner, name)

        def run(*args: Any, **options: Any) -> Any:
            seen.append(within[0])
            return make(*args, **options)

        monkeypatch.setattr(owner, name, run)

    folder = tiny.checkpoint(tmp_path / "model")
    monkeypatch.setattr(Meter, "setting_up", setting_up)
    if made_by == "build_adapter":
        spy(quailora.pipeline.build, "StreamedModel")
        spy(quailora.pipeline.build, "targeted_skeleton")
        build(folder, tmp_path / "adapter")
        assert seen == [True] * 2
    else:
        spy(quailora.pipeline.initialize, "StreamedModel")
        model = get_peft_model(load_base(folder, four_bits()), lora())
        quailora.initialize(model, DATA, checkpoint=folder, progress=False)
        assert seen == [True]


SHARING = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


@pytest.mark.parametrize("change", ["states", "prefetch", "passes", "all of it"])
def test_whatever_the_plan_the_bits_are_the_same(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a thing is, and when it is read, changes no sum."""
    folder = tiny.checkpoint(tmp_path / "model", num_hidden_layers=3)
    build(folder, tmp_path / "plain", batch_size=2)
    plan_of = Run.plan

    def other_plan(self: Run, *args: Any, **options: Any) -> Plan:
        plan = plan_of(self, *args, **options)
        assert (plan.states, plan.prefetch, [len(turns) for turns in plan.passes]) == ("host", True, [1] * 3)
        in_turn = tuple(
            tuple(tuple(n for n in names if n.endswith(one)) for one in SHARING) for (names,) in plan.passes
        )
        changes: dict[str, Any] = {"states": "disk", "prefetch": False, "passes": in_turn}
        return replace(plan, **(changes if change == "all of it" else {change: changes[change]}))

    monkeypatch.setattr(Run, "plan", other_plan)
    build(folder, tmp_path / "changed", batch_size=2)
    plain, changed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "changed"))
    assert plain.keys() == changed.keys() and all(torch.equal(changed[name], plain[name]) for name in plain)
