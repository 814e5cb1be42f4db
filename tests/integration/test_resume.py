"""A run that dies, at whatever moment, goes on where it was and ends with the adapter of one that was left alone."""

import errno
import itertools
import json
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from peft import LoraConfig
from safetensors import SafetensorError
from transformers import BitsAndBytesConfig

import quailora
from quailora import files
from quailora.adapters import save_and_load
from quailora.calibration import block, calls, hooks
from quailora.calibration.data import Calibration
from quailora.calibration.gram import Gram
from quailora.errors import QuailoraError
from quailora.pipeline import build as pipeline
from quailora.pipeline import outputs, quantize, resume
from quailora.reporting.report import Report
from tests.helpers import tiny
from tests.helpers.children import Child

BLOCKS = 4
DATA = Calibration(tiny.sequences(), "random tokens")


def build(model: Path, output: Path, **changes: Any) -> Report:
    lora = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | changes.pop("lora", {}))
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    options = {"quantization": quantization, "progress": False, "batch_size": 2} | changes
    return quailora.build_adapter(model, lora, options.pop("data", DATA), output, **options)


def build_quietly(model: Path, output: Path) -> None:
    build(model, output)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("resume") / "model", num_hidden_layers=BLOCKS)


@pytest.fixture(scope="module")
def undisturbed(model: Path) -> bytes:
    """The adapter's tensors, from a process like those that are killed."""
    Child(build_quietly, model, model.parent / "undisturbed").result()
    return weights(model.parent / "undisturbed")


def weights(output: Path) -> bytes:
    return (output / "adapter_model.safetensors").read_bytes()


def work(output: Path) -> Path:
    return output.parent / f".{output.name}.quailora"


def finished(output: Path) -> list[str]:
    return sorted(path.name for path in work(output).glob("block-*"))


# ---- killed


def test_killed_at_every_step_of_writing(model: Path, undisturbed: bytes, tmp_path: Path) -> None:
    """The first process dies at its first change of the disk, the next one at its second, and so on to the end."""
    deaths, output = 0, tmp_path / "out"
    for step in itertools.count():
        child = Child(build_until, step, model, output)
        try:
            child.result()
            break
        except EOFError:
            deaths += 1
            assert not output.exists() or weights(output) == undisturbed, "an output is whole or not there"
            if output.exists():
                break
    assert deaths > 3 * BLOCKS
    assert weights(output) == undisturbed


def build_until(step: int, model: Path, output: Path) -> None:
    """Dies before the step-th change of the disk that it would make; of a file of tensors it has written a half."""
    count = itertools.count()

    def deadly(function: Callable[..., Any], half: Callable[..., None] | None = None) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(count) == step:
                if half:
                    half(*args)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    def cut(tensors: Any, path: Path, **kwargs: Any) -> None:
        Path(path).write_bytes(b"half of a file")

    with (
        mock.patch.object(resume, "save_file", deadly(resume.save_file, cut)),
        mock.patch.object(os, "replace", deadly(os.replace)),
        mock.patch.object(os, "fsync", deadly(os.fsync)),
        mock.patch.object(resume.shutil, "rmtree", deadly(resume.shutil.rmtree)),
    ):
        build(model, output)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_random_moments(seed: int, model: Path, undisturbed: bytes, tmp_path: Path) -> None:
    """Two moments in the quick suite, twenty with the slow one."""
    chance, kills, runs = random.Random(seed), 0, 0
    while kills < (18 if seed else 2):
        runs += 1
        assert runs < 200, "a run is over before it can be killed"
        output = tmp_path / f"out{runs}"
        child = Child(build_quietly, model, output)
        deadline = time.monotonic() + 60
        while not work(output).exists() and child.process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.4))
        killed = child.process.is_alive()
        child.kill()
        finished = output.exists()
        if killed and not finished:
            kills += 1
            Child(build_quietly, model, output).result()
        assert weights(output) == undisturbed
        # A run killed when its output is in place has nothing left to do but to remove its working folder.
        assert not work(output).exists() or (killed and finished)


# ---- what is done again, and what is not


class Stop(Exception):
    pass


@contextmanager
def stopping_after(blocks: int, error: BaseException) -> Iterator[None]:
    """Within it `error` is raised where the results of one block more would be kept."""
    save, count = resume.Workspace.save_block, itertools.count()

    def save_block(self: resume.Workspace, *args: Any) -> None:
        if next(count) == blocks:
            raise error
        save(self, *args)

    with mock.patch.object(resume.Workspace, "save_block", save_block):
        yield


