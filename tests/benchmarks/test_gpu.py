"""benchmarks/gpu.py as far as it goes without a GPU: its limits and what it keeps; and all steps, in tiny sizes."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks import gpu


def test_a_command_is_stopped_with_all_that_it_started() -> None:
    status, printed = gpu.run(["sh", "-c", "sleep 60 & echo $!; wait"], 1)
    assert status == "stopped after 1 s"
    started = int(printed)
    time.sleep(0.1)
    assert not psutil.pid_exists(started) or psutil.Process(started).status() == psutil.STATUS_ZOMBIE


def test_how_a_command_ended() -> None:
    code = "import sys; print('out'); print('err', file=sys.stderr, flush=True); sys.exit(3)"
    assert gpu.run([sys.executable, "-u", "-c", code], 60) == ("failed (3)", "out\nerr\n")


def test_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """After each step; the others go on after one that fails, and stop with the time."""
    output, limits, now = tmp_path / "found.json", [], 0.0
    endings = {"kernels": ("failed (1)", "compiling\n2 of 9 cases | are wrong\n", 100), "H": ("done", "", 370)}

    def run(command: list[str], limit: float) -> tuple[str, str]:
        nonlocal now
        step, result = command[command.index("--step") + 1], Path(command[command.index("--json") + 1])
        assert command[1] == "-P" and command[-1] == "--dry-run"
        if step != "kernels":
            assert json.loads(output.read_text())["steps"]["kernels"]["status"] == "failed (1)"
            result.write_text(json.dumps({"ours, TFLOP/s": 123.456, "backend": "triton"}))
        limits.append(limit)
        *ending, seconds = endings.get(step, ("done", "", 9.5))
        now += seconds
        return ending[0], ending[1]

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu, "perf_counter", lambda: now)
    monkeypatch.setattr(gpu, "DRY", replace(gpu.DRY, slack=1))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry-run", "--json", str(output)])
    with pytest.raises(SystemExit):
        gpu.main()
    assert limits == [120, 60, 10]
    record: dict[str, Any] = json.loads(output.read_text())
    assert record["torch"] and record["device"]
    statuses = {name: step["status"] for name, step in record["steps"].items()}
    assert statuses == {
        "kernels": "failed (1)", "H": "done", "solve": "done", "build": "no time left", "tests": "no time left",
    }  # fmt: skip
    lines = gpu.table(record).splitlines()
    assert lines[2] == "| **kernels** | failed (1), 100 s | 2 of 9 cases / are wrong |"
    assert lines[3:6] == ["| **H** | done, 370 s |  |", "| | ours, TFLOP/s | 123 |", "| | backend | triton |"]
    assert gpu.table(record) in capsys.readouterr().out


def test_all_steps_fit_the_time_if_none_hangs_twice() -> None:
    """Any one may take all of its limit, and the first ones all of theirs."""
    limits = [limit for _, limit in gpu.STEPS.values()]
    assert sum(limits[:-1]) < 8 * 60


@pytest.mark.slow
@pytest.mark.parametrize("step", gpu.STEPS)
def test_a_step_in_tiny_sizes(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry-run", "--only", step, "--json", str(output)])
    gpu.main()
    [found] = json.loads(output.read_text())["steps"].values()
    assert found["status"] == "done", found["printed"]
    assert FIGURES[step] <= found["figures"].keys(), found["figures"]


FIGURES = {
    "kernels": {"sound", "grouped_error_product by", "gram_ by"},
    "H": {"bfloat16, n = 48: ours, TFLOP/s of the triangle", "float32, n = 64: error", "copy, GB/s"},
    "solve": {"q, k, v: whole, ms", "down: launches", "the block: balancing, ms", "not run: fused"},
    "build": {"largest difference to the CPU", "measured, GiB", "solve, s"},
    "tests": {"pytest"},
}
