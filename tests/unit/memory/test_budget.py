"""Amounts of memory, what is free, and the settings of a budget."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from quailora.errors import QuailoraError
from quailora.memory import budget
from quailora.memory.budget import MemoryConfig, Meter, describe_bytes, free_memory, parse_bytes

CPU = torch.device("cpu")
GB, MIB, GIB = 10**9, 2**20, 2**30

AMOUNTS = {
    "12GiB": 12 * GIB, "1 KiB": 1024, "3MiB": 3 * MIB, "2TiB": 2**41,
    "12GB": 12 * GB, "1kb": 1000, "3 mb": 3 * 10**6, "2TB": 2 * 10**12,
    "4096": 4096, " 7 B ": 7, "1.5GiB": 3 * GIB // 2, 4095: 4095,
}  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), AMOUNTS.items())
def test_parse_bytes(text: str | int, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "12 gigs", "-1GiB", "1e9", "0", "0.0001KiB", "12GiBB", "1,5GiB", "nan"])
def test_no_amount(text: str) -> None:
    with pytest.raises(QuailoraError, match="amount of memory"):
        parse_bytes(text)


@pytest.mark.parametrize("size", [1, 1023, 5 * MIB, 123456789, 12 * GIB, 999 * GIB, 2**44])
def test_describe_bytes(size: int) -> None:
    text = describe_bytes(size)
    assert parse_bytes(text) == pytest.approx(size, rel=5e-3)
    assert len(text) <= 9


def test_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MIB < free_memory(CPU) < 2**50
    # A control group with less than the machine has: its limit less what is in use, but for pages of files.
    for name, text in (("max", 300 * MIB), ("current", 200 * MIB), ("stat", f"anon 1\ninactive_file {50 * MIB}\n")):
        (tmp_path / f"memory.{name}").write_text(str(text))
    assert list(budget._left_in_groups(tmp_path)) == [150 * MIB]
    (tmp_path / "memory.max").write_text("max\n")
    assert list(budget._left_in_groups(tmp_path)) == []
    monkeypatch.setattr(budget, "_left_in_groups", lambda root: [150 * MIB])
    assert free_memory(CPU) == 150 * MIB


def test_config() -> None:
    assert MemoryConfig() == MemoryConfig(None, None, None)
    config = MemoryConfig("1GiB", "2 GB", 3)
    assert (config.device_bytes, config.host_bytes, config.batch_size) == (GIB, 2 * GB, 3)
    for name, wrong in (("memory_budget", "much"), ("host_memory_budget", 0)):
        with pytest.raises(QuailoraError, match=rf"^{name} \(--{name.replace('_', '-')}\) '{wrong}' is not an amount"):
            MemoryConfig(**{name: wrong})  # type: ignore[arg-type]
    with pytest.raises(QuailoraError, match=r"--batch-size\) must be at least 1, got 0"):
        MemoryConfig(batch_size=0)


@pytest.mark.parametrize(
    ("named", "planned", "tight"), [("1GiB", 600 * MIB, True), ("1GiB", 500 * MIB, False), (None, 2**60, False)]
)
def test_the_heap_is_trimmed_where_a_named_budget_is_tight(
    named: str | None, planned: int, tight: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trimmed: list[bool] = []
    monkeypatch.setattr(budget, "return_freed_memory", lambda: trimmed.append(True))
    meter = Meter(CPU, MemoryConfig(named))
    meter.expect(planned)
    with meter:
        meter.trim()
    assert bool(trimmed) == tight


@pytest.mark.parametrize(("named", "limited"), [("1GiB", True), (None, False)])
def test_skeletons_leave_no_gaps_in_the_heap_where_a_budget_is_named(
    named: str | None, limited: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered: list[bool] = []

    @contextmanager
    def spy() -> Iterator[None]:
        entered.append(True)
        yield

    monkeypatch.setattr(budget, "freed_at_once", spy)
    with Meter(CPU, MemoryConfig(named)).setting_up():
        assert bool(entered) == limited


@pytest.mark.skipif(not budget.reset_peak(), reason="the peak cannot be set back here")
def test_the_peak_is_that_of_the_run_not_of_the_process() -> None:
    torch.ones(64 * MIB)  # 256 MiB, freed at once
    with Meter(CPU, MemoryConfig()) as meter:
        torch.ones(16 * MIB)
    assert 60 * MIB < meter.figures(0)["measured peak"] < 128 * MIB


def test_a_peak_that_is_not_known_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "reset_peak", lambda: False)
    with Meter(CPU, MemoryConfig()) as meter:
        pass
    assert list(meter.figures(0)) == ["budget", "planned peak"]