def test_neither_h_nor_factors_of_finished_blocks_are_computed_again(model: Path, tmp_path: Path) -> None:
    with stopping_after(2, Stop()), pytest.raises(Stop):
        build(model, tmp_path / "out")
    assert finished(tmp_path / "out") == ["block-0000.safetensors", "block-0001.safetensors"]
    solved: list[str] = []

    def solve(linears: Any, *args: Any, **kwargs: Any) -> Any:
        solved.extend(linear.name for linear in linears)
        return solve_group(linears, *args, **kwargs)

    solve_group = quantize.solve_group
    updates = mock.Mock(wraps=Gram.update)
    with (
        mock.patch.object(quantize, "solve_group", solve),
        mock.patch.object(Gram, "update", lambda self, *args: updates(self, *args)),
    ):
        report = build(model, tmp_path / "out")
    assert {name.split(".")[2] for name in solved} == {"2", "3"}
    assert updates.call_count == 2 * 4 * len(DATA) / 2  # blocks, distinct inputs, batches
    assert len(report.layers) == 7 * BLOCKS
    assert any(note.startswith("2 blocks were solved by an earlier run") for note in report.notes)


def test_a_resumed_run_shows_the_share_that_its_report_has(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with stopping_after(2, Stop()), pytest.raises(Stop):
        build(model, tmp_path / "out", progress=True)
    first = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"QuAILoRA: 4 blocks to initialize, about \d+ s", first[0])
    report = build(model, tmp_path / "out", progress=True)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and len(lines) == 3
    assert lines[0].startswith("QuAILoRA: 2 of 4 blocks are done, about ")
    assert lines[1].startswith("QuAILoRA: 3 of 4 blocks, ")
    assert lines[2].startswith("QuAILoRA: 4 of 4 blocks, ")
    assert lines[2].endswith(f"output error left {report.error_left:.1%}")


def test_with_every_block_finished_only_the_adapter_is_written(model: Path, undisturbed: bytes, tmp_path: Path) -> None:
    with mock.patch.object(outputs, "model_card", side_effect=Stop), pytest.raises(Stop):
        build(model, tmp_path / "out")
    with mock.patch.object(calls.Call, "run", side_effect=AssertionError("a block is run")):
        assert len(build(model, tmp_path / "out").layers) == 7 * BLOCKS


def test_the_batch_size_stays_what_it_was_where_the_memory_is_another(model: Path, tmp_path: Path) -> None:
    """It decides the order of sums, so bits."""
    with stopping_after(1, Stop()), pytest.raises(Stop):
        build(model, tmp_path / "out", batch_size=None)
    chosen = json.loads((work(tmp_path / "out") / "run.json").read_text())["chosen"]
    with mock.patch.object(pipeline.Run, "plan", autospec=True) as plan:
        plan.side_effect = Stop
        with pytest.raises(Stop):
            build(model, tmp_path / "out", batch_size=None)
    assert plan.call_args.args[-1] == chosen["batch_size"]


@contextmanager
def out_of_memory_in(block_number: int, sequences: int) -> Iterator[None]:
    """Within it a block runs out of memory with more than this many sequences."""
    run = calls.Call.run

    def planted(self: calls.Call, block: Any, hidden: torch.Tensor) -> torch.Tensor:
        if block.self_attn.layer_idx == block_number and len(hidden) > sequences:
            raise torch.OutOfMemoryError("planted")
        return run(self, block, hidden)

    with mock.patch.object(calls.Call, "run", planted):
        yield


@pytest.mark.parametrize("halved_in", [0, 1])
def test_a_resumed_run_halves_its_batches_where_the_first_ran_out_of_memory(
    halved_in: int, model: Path, tmp_path: Path
) -> None:
    """It has more memory now, and would not have to."""
    with out_of_memory_in(halved_in, sequences=3):
        whole = build(model, tmp_path / "whole", batch_size=None)
        with stopping_after(2, Stop()), pytest.raises(Stop):
            build(model, tmp_path / "out", batch_size=None)
    with stopping_after(1, Stop()), pytest.raises(Stop):
        build(model, tmp_path / "out", batch_size=None)
    resumed = build(model, tmp_path / "out", batch_size=None)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert set(whole.notes) < set(resumed.notes)  # that it ran out of memory is said by both


