"""Several processes on gloo make what one makes; a process that fails ends all of them, with its message."""

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor
from transformers import BitsAndBytesConfig

import quailora
from quailora.calibration import distributed
from quailora.calibration.calls import Call
from quailora.calibration.data import Calibration
from quailora.calibration.distributed import Processes, _united
from quailora.calibration.gram import Gram
from quailora.errors import QuailoraError
from quailora.pipeline import quantize
from quailora.pipeline.resume import Workspace
from quailora.reporting.report import Report
from tests.helpers import tiny
from tests.helpers.children import Child

DATA = Calibration(tiny.sequences(), "random tokens")  # 10 samples: not a multiple of 3


def together(rank: int, size: int, place: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=size)


def build(
    model: Path, output: Path, data: Calibration = DATA, distributed: bool = False, batch_size: int | None = 2
) -> Report:
    return quailora.build_adapter(
        model,
        LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
        data,
        output,
        quantization=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
        solver="eigh",  # in fp64: fp32 moves a product by 1e-3 where H moves by 3e-7
        batch_size=batch_size,
        distributed=distributed,
        progress=False,
    )


def member(rank: int, size: int, place: Path, model: Path, output: Path, data: Calibration) -> Report:
    together(rank, size, place)
    return build(model, output, data, distributed=True)


def products(output: Path) -> dict[str, Tensor]:
    tensors = load_file(output / "adapter_model.safetensors")
    return {
        name: tensors[name.replace("lora_A", "lora_B")].double() @ tensor.double()
        for name, tensor in tensors.items()
        if "lora_A" in name
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("distributed") / "model", num_hidden_layers=3)


@pytest.mark.parametrize(
    "size, data",
    [(2, DATA), (3, DATA), (3, Calibration(DATA.sequences[:2], "fewer samples than processes"))],
    ids=["two", "three, uneven", "three, one with nothing"],
)
def test_they_make_what_one_makes(size: int, data: Calibration, model: Path, tmp_path: Path) -> None:
    alone = build(model, tmp_path / "alone", data)
    children = [Child(member, rank, size, tmp_path / "group", model, tmp_path / "out", data) for rank in range(size)]
    reports = [child.result() for child in children]
    assert [row.name for row in reports[0].layers] == [row.name for row in alone.layers]
    for ours, row in zip(reports[0].layers, alone.layers, strict=True):
        assert ours.tokens == row.tokens
        assert ours.output_error == pytest.approx(row.output_error, rel=1e-5)
        assert ours.output_error_after == pytest.approx(row.output_error_after, rel=1e-5)
    assert all(report.layers == reports[0].layers for report in reports)
    expected = products(tmp_path / "alone")
    errors = [
        float((p - expected[name]).norm() / expected[name].norm()) for name, p in products(tmp_path / "out").items()
    ]
    assert len(errors) == len(expected) == 21
    assert sum(errors) / len(errors) < 1e-4
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "group") == ["alone", "out"]


# ---- failures


def failing(rank: int, place: Path, model: Path, output: Path, how: str) -> None:
    """The second process fails in its second block."""
    together(rank, 2, place)
    solves = itertools.count()
    solve_group = quantize.solve_group

    def solve(*args: Any, **kwargs: Any) -> Any:
        if rank == 1 and next(solves) == 3:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise QuailoraError("the second process met something")
        return solve_group(*args, **kwargs)

    quantize.solve_group = solve
    build(model, output, distributed=True)


@pytest.mark.parametrize("how", ["killed", "raises"])
def test_a_process_that_goes_ends_the_others_at_once(how: str, model: Path, tmp_path: Path) -> None:
    first, second = (Child(failing, rank, tmp_path / "group", model, tmp_path / "out", how) for rank in range(2))
    with pytest.raises(EOFError if how == "killed" else QuailoraError, match=None if how == "killed" else "met some"):
        second.result()
    start = time.monotonic()
    with pytest.raises(QuailoraError, match="another process of this run has ended"):
        first.result()
    assert time.monotonic() - start < 20  # a hang would be hours; a start of a process is seconds
    assert not (tmp_path / "out").exists()
    Child(alone_again, model, tmp_path / "out").result()


