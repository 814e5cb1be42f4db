"""Weights that come and go: what they take, what is read ahead, and that nothing of them stays."""

import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.core_model_loading import GLOBAL_WORKERS

from quailora.errors import CheckpointError
from quailora.memory.allocator import return_freed_memory
from quailora.memory.budget import peak_resident, reset_peak
from quailora.modeling import checkpoint as checkpoints
from quailora.modeling import prefetch as prefetch_module
from quailora.modeling import transformers_internals as internals
from quailora.modeling.checkpoint import SINGLE, Checkpoint, TensorEntry
from quailora.modeling.prefetch import _Fetch, _fetch_one
from quailora.modeling.streamed_model import StreamedModel
from tests.helpers import tiny

CPU = torch.device("cpu")
FIRST, SECOND = "model.layers.0.", "model.layers.1."
FAMILIES = ("llama", "mixtral", "qwen3_moe", "deepseek_v3", "phi3")
THREAD = "quailora-prefetch"


def streamed(
    folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, device: torch.device = CPU, **changes: Any
) -> StreamedModel:
    return StreamedModel(Checkpoint(tiny.checkpoint(folder / "model", family, **changes)), device, dtype)


def held(model: StreamedModel, *names: str) -> dict[str, Tensor]:
    """All state of the model that is in memory and has one of these names."""
    state = model.model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if name.startswith(names) and not tensor.is_meta}


def copies(model: StreamedModel, *names: str) -> dict[str, Tensor]:
    with model.resident(*names):
        return {name: tensor.detach().cpu().clone() for name, tensor in held(model, *names).items()}


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and found
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == THREAD]