def test_a_block_that_ran_out_of_memory_and_was_not_finished_gets_the_planned_size_again(
    model: Path, tmp_path: Path
) -> None:
    build(model, tmp_path / "whole", batch_size=None)
    with out_of_memory_in(2, sequences=3), stopping_after(2, Stop()), pytest.raises(Stop):
        build(model, tmp_path / "out", batch_size=None)
    with stopping_after(1, Stop()), pytest.raises(Stop):
        build(model, tmp_path / "out", batch_size=None)
    resumed = build(model, tmp_path / "out", batch_size=None)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert not [note for note in resumed.notes if "out of memory" in note]


# ---- other settings


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"solver": "als"}, 'solver.name was "krylov" and is "als"'),
        ({"iterations": 5}, "solver.iterations was null and is 5"),
        ({"damping": 0.5}, "solver.damping was 0.0001 and is 0.5"),
        ({"seed": 1}, "solver.seed was 0 and is 1"),
        ({"batch_size": 3}, "batch_size was 2 and is 3"),
        ({"lora": {"r": 5}}, r"targets.model.layers.0.self_attn.q_proj was \[4, 2.0\] and is \[5, 1.6\]"),
        ({"lora": {"target_modules": ["q_proj"]}}, r"targets.model.layers.0.self_attn.k_proj was .* and is null"),
        ({"data": Calibration(tiny.sequences(9), "fewer")}, "calibration.samples was 10 and is 9"),
        ({"quantization": BitsAndBytesConfig(load_in_8bit=True)}, 'base.quantization.method was "nf4" and is "int8"'),
    ],
    ids=["solver", "iterations", "damping", "seed", "batch size", "rank", "targets", "data", "quantization"],
)
def test_changed_settings_are_refused_with_the_difference(
    changes: dict[str, Any], said: str, model: Path, tmp_path: Path
) -> None:
    with stopping_after(1, Stop()), pytest.raises(Stop):
        build(model, tmp_path / "out")
    with pytest.raises(QuailoraError, match=f"unfinished run with other settings: .*{said}.*--no-resume"):
        build(model, tmp_path / "out", **changes)
    assert finished(tmp_path / "out"), "a refusal takes nothing"
    build(model, tmp_path / "out", resume=False, **changes)
    assert not work(tmp_path / "out").exists()


def test_another_checkpoint_and_another_version_are_refused(model: Path, tmp_path: Path) -> None:
    with stopping_after(1, Stop()), pytest.raises(Stop):
        build(model, tmp_path / "out")
    other = tiny.checkpoint(tmp_path / "other", num_hidden_layers=BLOCKS, seed=1)
    with pytest.raises(QuailoraError, match=r"base.fingerprint was .* and is"):
        build(other, tmp_path / "out")
    with (
        mock.patch.object(quailora, "__version__", "9.9"),
        pytest.raises(QuailoraError, match=r'versions.quailora was ".*" and is "9.9"'),
    ):
        build(model, tmp_path / "out")


def test_a_damaged_block_is_named(model: Path, tmp_path: Path) -> None:
    with stopping_after(1, Stop()), pytest.raises(Stop):
        build(model, tmp_path / "out")
    (work(tmp_path / "out") / "block-0000.safetensors").write_bytes(b"not what was written")
    with pytest.raises(QuailoraError, match=r"block-0000.safetensors is damaged .*--no-resume"):
        build(model, tmp_path / "out")


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_damaged_record_is_named(text: str, model: Path, tmp_path: Path) -> None:
    with stopping_after(1, Stop()), pytest.raises(Stop):
        build(model, tmp_path / "out")
    (work(tmp_path / "out") / "run.json").write_text(text)
    with pytest.raises(QuailoraError, match=r"run.json is damaged .*--no-resume"):
        build(model, tmp_path / "out")


# ---- faults and interruptions

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "error",
    [
        FULL,
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        PermissionError(errno.EACCES, os.strerror(errno.EACCES)),
    ],
    ids=["full", "full, says safetensors", "read-only"],
)
def test_a_block_that_cannot_be_written_loses_nothing(
    error: Exception, model: Path, undisturbed: bytes, tmp_path: Path
) -> None:
    save, count = resume.save_file, itertools.count()

    def fail(tensors: Any, path: Path, **kwargs: Any) -> None:
        if next(count) == 2:
            Path(path).write_bytes(b"half of a file")
            raise error
        save(tensors, path, **kwargs)

    with (
        mock.patch.object(resume, "save_file", fail),
        pytest.raises(QuailoraError, match=r"the factors of 2 blocks are kept in .* the same command continues"),
    ):
        build(model, tmp_path / "out")
    assert finished(tmp_path / "out") == ["block-0000.safetensors", "block-0001.safetensors"]
    Child(build_quietly, model, tmp_path / "out").result()
    assert weights(tmp_path / "out") == undisturbed