def short_of_memory(rank: int, place: Path, model: Path, output: Path, out_of_memory: bool, stop_at: int) -> None:
    """The second process may run out of memory in its second block; the first stops at a block, if there is such."""
    together(rank, 2, place)
    run, save = Call.run, Workspace.save_block

    def planted(self: Call, block: Any, hidden: Tensor) -> Tensor:
        if rank == 1 and out_of_memory and block.self_attn.layer_idx == 1 and len(hidden) > 2:
            raise torch.OutOfMemoryError("planted")
        return run(self, block, hidden)

    def save_block(self: Workspace, index: int, *args: Any) -> None:
        if index == stop_at:
            raise QuailoraError("stopped")
        save(self, index, *args)

    Call.run, Workspace.save_block = planted, save_block  # type: ignore[method-assign]
    build(model, output, distributed=True, batch_size=None)


def test_a_resumed_run_halves_the_batches_of_the_process_that_ran_out_of_memory(model: Path, tmp_path: Path) -> None:
    never, runs = 99, itertools.count()

    def run(output: str, out_of_memory: bool, stop_at: int) -> list[Child]:
        place = tmp_path / f"group{next(runs)}"
        return [
            Child(short_of_memory, rank, place, model, tmp_path / output, out_of_memory, stop_at) for rank in range(2)
        ]

    for child in run("whole", True, never):
        child.result()
    for child, words in zip(run("out", True, 2), ("stopped", "another process"), strict=True):
        with pytest.raises(QuailoraError, match=words):
            child.result()
    for child in run("out", False, never):
        child.result()
    whole, resumed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def alone_again(model: Path, output: Path) -> None:
    """What was finished by two is not what one would go on with."""
    if list(output.parent.glob(".out.quailora/block-*")):
        with pytest.raises(QuailoraError, match="processes was 2 and is 1"):
            build(model, output)


@pytest.mark.slow
def test_torchrun_runs_the_command(model: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("".join(f'{{"input_ids": {s.tolist()}}}\n' for s in DATA.sequences))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    init = ["-m", "quailora", "init", model, "--data", tmp_path / "data.jsonl", "--rank", "4", "--output"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [*torchrun, *init, tmp_path / "out"], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("linear layers initialized") == 1, "one process speaks"
    assert Report.load(tmp_path / "out").record["calibration"]["samples"] == len(DATA)

    again = subprocess.run(
        [*torchrun, *init, tmp_path / "out"], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert again.returncode != 0
    assert re.search(r"error \(process \d\): the output folder .* is not empty", again.stderr)


# ---- the parts


@pytest.mark.parametrize("missing", [None, "RANK", "LOCAL_RANK", "MASTER_ADDR", "WORLD_SIZE"])
def test_a_world_size_alone_is_not_a_distributed_run(missing: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1"), ("MASTER_ADDR", "here")):
        monkeypatch.delenv(name, raising=False) if name == missing else monkeypatch.setenv(name, value)
    assert (distributed.launched_by_torchrun(), distributed.rank()) == ((True, 1) if missing is None else (False, 0))


def test_without_a_group_distributed_is_refused() -> None:
    with pytest.raises(QuailoraError, match="there is no process group: start the processes with torchrun"):
        Processes(distributed=True)


def test_work_is_dealt_evenly_and_alike() -> None:
    processes = Processes()
    processes.size = 3
    owners = processes.assign({"down": 4.0, "gate": 4.0, "up": 4.0, "q": 2.0, "o": 2.0, "k": 1.0, "v": 1.0})
    load = [
        sum(
            cost
            for name, cost in (("down", 4), ("gate", 4), ("up", 4), ("q", 2), ("o", 2), ("k", 1), ("v", 1))
            if owners[name] == rank
        )
        for rank in range(3)
    ]
    assert sorted(load) == [6, 6, 6]
    assert owners == processes.assign({"v": 1.0, "k": 1.0, "o": 2.0, "q": 2.0, "up": 4.0, "gate": 4.0, "down": 4.0})


def test_linears_that_shared_an_input_on_any_rank_share_it_on_all() -> None:
    """An expert that no token of a rank reached is missing there."""
    first, second = [(["a", "b"], 64), (["d"], 32)], [(["b", "c"], 64)]
    assert _united([first, second]) == [(["a", "b", "c"], 64), (["d"], 32)]


def test_grams_of_ranks_add_up() -> None:
    x = torch.randn(20, 8)
    whole, parts = Gram(8), [Gram(8), Gram(8)]
    whole.update(x)
    for part, rows in zip(parts, x.split(13), strict=True):
        part.update(rows)
    sums = iter([parts[1]._h, torch.tensor(7)])
    parts[0].reduce(lambda tensor: tensor.add_(next(sums)))
    assert parts[0].tokens == 20
    torch.testing.assert_close(parts[0].matrix(), whole.matrix(), rtol=1e-6, atol=1e-6)
