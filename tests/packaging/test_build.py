"""How setup.py decides what to build: the extension, its CUDA part, or neither, and that what it builds works."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import setuptools
from setuptools._distutils.ccompiler import new_compiler
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

from tests.helpers import ROOT, tiny
from tests.integration import test_training

# QUAILORA_EXT -> the module of setup.py, run up to its call of `setup`, and the arguments of that call
RunSetup = Callable[[str], tuple[ModuleType, dict]]


@pytest.fixture
def run_setup(monkeypatch: pytest.MonkeyPatch) -> RunSetup:
    def run(wanted: str) -> tuple[ModuleType, dict]:
        arguments: dict = {}
        monkeypatch.setenv("QUAILORA_EXT", wanted)
        monkeypatch.setattr(setuptools, "setup", lambda **given: arguments.update(given))
        spec = importlib.util.spec_from_file_location("quailora_setup", ROOT / "setup.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module, arguments

    for variable in ("CUDA_HOME", "TORCH_CUDA_ARCH_LIST"):  # setup.py sets them: monkeypatch will take them back
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    return run


def toolkit(folder: Path, release: str) -> Path:
    """A folder that looks like a CUDA toolkit."""
    for part in ("bin", "include", "lib64"):
        (folder / part).mkdir(parents=True)
    (folder / "include" / "cuda_runtime.h").touch()
    (folder / "lib64" / "libcudart.so").touch()
    script(folder / "bin" / "nvcc", f"echo 'Cuda compilation tools, release {release}, V{release}.1'")
    return folder


def script(file: Path, line: str) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"#!/bin/sh\n{line}\n")
    file.chmod(0o755)


@pytest.fixture
def folders(run_setup: RunSetup, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """Where setup.py looks for toolkits, all of them under tmp_path."""
    module, _ = run_setup("0")
    monkeypatch.setattr(module, "SYSTEM", tmp_path / "local")
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: str(tmp_path / "site-packages"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    return module


def test_no_toolkit(folders: ModuleType) -> None:
    assert folders.find_toolkit("13.0") is None


def test_the_toolkit_that_is_named_comes_first(
    folders: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels = toolkit(tmp_path / "site-packages" / "nvidia" / "cu13", "13.2")
    toolkit(tmp_path / "local" / "cuda-13.0", "13.0")
    assert folders.find_toolkit("13.0").home == wheels
    on_path = toolkit(tmp_path / "elsewhere", "13.1")
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "nvcc").symlink_to(on_path / "bin" / "nvcc")
    assert folders.find_toolkit("13.0").home == on_path
    named = toolkit(tmp_path / "named", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(named))
    assert folders.find_toolkit("13.0").home == named


def test_an_nvcc_that_is_a_script_does_not_mislead(folders: ModuleType, tmp_path: Path) -> None:
    real = toolkit(tmp_path / "local" / "cuda-13.0", "13.0")
    (tmp_path / "path").mkdir()
    script(tmp_path / "path" / "nvcc", f'exec {real}/bin/nvcc "$@"')
    assert folders.find_toolkit("13.0").home == real


def test_a_toolkit_that_cannot_be_linked_with_is_passed_over(folders: ModuleType, tmp_path: Path) -> None:
    wheels = toolkit(tmp_path / "site-packages" / "nvidia" / "cu13", "13.2")
    (wheels / "lib64" / "libcudart.so").rename(wheels / "lib64" / "libcudart.so.13")
    assert folders.find_toolkit("13.0") is None


@pytest.mark.parametrize(
    ("include", "library"),
    [("include", "lib/x86_64-linux-gnu"), ("targets/x86_64-linux/include", "targets/x86_64-linux/lib")],
    ids=["Debian", "conda"],
)
def test_other_layouts(folders: ModuleType, tmp_path: Path, include: str, library: str) -> None:
    real = toolkit(tmp_path / "local" / "cuda-13.0", "13.0")
    for before, after in (("include/cuda_runtime.h", include), ("lib64/libcudart.so", library)):
        (real / after).mkdir(parents=True, exist_ok=True)
        (real / before).rename(real / after / Path(before).name)
    assert folders.find_toolkit("13.0") == (real, real / include, real / library)


@pytest.mark.parametrize("wanted", ["", "1"])
def test_a_named_folder_that_is_no_toolkit_is_said(
    folders: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    wanted: str,
) -> None:
    import torch

    monkeypatch.setattr(folders, "WANTED", wanted)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    if wanted:
        with pytest.raises(SystemExit, match=f"CUDA_HOME, {tmp_path}, holds no whole toolkit of CUDA 13.0"):
            folders.extension()
    else:
        assert folders.extension()["ext_modules"]
        assert f"WITHOUT its CUDA kernels: CUDA_HOME, {tmp_path}" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        (None, "8.0;9.0+PTX"),
        ("7.5 8.0 8.6 9.0 10.0 12.0+PTX", "8.0;8.6;9.0;10.0;12.0+PTX"),
        ("Volta;Turing;Ampere", "Ampere"),
        ("7.0;7.5+PTX", "8.0;9.0+PTX"),
    ],
)
def test_architectures_that_the_kernels_are_not_for_are_left_out(
    folders: ModuleType, monkeypatch: pytest.MonkeyPatch, named: str | None, expected: str
) -> None:
    if named is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", named)
    assert folders.architectures() == expected


def test_elsewhere_than_on_linux_it_is_left_out(
    run_setup: RunSetup, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "ext_modules" not in run_setup("")[1]
    assert "WITHOUT its compiled extension: it is for Linux only" in capfd.readouterr().err


def test_a_toolkit_of_another_major_version_is_passed_over(folders: ModuleType, tmp_path: Path) -> None:
    older = toolkit(tmp_path / "local" / "cuda-12.8", "12.8")
    toolkit(tmp_path / "local" / "cuda-13.0", "13.0")
    assert folders.find_toolkit("12.6").home == older


def test_cuda_is_added_where_torch_has_it_and_a_toolkit_is_found(
    folders: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from torch.utils import cpp_extension

    monkeypatch.setattr(folders, "WANTED", "")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    (module,) = folders.extension()["ext_modules"]
    assert not [source for source in module.sources if "cuda" in source]
    real = toolkit(tmp_path / "local" / "cuda-13.0", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(real))  # where the environment is read, on import
    (module,) = folders.extension()["ext_modules"]
    assert os.environ["CUDA_HOME"] == str(real)
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc" / "cuda").glob("*.cu")} <= set(module.sources)


@pytest.mark.parametrize("line", ["exit 1", "exec no-such-program", None])
def test_a_compiler_that_does_not_run_is_passed_over(
    folders: ModuleType, tmp_path: Path, line: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = toolkit(tmp_path / "local" / "cuda-13.1", "13.1")
    script(broken / "bin" / "nvcc", line or "")
    if line is None:
        (broken / "bin" / "nvcc").write_bytes(b"\x7fELF of another machine")
    assert folders.find_toolkit("13.0") is None
    assert f"{broken} is passed over" in capfd.readouterr().err
    sound = toolkit(tmp_path / "local" / "cuda-13.0", "13.0")
    assert folders.find_toolkit("13.0").home == sound


@pytest.mark.parametrize("fails", ["check", "architecture", "cuda", "both", "nothing"])
def test_if_the_cuda_part_fails_the_rest_is_built(
    folders: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    fails: str,
) -> None:
    """setup.py and torch decide; setuptools is kept from compiling."""
    import torch
    from torch.utils import cpp_extension

    def check(*versions: object) -> None:
        if fails == "check":
            raise RuntimeError("this gcc is too new for that CUDA")
        if fails == "architecture":
            raise ValueError("Unknown CUDA arch (12.0f) or GPU not supported")

    def compile_(self: object, ext: setuptools.Extension) -> None:
        cuda = any(source.endswith(".cu") for source in ext.sources)
        if fails == "both" or (fails == "cuda" and cuda):
            raise CompileError("the compiler fails")
        built.append(ext)

    built: list[setuptools.Extension] = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(toolkit(tmp_path / "local" / "cuda-13.0", "13.0")))
    monkeypatch.setattr(cpp_extension, "_check_cuda_version", check)
    monkeypatch.setattr(build_ext, "build_extension", compile_)
    for wanted in ("", "1"):
        monkeypatch.setattr(folders, "WANTED", wanted)
        built.clear()
        arguments = folders.extension()
        command = arguments["cmdclass"]["build_ext"](setuptools.Distribution(arguments))
        command.ensure_finalized()
        command.compiler = new_compiler()
        if wanted and fails != "nothing":
            with pytest.raises(SystemExit, match=r"QUAILORA_EXT=1, but the CUDA kernels cannot be built: .*Error"):
                command.build_extensions()
            continue
        command.build_extensions()
        complaints = capfd.readouterr().err
        assert ("WITHOUT its CUDA kernels" in complaints) == (fails != "nothing")
        assert ("WITHOUT its compiled extension" in complaints) == (fails == "both")
        if fails != "both":
            (ext,) = built
            assert ext is command.extensions[0]
            assert any("cuda" in text for text in (*ext.sources, *ext.libraries)) == (fails == "nothing")
            assert ext._full_name == "quailora._C"  # as setuptools has noted it


def test_the_extension_can_be_left_out(run_setup: RunSetup, capfd: pytest.CaptureFixture[str]) -> None:
    assert "ext_modules" not in run_setup("0")[1]
    assert "ext_modules" in run_setup("1")[1]
    assert capfd.readouterr().err == ""


def test_without_torch_the_package_is_pure(
    run_setup: RunSetup, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "ext_modules" not in run_setup("")[1]
    assert "WITHOUT its compiled extension: torch is not seen" in capfd.readouterr().err
    with pytest.raises(SystemExit, match=r"QUAILORA_EXT=1.*--no-build-isolation"):
        run_setup("1")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what the distribution is made of."""
    copy = tmp_path / "source"
    for folder in ("quailora", "kernels", "csrc"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for file in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    return copy


def build(source: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *command],
        cwd=source,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("wanted", ["", pytest.param("1", marks=pytest.mark.slow)])
def test_without_a_compiler(source: Path, wanted: str) -> None:
    run = build(source, "build", QUAILORA_EXT=wanted, CC="no-such-compiler", CXX="no-such-compiler")
    if wanted == "1":
        assert run.returncode != 0
        assert "QUAILORA_EXT=1, but the compiled extension cannot be built" in run.stderr
    else:
        assert run.returncode == 0
        assert "WITHOUT its compiled extension" in run.stderr
        assert [*source.glob("build/lib*/quailora/calibration/gram.py")]
        assert not [*source.rglob("*.so")]


@pytest.mark.slow  # it compiles everything
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_a_wheel_made_from_the_source_distribution_works(source: Path, tmp_path: Path) -> None:
    run = build(source, "sdist", QUAILORA_EXT="0")  # as where torch is not seen: the sources are in it all the same
    assert run.returncode == 0, run.stderr
    with tarfile.open(next(source.glob("dist/*.tar.gz"))) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    install = ["-m", "pip", "wheel", "--no-cache-dir", "--no-build-isolation", "--no-deps", "--wheel-dir", tmp_path]
    subprocess.run([sys.executable, *install, unpacked], env=os.environ | {"QUAILORA_EXT": "1"}, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    code = (
        "import torch; from quailora import _C; from quailora.ops import extension; h = torch.zeros(3, 3)\n"
        "extension.gram_(h, torch.ones(2, 3)); print(_C.__file__, int(h.sum()))"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    where, total = run.stdout.split()
    assert Path(where).parent == tmp_path / "installed" / "quailora"
    assert total == "12"  # six values of the lower triangle, two tokens each
    model = tiny.checkpoint(tmp_path / "model")
    test_training.tokenizer().save_pretrained(model)
    (tmp_path / "data.txt").write_text(" ".join(test_training.TEXTS))
    options = ["--data", "data.txt", "--output", "initial", "--rank", "4", "--sequence-length", "16", "--samples", "8"]
    init = [sys.executable, "-m", "quailora", "init", "model", *options, "--no-progress"]
    subprocess.run(init, cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert (tmp_path / "initial" / "adapter_model.safetensors").is_file()