def test_an_adapter_that_cannot_be_written_loses_nothing(model: Path, undisturbed: bytes, tmp_path: Path) -> None:
    with (
        mock.patch.object(save_and_load, "write_tensors", side_effect=FULL),
        pytest.raises(QuailoraError, match=r"full: .*the factors of 4 blocks are kept"),
    ):
        build(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    build(model, tmp_path / "out")


def test_nothing_is_left_where_nothing_was_finished(model: Path, tmp_path: Path) -> None:
    with stopping_after(0, QuailoraError("no")), pytest.raises(QuailoraError, match=r"^no$"):
        build(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="Windows has no locks on folders")
def test_a_folder_belongs_to_one_run_at_a_time(model: Path, tmp_path: Path) -> None:
    with stopping_after(2, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        build(model, tmp_path / "out")
    kept = finished(tmp_path / "out")
    with resume.locked(work(tmp_path / "out")):
        for go_on in (True, False):
            with pytest.raises(QuailoraError, match="another run is at work in"):
                build(model, tmp_path / "out", resume=go_on)
    assert finished(tmp_path / "out") == kept
    build(model, tmp_path / "out")
    assert not work(tmp_path / "out").exists()


@pytest.mark.skipif(os.name != "posix", reason="Windows has no locks on folders")
def test_a_folder_that_goes_while_it_is_locked_still_belongs_to_the_other_run(tmp_path: Path) -> None:
    import fcntl

    folder, flock = tmp_path / "folder", fcntl.flock

    for again in (False, True):  # a third run may have made it anew
        folder.mkdir(exist_ok=True)

        def end(descriptor: int, operation: int, again: bool = again) -> None:
            folder.rename(tmp_path / f"gone {again}")
            if again:
                folder.mkdir()
            flock(descriptor, operation)

        with (
            mock.patch.object(fcntl, "flock", end),
            pytest.raises(QuailoraError, match="another run is at work in"),
            resume.locked(folder),
        ):
            raise AssertionError("it was locked")


def test_what_no_token_reached_is_named_by_the_run_that_goes_on(model: Path, tmp_path: Path) -> None:
    unreached = "model.layers.0.mlp.down_proj"

    def collect(linears: dict[str, torch.nn.Module]) -> Any:
        return hooks.collect({name: linear for name, linear in linears.items() if name != unreached})

    with mock.patch.object(block, "collect", collect):
        with stopping_after(2, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
            build(model, tmp_path / "out")
        report = build(model, tmp_path / "out")
    assert "the full-precision model did not call it" in report.left[unreached]
    assert unreached not in [row.name for row in report.layers]
    assert report.left == build(model, tmp_path / "whole").left | {unreached: report.left[unreached]}


def test_an_interruption_says_what_is_kept(model: Path, tmp_path: Path) -> None:
    with (
        stopping_after(3, KeyboardInterrupt()),
        pytest.raises(KeyboardInterrupt, match=r"interrupted; the factors of 3 blocks are kept in .*the same command"),
    ):
        build(model, tmp_path / "out")
    build(model, tmp_path / "out")


# ---- the files themselves


@pytest.mark.parametrize("names", [["b", "a"], ["ä", 'with "quotes"', "z" * 100]])
def test_streamed_tensors_are_the_bytes_that_safetensors_writes(names: list[str], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    dtypes = itertools.cycle([torch.float32, torch.bfloat16, torch.float64, torch.float16])
    tensors = {
        name: torch.randn(3, i + 1).to(dtype) for i, (name, dtype) in enumerate(zip(names, dtypes, strict=False))
    }
    tensors["scalar"], tensors["none"] = torch.tensor(1.5), torch.empty(0, 4)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    lazy = {n: files.LazyTensor(tuple(t.shape), t.dtype, lambda t=t: t) for n, t in tensors.items()}  # type: ignore[misc]
    files.write_tensors(tmp_path / "ours", lazy)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(Stop), files.replaced(path) as partial:
        partial.write_text("half of the n")
        raise Stop
    assert path.read_text() == "old"
    with files.replaced(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
