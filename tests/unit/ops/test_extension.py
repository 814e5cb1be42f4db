"""The compiled extension's gram_: every path this machine can run, and the model of the one it cannot, against fp64."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from torch import Tensor

from quailora.calibration.gram import Gram
from quailora.errors import CheckpointError, QuailoraError
from quailora.ops import extension, reference
from tests.helpers import ROOT

CPU = torch.device("cpu")
OBSTACLE = extension.obstacle(CPU)
built = pytest.mark.skipif(OBSTACLE is not None, reason=f"quailora._C: {OBSTACLE}")

PATHS = ["amx-bf16", "avx512-bf16", "avx512", "avx2", "portable"]
CPU_SOURCES = ROOT / "csrc" / "cpu"
AMX_MODEL = Path(__file__).with_name("amx_model.cpp")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.skipif(os.environ.get("QUAILORA_EXT") == "0", reason="QUAILORA_EXT=0 leaves it out")
def test_it_is_there_where_it_can_be_built() -> None:
    """Else code that no longer compiles would pass: the build is optional, and without it these tests are skipped."""
    assert OBSTACLE is None


@pytest.fixture(scope="session")
def amx_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """As `extension.gram_`, by the kernel for AMX on a model of the instructions in C++."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("amx") / "amx_model.so"
    sources = [AMX_MODEL, CPU_SOURCES / "gram.cpp", CPU_SOURCES / "portable.cpp"]
    flags = ["-std=c++17", "-O3", "-shared", "-fPIC", "-pthread", f"-I{CPU_SOURCES}"]
    subprocess.run(["c++", *flags, *sources, "-o", library], check=True)
    add = ctypes.CDLL(str(library)).amx_model_gram

    def gram_(h: Tensor, x: Tensor, keep: Tensor | None = None) -> None:
        rows = x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()
        offsets = torch.zeros(rows.shape[:-1], dtype=torch.int64)
        for size, stride, following in zip(
            rows.shape[:-1], rows.stride()[:-1], range(rows.dim() - 2, -1, -1), strict=True
        ):
            offsets += torch.arange(size).mul(stride).reshape(-1, *[1] * following)
        offsets = offsets.flatten() if keep is None else offsets[keep]
        add(
            ctypes.c_void_p(rows.data_ptr()), [BF16, FP16, FP32].index(x.dtype), ctypes.c_int64(x.shape[-1]),
            ctypes.c_void_p(offsets.data_ptr()), ctypes.c_int64(offsets.numel()), torch.get_num_threads(),
            ctypes.c_void_p(h.data_ptr()), ctypes.c_int64(h.stride(0)),
        )  # fmt: skip

    return gram_


