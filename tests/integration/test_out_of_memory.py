"""A device that runs out of memory: the run goes on with smaller micro-batches where nothing has changed yet."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor

import quailora
from quailora.calibration.calls import Call
from quailora.calibration.hidden_states import HiddenStates
from quailora.errors import QuailoraError
from quailora.memory.planner import Plan
from quailora.pipeline.setup import Run
from quailora.reporting.report import Report
from tests.helpers import tiny

LORA = LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
DATA = tiny.sequences(10)
FITS = 3  # sequences


@pytest.fixture
def out_of_memory(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Blocks run out of memory with more than FITS sequences; the list has the sizes that did."""
    sizes: list[int] = []
    run = Call.run

    def planted(self: Call, block: Any, hidden: Tensor) -> Tensor:
        out = run(self, block, hidden)
        if len(hidden) > FITS:
            sizes.append(len(hidden))
            raise torch.OutOfMemoryError("planted")
        return out

    monkeypatch.setattr(Call, "run", planted)
    return sizes


def build(folder: Path, output: Path, **options: Any) -> Report:
    return quailora.build_adapter(folder, LORA, DATA, output, progress=False, **options)


@pytest.mark.parametrize(("family", "states"), [("llama", "host"), ("llama", "disk"), ("bloom", "host")])
def test_the_run_goes_on_with_smaller_batches(
    family: str, states: str, out_of_memory: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.checkpoint(tmp_path / "model", family)
    plan_of = Run.plan

    def other_plan(self: Run, *args: Any, **options: Any) -> Plan:
        in_turn = [tuple((name,) for (names,) in [passes] for name in names) for passes in plan_of(self, None).passes]
        return replace(plan_of(self, *args, **options), states=states, passes=tuple(in_turn))

    build(folder, tmp_path / "plain", batch_size=FITS)
    assert not out_of_memory
    if states == "disk":
        monkeypatch.setattr(Run, "plan", other_plan)
    report = build(folder, tmp_path / "smaller")
    assert out_of_memory == [10, 5]  # then halves of 3 and 2
    notes = [note for note in report.notes if "out of memory" in note]
    assert notes == [
        "cpu ran out of memory with the planned micro-batches of 10 sequences: from block 0 on they had 3. "
        "A lower memory_budget (--memory-budget) avoids this"
    ]
    plain, smaller = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "smaller"))
    for name, tensor in plain.items():
        if name.endswith("lora_A.weight"):
            other = name.replace("lora_A", "lora_B")
            product, expected = smaller[other] @ smaller[name], plain[other] @ tensor
            assert (product - expected).norm() < 1e-3 * expected.norm(), name


def test_a_batch_size_that_was_asked_for_is_kept(out_of_memory: list[int], tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    with pytest.raises(QuailoraError, match=r"cpu is out of memory: .*--batch-size 1.* planted"):
        build(folder, tmp_path / "adapter", batch_size=4)
    assert out_of_memory == [4]


def test_no_step_is_repeated_once_hidden_states_have_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    monkeypatch.setattr("quailora.memory.planner.TOKENS_PER_BATCH", 4 * max(map(len, DATA)))
    run, calls = Call.run, []

    def planted(self: Call, block: Any, hidden: Tensor) -> Tensor:
        calls.append(len(hidden))
        if len(calls) == 2:  # the second batch of the first block
            raise torch.OutOfMemoryError("planted")
        return run(self, block, hidden)

    monkeypatch.setattr(Call, "run", planted)
    with pytest.raises(QuailoraError, match="cpu is out of memory"):
        build(folder, tmp_path / "adapter")
    assert calls == [4, 4]


@pytest.mark.parametrize("on_disk", [False, True])
def test_hidden_states_in_halves(on_disk: bool, tmp_path: Path) -> None:
    batches = [torch.randn(rows, 2, 3) for rows in (5, 1, 2)]
    with HiddenStates(torch.device("cpu"), tmp_path if on_disk else None) as states:
        for number, batch in enumerate(batches):
            states[number] = batch
        states.halve()
        halves = [half for batch in batches for half in batch.split((len(batch) + 1) // 2)]
        assert [len(half) for half in halves] == [3, 2, 1, 1, 1]
        assert all(torch.equal(states[number], half) for number, half in enumerate(halves))
        states[1] = states[1] + 1
        assert torch.equal(states[1], halves[1] + 1) and torch.equal(states[2], halves[2])