class Reads:
    """Stands in for TensorEntry.read: who read what, the first read of the prefetching thread held up on request."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead: list[TensorEntry] = []
        self.here: list[TensorEntry] = []
        self.going, self.gate = threading.Event(), threading.Event()
        self.gate.set()
        self.error: Exception | None = None
        read = TensorEntry.read

        def watched(entry: TensorEntry, dtype: torch.dtype | None = None) -> Tensor:
            if threading.current_thread().name != THREAD:
                self.here.append(entry)
                return read(entry, dtype)
            self.ahead.append(entry)
            self.going.set()
            assert self.gate.wait(10)
            if self.error is not None:
                raise self.error
            return read(entry, dtype)

        monkeypatch.setattr(TensorEntry, "read", watched)

    def open_soon(self) -> None:
        threading.Timer(0.2, self.gate.set).start()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reads]:
    watch = Reads(monkeypatch)
    yield watch
    watch.gate.set()


@pytest.fixture
def holds(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], bool]:
    """Whether so many bytes of what was read from a checkpoint are alive: arrays that die with the tensors' storage.

    A thread that has handed over a tensor holds it until it leaves the line, so it may take a moment.
    """
    arrays: list[tuple[weakref.ref[Any], int]] = []

    def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        array = numpy.empty(torch.Size(shape).numel() * dtype.itemsize, numpy.uint8)
        arrays.append((weakref.ref(array), array.nbytes))
        return torch.from_numpy(array).view(dtype).view(shape)

    monkeypatch.setattr(checkpoints, "_empty", empty)

    def settles_at(expected: int) -> bool:
        for _ in range(300):
            if sum(size for array, size in arrays if array() is not None) == expected:
                return True
            time.sleep(0.01)
        return False

    return settles_at


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_prefetched_or_not_the_weights_are_the_same_bits(
    family: str, stored: torch.dtype, dtype: torch.dtype, tmp_path: Path, reads: Reads
) -> None:
    folder = tiny.checkpoint(tmp_path / "model", family, stored)
    model = StreamedModel(Checkpoint(folder), CPU, dtype)
    outside = model.outside_blocks()
    for names in ([FIRST], [SECOND], outside):
        reads.ahead.clear()
        expected = copies(model, *names)
        assert not reads.ahead
        reads.here.clear()
        model.prefetch(*names)
        assert_same_bits(copies(model, *names), expected)
        assert reads.ahead and not reads.here
        assert not held(model, FIRST, SECOND) or family == "deepseek_v3"  # whose buffers stay


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_read_becomes_the_parameter_and_nothing_else_of_it_lives(
    dtype: torch.dtype, tmp_path: Path, holds: Callable[[int], bool]
) -> None:
    model = streamed(tmp_path, dtype=dtype)
    for ahead in (False, True, True):
        if ahead:
            model.prefetch(FIRST)
        with model.resident(FIRST):
            assert holds(model.nbytes(FIRST))
            assert sum(tensor.nbytes for tensor in held(model, FIRST).values()) == model.nbytes(FIRST)
        assert holds(0)


def test_a_parameter_of_the_files_dtype_is_the_tensor_that_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, places = streamed(tmp_path), {}
    read = TensorEntry.read

    def watched(entry: TensorEntry, dtype: torch.dtype | None = None) -> Tensor:
        tensor = read(entry, dtype)
        places[entry.start] = tensor.data_ptr()
        return tensor

    monkeypatch.setattr(TensorEntry, "read", watched)
    for prefetch in (False, True):
        places.clear()
        if prefetch:
            model.prefetch(FIRST)
        with model.resident(FIRST):
            for name, tensor in held(model, FIRST).items():
                assert tensor.data_ptr() == places[model.checkpoint.tensors[name].start], name


@pytest.mark.parametrize("ahead", [False, True])
def test_parts_go_when_the_whole_is_made(
    ahead: bool, tmp_path: Path, holds: Callable[[int], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, convert, left = streamed(tmp_path, "mixtral"), internals.convert_and_load_state_dict_in_model, []

    def watched(*args: Any) -> Any:
        result = convert(*args)
        left.append(holds(sum(tensor.nbytes for name, tensor in held(model, FIRST).items() if ".experts." not in name)))
        return result

    monkeypatch.setattr(internals, "convert_and_load_state_dict_in_model", watched)
    if ahead:
        model.prefetch(FIRST)
    with model.resident(FIRST):
        weights = held(model, FIRST)
        whole = sum(tensor.nbytes for name, tensor in weights.items() if ".experts." in name)
        assert whole > 0 and left == [True] and holds(model.nbytes(FIRST) - whole)
    del weights
    assert holds(0)


def test_the_error_of_the_thread_is_raised_where_the_weights_are_needed(tmp_path: Path, reads: Reads) -> None:
    model = streamed(tmp_path)
    expected, reads.error = copies(model, FIRST), CheckpointError("a torn file")
    model.prefetch(FIRST)
    assert model._ahead is not None
    for thread in readers():
        thread.join()
    assert all(future.done() for future in model._ahead._futures.values()), "resident would wait for ever"
    with pytest.raises(CheckpointError, match="a torn file") as caught, model.resident(FIRST):
        pytest.fail("the weights cannot be there")
    assert caught.value is reads.error
    assert not readers() and all(parameter.is_meta for parameter in model.model.parameters())
    assert_same_bits(copies(model, FIRST), expected)  # which reads by itself again


def test_a_file_cut_off_before_the_prefetch_is_named(tmp_path: Path) -> None:
    model = streamed(tmp_path)
    (tmp_path / "model" / SINGLE).write_bytes(b"")
    model.prefetch(FIRST)
    with pytest.raises(CheckpointError, match="has changed since it was opened"), model.resident(FIRST):
        pass


def test_resident_waits_for_what_is_on_its_way(tmp_path: Path, reads: Reads) -> None:
    model = streamed(tmp_path)
    expected = copies(model, FIRST)
    reads.here.clear()
    reads.gate.clear()
    model.prefetch(FIRST)
    assert reads.going.wait(10)
    reads.open_soon()
    assert_same_bits(copies(model, FIRST), expected)
    assert not reads.here


def test_asked_for_twice_it_is_read_once(tmp_path: Path, reads: Reads) -> None:
    model = streamed(tmp_path)
    for _ in range(2):
        model.prefetch(FIRST)
    copies(model, FIRST)
    assert len(reads.ahead) == len(set(reads.ahead)) > 0 and not reads.here


def test_other_names_neither_take_a_prefetch_nor_end_it(tmp_path: Path, reads: Reads) -> None:
    model = streamed(tmp_path)
    model.prefetch(SECOND)
    copies(model, FIRST)
    assert reads.here
    reads.here.clear()
    copies(model, SECOND)
    assert reads.ahead and not reads.here


def test_a_prefetch_of_other_names_takes_the_place_of_one_that_nobody_took(
    tmp_path: Path, reads: Reads, holds: Callable[[int], bool]
) -> None:
    model = streamed(tmp_path)
    model.prefetch(FIRST)
    model.prefetch(SECOND)
    assert len(readers()) <= 1
    with model.resident(SECOND):
        assert not reads.here and holds(model.nbytes(SECOND))
    copies(model, FIRST)
    assert reads.here


def test_forgotten_it_stops_and_leaves_nothing(tmp_path: Path, reads: Reads, holds: Callable[[int], bool]) -> None:
    model = streamed(tmp_path)
    model.forget_prefetched()  # nothing to forget
    reads.gate.clear()
    model.prefetch(FIRST)
    assert reads.going.wait(10)
    reads.open_soon()
    model.forget_prefetched()
    assert len(reads.ahead) == 1 and not readers() and holds(0)
    copies(model, FIRST)
    assert reads.here and len(reads.ahead) == 1


def test_finished_and_forgotten_it_leaves_nothing(tmp_path: Path, holds: Callable[[int], bool]) -> None:
    model = streamed(tmp_path, "mixtral")
    model.prefetch(FIRST)
    for thread in readers():
        thread.join()
    assert holds(model.nbytes(FIRST))
    model.forget_prefetched()
    assert holds(0)


def test_the_thread_ends_with_the_model(tmp_path: Path, reads: Reads, holds: Callable[[int], bool]) -> None:
    model = streamed(tmp_path)
    reads.gate.clear()
    model.prefetch(FIRST)
    assert reads.going.wait(10)
    reads.open_soon()
    del model
    gc.collect()
    assert not readers()
    assert len(reads.ahead) == 1 and holds(0)


def test_a_process_that_fails_meanwhile_ends_with_its_own_error(tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "model")
    script = f"""