@pytest.fixture(params=[*PATHS, "amx-model"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    from quailora import _C

    if request.param == "amx-model":
        monkeypatch.setattr(extension, "gram_", request.getfixturevalue("amx_model"))
        yield request.param
        return
    if request.param not in _C.cpu_paths():
        pytest.skip(f"this processor, or this build, has no {request.param}")
    before = _C.cpu_path()
    _C.use_cpu_path(request.param)
    assert _C.cpu_path() == request.param
    yield request.param
    _C.use_cpu_path(before)


def inputs(kind: str, tokens: int, features: int) -> Tensor:
    """Random; with a few channels at a thousand times the others; or as in a model, where tokens and channels are of
    very different lengths, channels are correlated and means are far from zero."""
    generator = torch.Generator().manual_seed(tokens + features)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x = random(tokens, features)
    if kind == "outliers":
        x[:, torch.randperm(features, generator=generator)[:3]] *= 1000
    elif kind == "activations":
        x = (x + random(tokens, 8) @ random(8, features) + random(features)) * random(tokens, 1).exp()
        x *= (1.5 * random(features)).exp().clamp_max(50)
    return x


def correlation(x: Tensor) -> Tensor:
    x = x.reshape(-1, x.shape[-1]).double()
    return (x.T @ x).tril()


def assert_accurate(h: Tensor, expected: Tensor, frobenius: float) -> None:
    error = h.tril().double() - expected
    assert error.norm() <= frobenius * expected.norm()
    # Cauchy and Schwarz bound |H_ij| by this, so it is the scale of what may cancel in H_ij. Sums of 32 products round
    # by 1e-7 on average, and the largest of a million such errors is five times as large.
    lengths = expected.diagonal().sqrt()
    assert (error.abs() <= 2e-6 * lengths[:, None] * lengths).all()


# Products of two bf16 or fp16 values are exact in fp32, so only sums round, by about 1e-7; of fp32 values each rounds.
FROBENIUS = {BF16: 2e-7, FP16: 2e-7, FP32: 1e-6}


@built
@pytest.mark.parametrize("kind", ["random", "outliers", "activations"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_every_path_is_accurate(path: str, dtype: torch.dtype, kind: str) -> None:
    # Around a tile (96 features), a run, a block and a chunk (32, 128 or 256, 1024 tokens).
    few = [(1, 1), (31, 7), (33, 95), (128, 96), (129, 97), (1, 1000)]
    many = [(300, 64), (257, 193), (1025, 130), (2048, 576)]
    for tokens, features in few + many:
        x = inputs(kind, tokens, features).to(dtype)
        assert x.isfinite().all()
        h = torch.zeros(features, features)
        extension.gram_(h, x)
        assert_accurate(h, correlation(x), FROBENIUS[dtype])


@pytest.fixture(scope="module", params=[BF16, FP32], ids=str)
def activations(request: pytest.FixtureRequest) -> dict[str, Tensor]:
    """What the linears of a real model's first, middle and last block are fed: name -> (tokens, features).

    The model runs in the dtype asked for: values that bf16 has would have exact products in fp32 as well.
    """
    from benchmarks.common.smollm2 import fetch

    try:
        folder = fetch()
    except CheckpointError as error:
        pytest.skip(f"the real model cannot be had here: {error}")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=request.param)
    text = "\n".join(topics[name] for name in sorted(topics))
    tokens = AutoTokenizer.from_pretrained(folder)(text[:20000], return_tensors="pt").input_ids[:, :2048].reshape(4, -1)
    seen = {}
    for name, module in model.named_modules():
        block = re.search(r"layers\.(0|15|29)\..*(q|o|gate|down)_proj$", name)
        if block:
            module.register_forward_pre_hook(
                lambda module, inputs, name=name: seen.update({name: inputs[0].flatten(0, 1)})
            )
    with torch.no_grad():
        model(tokens)
    assert len(seen) == 12
    assert all(x.dtype == request.param for x in seen.values())
    assert request.param == BF16 or not any(torch.equal(x, x.bfloat16()) for x in seen.values())
    return seen


@built
@pytest.mark.slow
def test_every_path_is_accurate_on_real_activations(path: str, activations: dict[str, Tensor]) -> None:
    for x in activations.values():
        h = torch.zeros(x.shape[1], x.shape[1])
        extension.gram_(h, x)
        assert_accurate(h, correlation(x), FROBENIUS[x.dtype])


@built
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_a_million_tokens_stay_accurate(path: str, dtype: torch.dtype) -> None:
    h, expected = torch.zeros(24, 24), torch.zeros(24, 24, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for _ in range(256):
        x = (torch.randn(4096, 24, generator=generator) + 1).to(dtype)
        extension.gram_(h, x)
        expected += correlation(x)
    # 1024 sums of a chunk, one after the other: a single sum over all tokens would be off by several times as much.
    assert_accurate(h, expected, 1e-6)


@built
def test_it_adds_to_the_lower_triangle_and_touches_nothing_else(path: str) -> None:
    x = inputs("random", 40, 100)
    memory = torch.full((102, 130), 7.0)
    h = memory[1:101, 3:103]
    h.tril_()
    h += torch.full((100, 100), 9.0).triu(1)
    lower = torch.zeros(102, 130, dtype=torch.bool)
    lower[1:101, 3:103] = torch.ones(100, 100).tril().bool()
    before = memory.clone()
    extension.gram_(h, x)
    assert torch.equal(memory[~lower], before[~lower])
    assert_accurate(h.tril() - 7.0 * lower[1:101, 3:103], correlation(x), 1e-6)


@built
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_masked_rows_are_never_read(path: str, dtype: torch.dtype) -> None:
    x = inputs("random", 3 * 50, 70).to(dtype).reshape(3, 50, 70)
    for kept in (0.0, 0.3, 0.9):
        keep = torch.rand(3, 50, generator=torch.Generator().manual_seed(1)) < kept
        expected = correlation(x[keep])
        padded = x.masked_fill(~keep[..., None], float("nan"))
        h = torch.zeros(70, 70)
        extension.gram_(h, padded, keep)
        assert_accurate(h, expected, FROBENIUS[dtype])


@built
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_any_strides(path: str, dtype: torch.dtype) -> None:
    x = inputs("random", 24 * 9, 120).to(dtype).reshape(6, 4, 9, 120)
    keep = inputs("random", 24 * 9, 1).reshape(6, 4, 9) > 0
    views = {
        "columns of a wider tensor, misaligned": (x[..., 7:50], keep),
        "every other row": (x[:, :, ::2, :33], keep[:, :, ::2]),
        "dimensions out of order": (x.permute(2, 0, 1, 3), keep.permute(2, 0, 1)),
        "rows that are the same": (x[:, :, :1].expand(6, 4, 9, 120), keep),
        "features apart": (x[0, 0].T, keep.flatten()[:120]),
        "one token, no leading shape": (x[0, 0, 0], None),
        "no tokens": (x[:0], keep[:0]),
    }
    for name, (view, mask) in views.items():
        h = torch.zeros(view.shape[-1], view.shape[-1])
        extension.gram_(h, view, mask)
        expected = correlation(view if mask is None else view[mask])
        # Of the few tokens that some of these have, each sum rounds by 1e-7 of the largest.
        torch.testing.assert_close(h.double(), expected, rtol=0, atol=5e-7 * float(expected.abs().max()), msg=name)


@built
def test_every_fp16_value_is_widened_exactly(path: str) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(FP16).reshape(512, 128)
    for row in values:
        x = torch.cat([torch.ones(1, dtype=FP16), row])
        h = torch.zeros(129, 129)
        extension.gram_(h, x)
        assert torch.equal(h[1:, 0].nan_to_num(12345.0), row.float().nan_to_num(12345.0))


@built
@pytest.mark.skipif(sys.platform != "linux", reason="threads of a process are counted in /proc")
def test_the_work_is_shared_among_threads() -> None:
    """A build that does not know of OpenMP is right all the same, on one thread."""
    count = """
import os, torch
from quailora.ops import extension
torch.set_num_threads(3)
assert extension.obstacle(torch.device("cpu")) is None
h, x = torch.empty(256, 256), torch.empty(64, 256)  # to fill them would start threads
before = len(os.listdir("/proc/self/task"))
extension.gram_(h, x)
print(len(os.listdir("/proc/self/task")) - before)
"""
    run = subprocess.run([sys.executable, "-c", count], capture_output=True, text=True, check=True)
    assert int(run.stdout) == 2  # beside the one there is


@built
def test_threads_change_nothing(path: str) -> None:
    x = inputs("random", 700, 300).to(BF16)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            h = torch.zeros(300, 300)
            extension.gram_(h, x)
            results.append(h)
    finally:
        torch.set_num_threads(before)
    concurrent = [torch.zeros(300, 300) for _ in range(4)]
    workers = [threading.Thread(target=extension.gram_, args=(h, x)) for h in concurrent]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for h in results[1:] + concurrent:
        assert torch.equal(h, results[0])


@pytest.mark.slow  # it compiles against torch's headers
@built
def test_inside_a_parallel_region(tmp_path: Path) -> None:
    from torch.utils.cpp_extension import load_inline

    source = """
    #include <ATen/Parallel.h>
    #include <ATen/core/dispatch/Dispatcher.h>
    void run(std::vector<at::Tensor> hs, at::Tensor x) {
      auto gram = c10::Dispatcher::singleton().findSchemaOrThrow("quailora::gram_", "")
                      .typed<void(at::Tensor const&, at::Tensor const&, std::optional<at::Tensor> const&)>();
      at::parallel_for(0, hs.size(), 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) gram.call(hs[i], x, std::nullopt);
      });
    }"""
    caller = load_inline("quailora_parallel_caller", source, functions="run", build_directory=str(tmp_path))
    x = inputs("random", 300, 200)
    expected, hs = torch.zeros(200, 200), [torch.zeros(200, 200) for _ in range(8)]
    extension.gram_(expected, x)
    caller.run(hs, x)
    assert all(torch.equal(h, expected) for h in hs)


@built
@pytest.mark.parametrize("masked", [False, True])
def test_the_operator_is_declared_as_it_behaves(masked: bool) -> None:
    keep = torch.tensor([[True, False, True], [False, True, True]]) if masked else None
    x = inputs("random", 6, 5).reshape(2, 3, 5)
    torch.library.opcheck(torch.ops.quailora.gram_.default, (torch.zeros(5, 5), x, keep))


@built
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_it_can_be_compiled(backend: str) -> None:
    def twice(h: Tensor, x: Tensor) -> Tensor:
        extension.gram_(h, x)
        extension.gram_(h, x * 2)
        return h + 1

    compiled = torch.compile(twice, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (20, 30):
        x = inputs("random", tokens, 12)
        torch.testing.assert_close(compiled(torch.zeros(12, 12), x), twice(torch.zeros(12, 12), x))


@built
def test_errors_carry_the_values() -> None:
    h, x, keep = torch.zeros(4, 4), torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
    wrong = [
        ((torch.zeros(4), x), r"h \(n, n\).*\[4\]"),
        ((h.double(), x), r"float32.*Double"),
        ((h, torch.tensor(1.0)), "scalar"),
        ((h, x.double()), r"x of bfloat16.*Double"),
        ((h, x[..., :3]), r"\[3, 3\].*\[2, 3, 3\].*\[4, 4\]"),
        ((torch.zeros(4, 5), x), r"\[4, 4\].*\[4, 5\]"),
        ((h, x, keep.int()), r"keep of bool.*Int"),
        ((h, x, keep.T), r"keep \[2, 3\].*\[2, 3, 4\].*\[3, 2\]"),
        ((h, x, keep[0]), r"keep \[2, 3\].*got \[3\]"),
    ]
    for arguments, message in wrong:
        for device in ("cpu", "meta"):
            with pytest.raises(ValueError, match=message):
                extension.gram_(*(argument.to(device) for argument in arguments))
    for arguments, message in [
        ((torch.zeros(4, 8)[:, ::2], x), r"strides \[8, 2\]"),
        ((torch.zeros(1).expand(4, 4), x), r"side by side.*\[0, 0\]"),
        ((torch.zeros(16).as_strided((4, 4), (3, 1)), x), r"not to overlap.*\[3, 1\]"),
        ((torch.zeros(4).expand(4, 4), x), r"not to overlap.*\[0, 1\]"),
        ((h, x.to("meta")), "one device.*cpu.*meta"),
        ((h, x, keep.to("meta")), "one device.*meta.*cpu"),
        ((h, h), r"apart in memory, got h \[4, 4\] at 0x.* and x \[4, 4\]"),
        ((h, h[1:3]), r"apart in memory, got h \[4, 4\] at 0x.* and x \[2, 4\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            extension.gram_(*arguments)


@built
def test_a_path_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from quailora import _C

    before = _C.cpu_path()
    absent = [name for name in PATHS if name not in _C.cpu_paths()]
    for name in ["mmx", *absent]:
        monkeypatch.setenv("QUAILORA_CPU_PATH", name)
        extension._load.cache_clear()
        for _ in range(2):
            with pytest.raises(QuailoraError, match=f"'{name}', which .*portable"):
                extension.obstacle(CPU)
        assert _C.cpu_path() == before


@built
@pytest.mark.parametrize(("named", "taken"), [("portable", "portable"), ("", None), (None, None)])
def test_the_environment_names_a_path_once(named: str | None, taken: str | None) -> None:
    """Of no name, it is the best there is. What the environment says later changes nothing: it is not read again."""
    code = """
import os, torch
from quailora.ops import extension
assert extension.obstacle(torch.device("cpu")) is None
os.environ["QUAILORA_CPU_PATH"] = "mmx"
assert extension.obstacle(torch.device("cpu")) is None
extension.gram_(torch.zeros(2, 2), torch.zeros(1, 2))
from quailora import _C
print(_C.cpu_path(), _C.cpu_paths()[0])
"""
    environment = {name: value for name, value in os.environ.items() if name != "QUAILORA_CPU_PATH"}
    environment |= {} if named is None else {"QUAILORA_CPU_PATH": named}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    found, best = run.stdout.split()
    assert found == (taken or best)


@built
def test_no_setting_of_the_process_is_changed_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "exact_products", lambda device: pytest.fail("settings are changed"))
    Gram(4).update(torch.ones(2, 4))


@built
def test_a_device_it_was_not_built_for() -> None:
    for device in ("xpu", "meta"):
        assert extension.obstacle(torch.device(device)) == f"it has no code for {device}"
    if torch.version.cuda is None:
        why = "it was built without cuda: with CUDA_HOME set to a toolkit, on Linux with a C"
        assert str(extension.obstacle(torch.device("cuda"))).startswith(why)


def test_why_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension.importlib.util, "find_spec", lambda name: None)
    extension._load.cache_clear()
    assert "not built, so this takes several times as long: on Linux with a C++" in str(extension.obstacle(CPU))

    def broken(name: str) -> None:
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(extension.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(extension.importlib, "import_module", broken)
    extension._load.cache_clear()
    assert "undefined symbol: _ZN3c10" in str(extension.obstacle(CPU))
    extension._load.cache_clear()


def test_quailora_is_imported_without_it() -> None:
    code = "import sys, quailora; print('quailora._C' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


# What gcc of other releases compiles, as far as one that is there can show it; and compilers that may be there.
ABSENT = "-D__builtin_shufflevector=is_not_there_before_gcc_12"
CLAIMED = {f"as gcc {version}": ("g++", "-U__GNUC__", f"-D__GNUC__={version}", ABSENT) for version in (9, 10, 11)}
COMPILERS = {"gcc": ("g++",), **CLAIMED, "gcc 10": ("g++-10",), "gcc 11": ("g++-11",), "clang": ("clang++",)}


def compiler(name: str) -> tuple[str, ...]:
    if shutil.which(COMPILERS[name][0]) is None:
        pytest.skip(f"no {COMPILERS[name][0]}")
    return COMPILERS[name]


def compile_only(name: str, *sources: Path) -> None:
    for source in sources:
        command = [*compiler(name), "-std=c++17", "-fsyntax-only", f"-I{CPU_SOURCES}", source]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr


def test_an_older_compiler_does() -> None:
    compile_only("as gcc 9", AMX_MODEL)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILERS)
def test_any_compiler_of_c17_does(name: str) -> None:
    compile_only(name, AMX_MODEL, *CPU_SOURCES.glob("*.cpp"))


SANITIZED = [("gcc", "vectors"), ("gcc", "plain"), ("as gcc 9", "vectors"), ("gcc 11", "vectors"), ("clang", "vectors")]


@pytest.mark.slow
@pytest.mark.parametrize("checked", ["gram", "columns"])
@pytest.mark.parametrize(("name", "kind"), SANITIZED)
def test_no_sanitizer_finds_fault(tmp_path: Path, name: str, kind: str, checked: str) -> None:
    sources = [*CPU_SOURCES.glob("*.cpp"), AMX_MODEL, Path(__file__).with_name(f"sanitized_{checked}.cpp")]
    flags = ["-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-pthread"]
    options = ["-DQUAILORA_PLAIN_VECTORS"] if kind == "plain" else []
    program = tmp_path / "sanitized"
    subprocess.run([*compiler(name), *flags, *options, f"-I{CPU_SOURCES}", *sources, "-o", program], check=True)
    run = subprocess.run([program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert {"portable", *(["amx-model"] if checked == "gram" else [])} <= set(run.stdout.split())
    assert ("avx512-bf16" in run.stdout) <= (name != "as gcc 9")
