"""Linears fitted on their inputs behind quantized layers, against whole models in plain torch; on one process or two,
whole or resumed, and together with the refinement of blocks."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPTQConfig

from quailora.calibration.data import Calibration
from quailora.calibration.gram import Gram
from quailora.calibration.inputs import InputPair
from quailora.errors import AdapterError, CalibrationError, QuailoraError
from quailora.pipeline.depth import Depth
from quailora.pipeline.quantize import CalibratedQ, Initialized
from quailora.pipeline.resume import Workspace
from quailora.reporting.model_card import model_card
from quailora.reporting.report import Report
from tests.helpers import tiny
from tests.helpers.children import Child
from tests.integration.test_pipeline import build, four_bits

DATA = Calibration(tiny.sequences(40, seed=5), "random tokens")
INT3 = GPTQConfig(bits=3, group_size=32, sym=True, desc_act=False)
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("inputs") / "model")


def make(folder: Path, output: Path, **options: Any) -> Report:
    defaults = {"quantization": INT3, "base_output": Path(f"{output} base"), "inputs": "quantized", "batch_size": 8}
    return build(folder, output, **{"data": DATA} | defaults | options)


Fit = tuple[dict[str, Tensor], Tensor, dict[str, Initialized]]  # targets, H, what was found


def fits(folder: Path, output: Path, **options: Any) -> list[Fit]:
    """What the quantizer and the solver were given and found, in order."""
    found: list[Fit] = []
    run = CalibratedQ.__call__

    def spy(self: CalibratedQ, weights: Mapping[str, Tensor], ranks: Any, gram: Gram, **rest: Any) -> Any:
        given = {name: weight.clone() for name, weight in weights.items()}, gram.matrix().clone()
        found.append((*given, run(self, weights, ranks, gram, **rest)))
        return found[-1][2]

    with mock.patch.object(CalibratedQ, "__call__", spy):
        make(folder, output, **options)
    return found


def inputs(model: nn.Module, data: Calibration = DATA) -> dict[str, Tensor]:
    """All tokens that each linear receives, (t, n)."""
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        module.register_forward_pre_hook(lambda module, args, name=name: seen.setdefault(name, []).append(args[0][0]))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        for sequence in data.sequences:
            model(input_ids=sequence[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(tokens) for name, tokens in seen.items()}


def deploy(model: nn.Module, found: Mapping[str, Initialized]) -> None:
    for name, each in found.items():
        assert each.factors is not None
        model.get_parameter(f"{name}.weight").data = each.quantized.dequantize() + each.factors.A @ each.factors.B.T


def test_targets_and_h_are_those_of_whole_models(folder: Path, tmp_path: Path) -> None:
    """Group by group, in the order in which they run, with all before them quantized."""
    data = Calibration(DATA.sequences[:12], "random tokens")
    # NF4 computes in fp32 here; a base in GPTQ's format rounds inputs to fp16.
    found = fits(folder, tmp_path / "out", data=data, quantization=four_bits(), rounding="calibrated")
    full, quantized = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    names = [tuple(name.rpartition(".")[2] for name in targets) for targets, _, _ in found]
    assert names == [ATTENTION, ("o_proj",), MLP, ("down_proj",)] * 2
    of_full = inputs(full, data)
    for targets, h, each in found:
        x, x_hat = of_full[next(iter(targets))], inputs(quantized, data)[next(iter(targets))]
        expected_h = x_hat.T @ x_hat
        assert (h - expected_h).norm() < 1e-5 * expected_h.norm()
        damped = expected_h + 0.1 * expected_h.diagonal().mean() * torch.eye(len(h))
        change = 0.5 * (x - x_hat).T @ x_hat @ damped.inverse()
        for name, target in targets.items():
            w = full.get_parameter(f"{name}.weight").data
            assert (target - (w + w @ change)).norm() <= 1e-3 * (w @ change).norm() + 1e-6 * w.norm(), name
        deploy(quantized, each)


@pytest.mark.slow
def test_the_quantized_model_is_closer_to_the_full_one(folder: Path, tmp_path: Path) -> None:
    """‖W X - (Q + A Bᵀ) X̂‖ is smaller than with inputs of the full-precision model, on the calibration tokens."""
    full = AutoModelForCausalLM.from_pretrained(folder)
    errors: dict[str, list[float]] = {}
    for kind in ("full", "quantized"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        for _, _, each in fits(folder, tmp_path / kind, inputs=kind):
            deploy(model, each)
        both = [inputs(of) for of in (full, model)]
        for name in Report.load(tmp_path / kind).record["base"]["digests"]:
            wanted, given = (
                of[name] @ each.get_parameter(f"{name}.weight").T for of, each in zip(both, (full, model), strict=True)
            )
            errors.setdefault(name, []).append(((given - wanted).norm() / wanted.norm()).item())
    first = [f"model.layers.0.self_attn.{name}" for name in ATTENTION]
    for name, (before, after) in errors.items():
        assert after == before if name in first else after < 0.95 * before, name


def test_all_records_say_so(folder: Path, tmp_path: Path) -> None:
    report = make(folder, tmp_path / "out")
    assert report.record["base"]["rounding_settings"]["inputs"] == "quantized"
    assert all(layer.quantized_inputs for layer in report.layers)
    assert "x are inputs behind quantized layers" in report.to_markdown() and "inputs quantized" in report.to_markdown()
    assert "X are the inputs behind quantized layers" in (tmp_path / "out" / "README.md").read_text()
    assert Report.load(tmp_path / "out").layers == report.layers
    plain = replace(report, layers=[replace(layer, quantized_inputs=False) for layer in report.layers])
    assert "behind quantized layers" not in plain.to_markdown() + model_card(plain.record, plain)


def test_nearest_rounding_has_no_use_for_them(folder: Path, tmp_path: Path) -> None:
    said = r"inputs='quantized' \(--inputs quantized\) takes codes that are chosen by calibration"
    for options in ({"quantization": four_bits(), "base_output": None}, {"rounding": "nearest"}):
        with pytest.raises(AdapterError, match=said):
            make(folder, tmp_path / "out", **options)
    with pytest.raises(AdapterError, match=r"inputs='other' \(--inputs\): it is 'full' or 'quantized'"):
        make(folder, tmp_path / "out", inputs="other")


# ---- linears that are left on full inputs


def test_inputs_that_cannot_be_paired_are_those_of_the_full_model(folder: Path, tmp_path: Path) -> None:
    """As if gate_proj and up_proj were experts. The others are fitted behind them."""
    groups = Depth.groups

    def some(*args: Any, **kwargs: Any) -> list[list[str]]:
        return [names for names in groups(*args, **kwargs) if "gate_proj" not in names[0]]

    full = AutoModelForCausalLM.from_pretrained(folder)
    with mock.patch.object(Depth, "groups", some):
        found = fits(folder, tmp_path / "out")
    assert [len(targets) for targets, _, _ in found] == [2, 3, 1, 1] * 2
    of_full = inputs(full)
    for targets, h, _ in (found[0], found[4]):
        x = of_full[next(iter(targets))]
        assert (h - x.T @ x).norm() < 1e-4 * h.norm()
        assert all(torch.equal(target, full.get_parameter(f"{name}.weight")) for name, target in targets.items())
    report = Report.load(tmp_path / "out")
    assert [layer.name for layer in report.layers if not layer.quantized_inputs] == [
        f"model.layers.{index}.mlp.{name}" for index in range(2) for name in MLP
    ]
    said = "4 linears (model.layers.0.mlp.gate_proj for one) had to be fitted on inputs in the full-precision model"
    assert any(note.startswith(said) for note in report.notes)


@pytest.mark.parametrize("reached", ["with fewer rows", "in the quantized model only", "twice"])
def test_a_batch_that_does_not_pair_up_is_an_error(reached: str, folder: Path, tmp_path: Path) -> None:
    """An expert that got every token of the batch that was looked at, and not of another."""
    calls = iter(range(1000))

    def routed(mlp: Any, x: Tensor) -> Tensor:
        inner = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        if reached == "with fewer rows":
            mlp.down_proj(inner[:, :3])
        elif next(calls) % 2 == 0 or reached == "twice":
            mlp.down_proj(inner)
        return x if reached != "twice" else x + mlp.down_proj(inner)

    with (
        mock.patch.object(Depth, "groups", lambda *args, **kwargs: [["model.layers.0.mlp.down_proj"]]),
        mock.patch("quailora.pipeline.loop.Loop._on_full", lambda *args, **kwargs: []),
        mock.patch("transformers.models.llama.modeling_llama.LlamaMLP.forward", routed),
        pytest.raises(CalibrationError, match=r"down_proj receives .* take inputs='full' \(--inputs full\)"),
    ):
        make(folder, tmp_path / "out")


def test_the_same_command_would_not_pair_up_either(folder: Path, tmp_path: Path) -> None:
    compare = Depth.compare

    def fails(run: Any, linears: Any, name: str, *args: Any, **kwargs: Any) -> InputPair:
        if name.startswith("model.layers.1."):
            raise CalibrationError("planted")
        return compare(run, linears, name, *args, **kwargs)

    kept = r"^planted; the factors of 1 block are kept in .*, but the same command would fail again"
    with mock.patch.object(Depth, "compare", fails), pytest.raises(CalibrationError, match=kept):
        make(folder, tmp_path / "kept" / "out", data=Calibration(DATA.sequences[:8], "random tokens"), alternations=0)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_experts_of_a_mixture(family: str, tmp_path: Path) -> None:
    report = make(tiny.checkpoint(tmp_path / "model", family), tmp_path / "out")
    assert report.layers and report.error_left < 1 and all(layer.quantized_inputs for layer in report.layers)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "gemma3_text", "opt"])
def test_nf4_of_other_families(family: str, tmp_path: Path) -> None:
    checkpoint = tiny.checkpoint(tmp_path / "model", family)
    report = make(checkpoint, tmp_path / "out", quantization=four_bits(), rounding="calibrated")
    assert report.error_left < 1 and all(layer.quantized_inputs for layer in report.layers)


# ---- interrupted, shared, short of memory


class Stop(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("refine", [None, "blocks"])
def test_a_resumed_run_ends_with_the_same_bits(refine: str | None, folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"base_output": tmp_path / "base", "refine": refine}
    whole = make(folder, tmp_path / "whole", **options)
    assert len(whole.blocks) == (2 if refine else 0)
    (tmp_path / "base").rename(tmp_path / "first base")
    save = Workspace.save_block

    def save_block(self: Workspace, index: int, *args: Any) -> None:
        if index == 1:
            raise Stop
        save(self, index, *args)

    with mock.patch.object(Workspace, "save_block", save_block), pytest.raises(Stop):
        make(folder, tmp_path / "out", **options)
    with pytest.raises(QuailoraError, match=r'settings\.inputs was "quantized" and is "full"'):
        make(folder, tmp_path / "out", **options, inputs="full")
    make(folder, tmp_path / "out", **options)
    for one, other in (("whole/adapter_model", "out/adapter_model"), ("first base/model", "base/model")):
        assert [path.read_bytes() for path in sorted(tmp_path.glob(f"{one}*.safetensors"))] == [
            path.read_bytes() for path in sorted(tmp_path.glob(f"{other}*.safetensors"))
        ]


Sums = list[tuple[Tensor, Tensor]]


@contextmanager
def sums() -> Iterator[Sums]:
    """H and D of every input, as targets are made of them."""
    found: Sums = []
    targets = InputPair.targets

    def spy(self: InputPair, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found.append((self.gram.matrix().clone(), self.difference.clone()))
        return targets(self, weights)

    with mock.patch.object(InputPair, "targets", spy):
        yield found


def member(rank: int, place: Path, folder: Path, output: Path) -> tuple[Report, list[Any]]:
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
    with sums() as found:
        report = make(folder, output, batch_size=4, solver="eigh", distributed=True)
    return report, [[each.tolist() for each in pair] for pair in found]  # a tensor is gone with its process


@pytest.mark.slow
def test_two_processes_make_what_one_does(folder: Path, tmp_path: Path) -> None:
    with sums() as of_one:
        alone = make(folder, tmp_path / "alone", solver="eigh")
    children = [Child(member, rank, tmp_path / "group", folder, tmp_path / "out") for rank in range(2)]
    (report, of_both), (other, _) = (child.result() for child in children)
    assert report.layers == other.layers
    # Of o_proj. Further on, a code that falls the other way moves what follows.
    assert of_one[0][1].norm() == 0
    for of_ranks, whole in zip(of_both[1], of_one[1], strict=True):
        assert (torch.tensor(of_ranks) - whole).norm() < 0.02 * whole.norm()
    for ours, layer in zip(report.layers, alone.layers, strict=True):
        assert (ours.name, ours.tokens, ours.quantized_inputs) == (layer.name, layer.tokens, True)
        assert ours.output_error_after == pytest.approx(layer.output_error_after, rel=0.1)


@pytest.mark.slow
def test_out_of_memory_halves_the_micro_batches(folder: Path, tmp_path: Path) -> None:
    """On the way to a group, and nothing is counted twice."""
    whole = make(folder, tmp_path / "whole", batch_size=None)
    forward, planted = Depth.compare, iter(range(1000))

    def fails_once(run: Any, *args: Any, **kwargs: Any) -> Any:
        found = forward(run, *args, **kwargs | ({"propagate": False} if len(run.batches) == 1 else {}))
        if len(run.batches) == 1 and next(planted) < 10:
            raise torch.OutOfMemoryError("planted")
        return found

    with mock.patch.object(Depth, "compare", fails_once):
        report = make(folder, tmp_path / "out", batch_size=None)
    assert any("ran out of memory" in note for note in report.notes)
    for ours, layer in zip(report.layers, whole.layers, strict=True):
        assert ours.tokens == layer.tokens
        assert ours.output_error_after == pytest.approx(layer.output_error_after, rel=0.1)


@pytest.fixture(autouse=True)
def nothing_left_behind(tmp_path: Path) -> Iterator[None]:
    yield
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
