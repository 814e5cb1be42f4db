"""What a run shows while it goes on."""

import re
from collections.abc import Iterator

import pytest

from quailora.reporting import progress as module
from quailora.reporting.progress import Progress
from quailora.reporting.report import LayerReport


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(module, "perf_counter", clock)
    yield clock


def layer(name: str, before: float = 2.0, after: float = 1.0) -> LayerReport:
    return LayerReport(name, 32, 64, 8, 400, 3.0, 2.5, before, after, 0.0, 0.25)


def run(progress: Progress, blocks: int, clock: Clock, seconds: float, forward: int = 0) -> None:
    """`blocks` blocks of `seconds` each; the first `forward` of them, which are finished, take a second."""
    with progress:
        for index in progress.blocks(range(blocks)):
            clock.now += 1 if index < forward else seconds
            if index >= forward:
                progress.layer(layer(f"layers.{index}.q_proj"))


def test_without_a_terminal_lines_say_how_far_it_is(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    run(Progress(estimate=3700.0), 4, clock, seconds=900)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "QuAILoRA: 4 blocks to initialize, about 1 h 02 min",
        "QuAILoRA: 1 of 4 blocks, 15 min 00 s so far, about 45 min left, output error left 50.0%",
        "QuAILoRA: 2 of 4 blocks, 30 min 00 s so far, about 30 min left, output error left 50.0%",
        "QuAILoRA: 3 of 4 blocks, 45 min 00 s so far, about 15 min left, output error left 50.0%",
        "QuAILoRA: 4 of 4 blocks, 1 h 00 min so far, output error left 50.0%",
    ]


def test_many_quick_blocks_give_few_lines_and_slow_ones_one_every_ten_minutes(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    run(Progress(), 200, clock, seconds=1)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 22  # the announcement, the first block, and every tenth
    assert lines[1].startswith("QuAILoRA: 1 of 200 blocks, 1.0 s so far, about 3 min left")
    run(Progress(), 200, clock, seconds=300)
    assert len(capsys.readouterr().err.splitlines()) == 102  # every second


def test_after_a_resume_finished_blocks_and_their_layers_count(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    done = [layer(f"layers.{index}.q_proj", after=0.5) for index in range(2)]
    progress = Progress(finished=[0, 1], layers=done, estimate=400.0)
    run(progress, 4, clock, seconds=100, forward=2)
    assert capsys.readouterr().err.splitlines() == [
        "QuAILoRA: 2 of 4 blocks are done, about 3 min for the others",
        "QuAILoRA: 3 of 4 blocks, 1 min 42 s so far, about 2 min left, output error left 31.5%",  # (1/32)^(1/3)
        "QuAILoRA: 4 of 4 blocks, 3 min 22 s so far, output error left 35.4%",
    ]
    [task] = progress._bar.tasks
    assert (task.completed, task.total) == (4, 4)


def test_the_bar_begins_at_the_finished_blocks() -> None:
    progress = Progress(enabled=False, finished=[0, 1], layers=[layer("q_proj")])
    seen = []
    for _ in progress.blocks(range(4)):
        seen.append((progress._bar.tasks[0].completed, progress._bar.tasks[0].fields["error"]))
    assert seen == [(2, "output error left 50.0%")] * 3 + [(3, "output error left 50.0%")]


def test_with_every_block_finished_there_is_nothing_to_wait_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(Progress(finished=range(3), layers=[layer("q_proj")], estimate=9.0).blocks(range(0))) == []
    assert capsys.readouterr().err == "QuAILoRA: 3 of 3 blocks are done\n"


def test_nothing_is_shown_when_disabled(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    run(Progress(enabled=False, estimate=9.0), 3, clock, seconds=1)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "200")
    run(Progress(), 3, clock, seconds=1)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    assert "QuAILoRA: 3 blocks to initialize" in text
    assert "3/3 blocks" in text and "output error left 50.0%" in text
    assert "so far" not in text