import atexit, time, torch
atexit.register(lambda: print(time.perf_counter() - start))  # the last to run
from quailora.modeling.streamed_model import StreamedModel
from quailora.modeling.checkpoint import Checkpoint, TensorEntry
read = TensorEntry.read
def slow(entry, dtype=None):
    time.sleep(1)
    return read(entry, dtype)
TensorEntry.read = slow
model = StreamedModel(Checkpoint({str(folder)!r}), torch.device("cpu"), torch.float32)
model.prefetch("model.layers.0.")
time.sleep(0.1)
print("started", flush=True)
start = time.perf_counter()
raise SystemError("of the block that computes")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 1 and "SystemError: of the block that computes" in done.stderr, done.stderr
    assert "Fatal" not in done.stderr and "terminate" not in done.stderr
    started, seconds = done.stdout.split()
    assert started == "started" and float(seconds) < 5  # nine tensors would take 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", [*FAMILIES, "gpt2", "opt"])
def test_nbytes_is_what_becomes_resident_and_nothing_is_read(
    family: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = streamed(tmp_path, family, dtype)
    groups = [[f"{block.name}."] for block in model.blocks] + [model.outside_blocks()]
    with monkeypatch.context() as patch:
        patch.setattr(TensorEntry, "read_into", lambda *_: pytest.fail("read"))
        planned = [model.nbytes(*names) for names in groups]
    for names, size in zip(groups, planned, strict=True):
        with model.resident(*names):
            stored = {name: tensor for name, tensor in held(model, *names).items() if name in model._sources}
            assert sum(tensor.nbytes for tensor in stored.values()) == size > 0


def test_modules_that_transformers_keeps_in_fp32_are_counted_and_read_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = streamed(tmp_path, dtype=torch.bfloat16)
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", {"o_proj"})
    model = StreamedModel(plain.checkpoint, CPU, torch.bfloat16)
    weight = "model.layers.0.self_attn.o_proj.weight"
    stored = load_file(tmp_path / "model" / SINGLE)[weight]
    assert not torch.equal(stored, stored.bfloat16().float())
    assert model.nbytes(FIRST) == plain.nbytes(FIRST) + 2 * stored.numel()
    for ahead in (False, True):
        if ahead:
            model.prefetch(FIRST)
        found = copies(model, FIRST)
        assert torch.equal(found.pop(weight), stored) and found[weight.replace("o_", "q_")].dtype == torch.bfloat16


def test_loading_takes_more_where_parts_and_whole_are_alive_together(tmp_path: Path) -> None:
    model = streamed(tmp_path, "mixtral", torch.bfloat16)
    # Experts, gate and up, rows, columns, bytes: the larger of the two that are made of parts.
    assert model.loading_nbytes(FIRST) == 4 * 2 * 128 * 64 * 2
    assert model.loading_nbytes(*model.outside_blocks()) == 0
    assert streamed(tmp_path / "other", "llama").loading_nbytes(FIRST) == 0


def resident_bytes(*kinds: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(kinds))


linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not say what is resident")


@linux
@pytest.mark.parametrize("ahead", [False, True])
def test_no_page_of_the_file_becomes_resident(ahead: bool, tmp_path: Path) -> None:
    model = streamed(tmp_path, hidden_size=512, intermediate_size=2048)
    copies(model, FIRST)  # what code that runs for the first time needs
    before = resident_bytes("RssFile", "RssShmem")
    if ahead:
        model.prefetch(SECOND)
    with model.resident(SECOND):
        assert model.nbytes(SECOND) > 12 * 2**20
        assert resident_bytes("RssFile", "RssShmem") - before < 2**20


@linux
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_blocks_that_were_left_take_no_memory(family: str, tmp_path: Path) -> None:
    """But for what malloc keeps for later, in a heap for each of transformers' threads."""
    model = streamed(tmp_path, family, torch.bfloat16, hidden_size=512, intermediate_size=2048, num_hidden_layers=6)
    names = [f"{block.name}." for block in model.blocks]
    copies(model, names[0])
    before = resident_bytes("RssAnon")
    for name, following in pairwise(names):
        with model.resident(name):
            model.prefetch(following)
    model.forget_prefetched()
    return_freed_memory()
    assert resident_bytes("RssAnon") - before < model.nbytes(FIRST) / 4


@linux
@pytest.mark.parametrize("ahead", [False, True])
def test_the_peak_of_loading_is_the_planned_one(ahead: bool, tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 3}
    model = StreamedModel(
        Checkpoint(tiny.checkpoint(tmp_path / "model", "mixtral", torch.bfloat16, **sizes)), CPU, torch.float32
    )
    names = [f"{block.name}." for block in model.blocks]
    copies(model, names[0])
    before = resident_bytes("VmRSS")
    if not reset_peak():
        pytest.skip("the peak cannot be set back")
    for name in names:
        if ahead:
            model.prefetch(name)
        with model.resident(name):
            pass
    staging = (GLOBAL_WORKERS + 1) * checkpoints._PIECE
    planned = model.nbytes(FIRST) + model.loading_nbytes(FIRST) + staging
    assert model.nbytes(FIRST) / 2 < peak_resident() - before < planned


@pytest.mark.slow
def test_nothing_grows_with_the_number_of_blocks_that_were_loaded(tmp_path: Path) -> None:
    model = streamed(tmp_path, "mixtral")

    def objects() -> int:
        for _ in range(3):
            model.prefetch(FIRST)
            copies(model, FIRST)
        gc.collect()
        return len(gc.get_objects())

    # a leak adds at least one object for each block loaded, in every round; other tests' threads may add some in one
    counts = [objects() for _ in range(6)]
    assert min(later - earlier for earlier, later in pairwise(counts)) < 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_goes_to_a_gpu_goes_through_a_small_piece_of_locked_memory(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps of the thread, on the host."""
    model, empty, sizes = streamed(tmp_path), torch.empty, []

    def locked(*size: int, pin_memory: bool = False, **options: Any) -> Tensor:
        if pin_memory:
            sizes.extend(size)
        return empty(*size, **options)

    waits: list[None] = []
    stream: Any = SimpleNamespace(synchronize=lambda: waits.append(None))
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch, "empty", locked)
    monkeypatch.setattr(prefetch_module, "STAGING_BYTES", 1000)
    entry = model.checkpoint.tensors["model.layers.0.mlp.up_proj.weight"]
    fetch = _Fetch(entry, dtype, prefetch_module.Future(), empty(entry.shape, dtype=dtype))
    _fetch_one(fetch, stream)
    assert sizes == [1000] and len(waits) == -(-entry.nbytes // 1000)
    assert torch.equal(fetch.future.result(), entry.read().to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_on_a_gpu_prefetched_or_not_the_weights_are_the_same_bits(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    device = torch.device("cuda")
    model = streamed(tmp_path, family, dtype, device)
    for _ in range(3):
        for name in (FIRST, SECOND):
            expected = copies(model, name)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            model.prefetch(name)
            with model.resident(name):
                assert all(tensor.is_cuda for tensor in held(model, name).values())
                assert_same_bits({key: tensor.detach().cpu() for key, tensor in held(model, name).items()}, expected)
            torch.cuda.synchronize()
            assert torch.cuda.memory_allocated() == before
