"""Blocks refined within a run: what the report says is what the loaded model does, on one process or two, whole or
resumed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPTQConfig

import quailora
from quailora.calibration.data import Calibration
from quailora.calibration.hidden_states import HiddenStates
from quailora.errors import CalibrationError
from quailora.pipeline import resume
from quailora.refinement import blocks
from quailora.reporting.report import Report
from tests.helpers import tiny
from tests.helpers.children import Child
from tests.integration.test_pipeline import build, four_bits, load_base, lora, products

DATA = Calibration(tiny.sequences(80, seed=5), "random tokens")  # of fewer, nothing helps on those held out
REFINE: dict[str, Any] = {"refine": "blocks", "refine_steps": 24, "batch_size": 2, "data": DATA}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("refinement") / "model")


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of about 64 tokens, where 2048 would be all of the data."""
    monkeypatch.setattr(blocks.RefinementConfig, "__init__", _small(blocks.RefinementConfig.__init__))


def _small(init: Any) -> Any:
    return lambda self, *args, **settings: init(self, *args, **{"tokens": 64, "every": 6, "rate": 1e-3} | settings)


def outputs(model: nn.Module, names: list[str], sequence: Tensor) -> list[Tensor]:
    """Of each block, for one sequence."""
    seen: list[Tensor] = []
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        for name in names
    ]
    with torch.no_grad():
        model.train()  # in eval mode bitsandbytes may take a CPU kernel that rounds otherwise
        model(input_ids=sequence[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return [hidden[0] for hidden in seen]


def test_the_report_has_the_errors_of_the_loaded_model(folder: Path, tmp_path: Path) -> None:
    """Block by block, on the held-out sequences: full precision against base and adapter, as users load them."""
    plain = build(folder, tmp_path / "plain", data=DATA)
    report = build(folder, tmp_path / "out", **REFINE)
    assert [block.name for block in report.blocks] == ["model.layers.0", "model.layers.1"]
    assert all(block.steps > 0 and block.error_after < 0.995 * block.error for block in report.blocks)
    assert plain.blocks == [] and "refined" not in plain.to_markdown()
    assert report.record["refinement"] | {"level": "blocks", "steps": 24} == report.record["refinement"]
    assert "2 blocks refined" in str(report.summary()) and "## Blocks, refined" in report.to_markdown()
    assert Report.load(tmp_path / "out").blocks == report.blocks

    names = [block.name for block in report.blocks]
    full = AutoModelForCausalLM.from_pretrained(folder)
    loaded = PeftModel.from_pretrained(load_base(folder, four_bits()), str(tmp_path / "out"))
    ordered = sorted(DATA.sequences, key=len, reverse=True)
    step = 2 * max(1, -(-(64 // len(ordered[0])) // 2))  # sequences
    steps = [ordered[i : i + step] for i in range(0, len(ordered), step)]
    every = min(16, len(steps))
    held_out = [sequence for i in range(len(steps)) if i % every == every // 2 for sequence in steps[i]]
    errors: list[list[Tensor]] = [[], []]
    for sequence in held_out:
        pairs = zip(outputs(full, names, sequence), outputs(loaded.get_base_model(), names, sequence), strict=True)
        for found, (target, output) in zip(errors, pairs, strict=True):
            found.append((output - target).square().sum(-1) / target.square().sum(-1))
    for block, found in zip(report.blocks, errors, strict=True):
        assert block.tokens == sum(map(len, held_out))
        assert torch.cat(found).mean().sqrt().item() == pytest.approx(block.error_after, rel=1e-3), block.name


def test_a_loaded_model_gets_the_same_factors(folder: Path, tmp_path: Path) -> None:
    build(folder, tmp_path / "out", **REFINE)
    expected = PeftModel.from_pretrained(load_base(folder, four_bits()), str(tmp_path / "out"))
    model = get_peft_model(load_base(folder, four_bits()), lora())
    report = initialize(model, folder)
    assert len(report.blocks) == 2 and report.record["refinement"]["steps"] == 24
    for name, product in products(expected).items():
        torch.testing.assert_close(products(model)[name], product, rtol=1e-4, atol=1e-6)


def initialize(model: PeftModel, folder: Path) -> Report:
    options = {name: value for name, value in REFINE.items() if name != "data"}
    return quailora.initialize(model, DATA, checkpoint=folder, progress=False, **options)


@pytest.mark.slow
def test_linears_without_an_adapter_are_run_quantized(folder: Path, tmp_path: Path) -> None:
    """The second block meets what comes out of all the first one's quantized linears."""
    refined = build(folder, tmp_path / "out", lora(target_modules=["q_proj", "down_proj"]), **REFINE)
    seen: list[list[str]] = []
    run = blocks.refine_block

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(sorted(args[2]))
        return run(*args, **kwargs)

    model = get_peft_model(load_base(folder, four_bits()), lora(target_modules=["q_proj", "down_proj"]))
    with mock.patch("quailora.pipeline.depth.refine_block", spy):
        report = initialize(model, folder)
    assert [len(names) for names in seen] == [7, 7] and len(report.layers) == 4
    for ours, block in zip(report.blocks, refined.blocks, strict=True):
        assert ours.error == pytest.approx(block.error, rel=1e-4)
    assert set(refined.record["base"]["digests"]) >= {"model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"}


# ---- interrupted, shared, failing


class Stop(Exception):
    pass


def stopped_then_resumed(folder: Path, output: Path, **options: Any) -> Report:
    """A run that dies with one block finished, and the one that goes on."""
    save = resume.Workspace.save_block

    def save_block(self: resume.Workspace, index: int, *args: Any) -> None:
        if index == 1:
            raise Stop
        save(self, index, *args)

    with mock.patch.object(resume.Workspace, "save_block", save_block), pytest.raises(Stop):
        build(folder, output, **options)
    return build(folder, output, **options)


@pytest.mark.parametrize("base", ["found", pytest.param("written", marks=pytest.mark.slow)])
def test_a_resumed_run_ends_with_the_same_bits(base: str, folder: Path, tmp_path: Path) -> None:
    def options(name: str) -> dict[str, Any]:
        written = {"quantization": GPTQConfig(bits=3, group_size=32, desc_act=False), "base_output": tmp_path / name}
        return REFINE | {"refine_steps": 6} | (written if base == "written" else {})

    whole = build(folder, tmp_path / "whole", **options("base"))
    if base == "written":
        (tmp_path / "base").rename(tmp_path / "first base")
    resumed = stopped_then_resumed(folder, tmp_path / "out", **options("base"))
    one, other = (tmp_path / name / "adapter_model.safetensors" for name in ("whole", "out"))
    assert one.read_bytes() == other.read_bytes()
    drop = lambda rows: [(row.name, row.error, row.error_after, row.steps) for row in rows]  # noqa: E731
    assert drop(resumed.blocks) == drop(whole.blocks)


def member(rank: int, place: Path, folder: Path, output: Path) -> Report:
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
    blocks.RefinementConfig.__init__ = _small(blocks.RefinementConfig.__init__)  # type: ignore[method-assign]
    return build(folder, output, **REFINE | {"batch_size": 1, "solver": "eigh"}, distributed=True)


@pytest.mark.slow
def test_two_processes_refine_as_one_does(folder: Path, tmp_path: Path) -> None:
    alone = build(folder, tmp_path / "alone", **REFINE, solver="eigh")
    children = [Child(member, rank, tmp_path / "group", folder, tmp_path / "out") for rank in range(2)]
    reports = [child.result() for child in children]
    assert reports[0].blocks == reports[1].blocks
    for ours, block in zip(reports[0].blocks, alone.blocks, strict=True):
        assert (ours.tokens, ours.steps) == (block.tokens, block.steps)
        assert ours.error == pytest.approx(block.error, rel=1e-3)
        assert ours.error_after == pytest.approx(block.error_after, rel=1e-3)


def test_a_loss_that_is_not_finite_is_noted_with_its_block(folder: Path, tmp_path: Path) -> None:
    gradients, calls = blocks._Block.gradients, iter(range(1000))

    def planted(*args: Any) -> float:
        return float("nan") if next(calls) == 0 else gradients(*args)

    with mock.patch.object(blocks._Block, "gradients", planted):
        report = build(folder, tmp_path / "out", **REFINE)
    said = "model.layers.0: the loss was not finite in step 1, and its factors are those found layer by layer"
    assert said in report.notes
    assert [block.steps > 0 for block in report.blocks] == [False, True]


def test_out_of_memory_in_a_step_halves_the_micro_batches(folder: Path, tmp_path: Path) -> None:
    """A step then has twice as many of them."""
    whole = build(folder, tmp_path / "whole", **REFINE | {"batch_size": None})
    squares = blocks._Block._squares

    def planted(self: blocks._Block, number: int) -> Any:
        if len(self.run.batches[number].input_ids) > 1:
            raise torch.OutOfMemoryError("planted")
        return squares(self, number)

    with mock.patch.object(blocks._Block, "_squares", planted):
        report = build(folder, tmp_path / "out", **REFINE | {"batch_size": None})
    assert any("ran out of memory" in note for note in report.notes)
    for ours, block in zip(report.blocks, whole.blocks, strict=True):
        assert ours.error_after == pytest.approx(block.error_after, rel=1e-3)


@pytest.mark.slow
def test_hidden_states_of_both_streams_may_be_on_disk(folder: Path, tmp_path: Path) -> None:
    opened: list[Path | None] = []
    init = HiddenStates.__init__

    def spy(self: HiddenStates, device: torch.device, place: Path | None = None, on_device: bool = False) -> None:
        opened.append(place)
        init(self, device, place, on_device)

    def on_disk(*args: Any, **kwargs: Any) -> Any:
        return plan(*args, **kwargs).__class__(**vars(plan(*args, **kwargs)) | {"states": "disk"})

    plan = quailora.pipeline.setup.make_plan  # type: ignore[attr-defined]
    build(folder, tmp_path / "memory", **REFINE)
    with (
        mock.patch("quailora.pipeline.setup.make_plan", on_disk),
        mock.patch.object(HiddenStates, "__init__", spy),
    ):
        build(folder, tmp_path / "disk", **REFINE)
    assert opened == [tmp_path, tmp_path]
    one, other = (tmp_path / name / "adapter_model.safetensors" for name in ("memory", "disk"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("sequences", [1])
def test_too_little_data_to_hold_some_out(sequences: int, folder: Path, tmp_path: Path) -> None:
    data = Calibration(DATA.sequences[:sequences], "little")
    with pytest.raises(
        CalibrationError,
        match=r"refine \(--refine\) .* at least 2 sequences: little has 1; give more data, raise samples",
    ):
        build(folder, tmp_path / "out", **REFINE | {"data": data})


@pytest.fixture(autouse=True)
def nothing_left_behind(tmp_path: Path) -> Iterator[None]:
    yield
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
