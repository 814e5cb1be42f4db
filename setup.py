"""The packages, and the compiled extension `quailora._C` where it can be built; all else is in pyproject.toml.

The extension is built against the torch that is installed here, which pip hides from a build unless it is told
`--no-build-isolation`. torch is no build requirement on purpose: pip would fetch one of its own, of several gigabytes
and perhaps of another release, and an extension works with the release that it was built against.

QUAILORA_EXT=0 leaves the extension out, QUAILORA_EXT=1 makes it an error if it cannot be built. By default the package
is then installed without, and works: `quailora.backends()` says what serves instead, and `pip install -v` shows why. If
it is only the CUDA part that cannot be built, the part for CPUs is. It is for Linux: elsewhere it would be one thread,
slower than what torch does itself.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from setuptools import find_packages, setup
from setuptools.errors import BaseError, CCompilerError

WANTED = os.environ.get("QUAILORA_EXT", "")
if WANTED not in ("", "0", "1"):
    raise SystemExit(f"quailora: QUAILORA_EXT is {WANTED!r}; it may be 0, 1 or unset")
ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
SYSTEM = Path("/usr/local")

# What a build that fails raises: setuptools, torch (RuntimeError for compilers and ninja, ValueError for architectures
# that it does not know), or a compiler that is not there.
FAILURES = (BaseError, CCompilerError, RuntimeError, ValueError, OSError, subprocess.CalledProcessError)


def leave_out(reason: str, part: str = "compiled extension") -> None:
    """Go on without the extension or a part of it, and say so; or stop, if it was asked for."""
    if WANTED == "1":
        raise SystemExit(f"quailora: QUAILORA_EXT=1, but the {part} cannot be built: {reason}")
    line = "*" * 80
    note = "It will work, and collect its statistics more slowly. QUAILORA_EXT=1 makes this an error."
    print(f"{line}\nquailora is installed WITHOUT its {part}: {reason}\n{note}\n{line}", file=sys.stderr)


def toolkits() -> Iterator[Path]:
    """Folders that may hold a CUDA toolkit, those first that were named on purpose."""
    if "CUDA_HOME" in os.environ:
        yield Path(os.environ["CUDA_HOME"])
    if nvcc := shutil.which("nvcc"):
        yield Path(nvcc).resolve().parent.parent
    yield from sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*"), reverse=True)
    yield from sorted(SYSTEM.glob("cuda*"), reverse=True)


class Toolkit(NamedTuple):
    """A CUDA toolkit, with the folders of its headers and libraries."""

    home: Path
    include: Path
    library: Path


def find_toolkit(cuda: str) -> Toolkit | None:
    """The first toolkit of the major version of `cuda`: the runtime's interface is the same within one.

    It has compiler, headers and library, where NVIDIA, conda or Debian put them. The nvcc on the search path may be a
    script that calls the real one, with no toolkit around it; toolkits from PyPI may have no library that a linker
    finds.
    """
    for home in toolkits():
        headers = [*home.glob("include/cuda_runtime.h"), *home.glob("targets/*/include/cuda_runtime.h")]
        libraries = [
            *home.glob("lib*/libcudart.so"),
            *home.glob("lib/*/libcudart.so"),
            *home.glob("targets/*/lib/libcudart.so"),
        ]
        if headers and libraries and (release(home) or "").split(".")[0] == cuda.split(".")[0]:
            return Toolkit(home, headers[0].parent, libraries[0].parent)
    return None


def release(home: Path) -> str | None:
    """Of the compiler in a toolkit, such as 13.0; None where there is none that runs."""
    nvcc = home / "bin" / "nvcc"
    if not nvcc.exists():
        return None
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"quailora: {home} is passed over, its compiler does not run: {error}", file=sys.stderr)
        return None
    found = re.search(r"release (\d+\.\d+)", text)
    return found.group(1) if found else None


def architectures() -> str:
    """What the kernels are compiled for: of what TORCH_CUDA_ARCH_LIST names that which they can be, or a default."""
    named = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    older = ("Kepler", "Maxwell", "Pascal", "Volta", "Turing", *(f"{major}." for major in range(3, 8)))
    # Code of 9.0 as PTX is what later processors compile for themselves.
    return ";".join(each for each in named if not each.startswith(older)) or "8.0;9.0+PTX"


def sources(*patterns: str) -> list[str]:
    """Relative to the root, as a source distribution needs them."""
    return sorted(path.relative_to(ROOT).as_posix() for pattern in patterns for path in CSRC.glob(pattern))


def extension() -> dict[str, Any]:
    """The arguments of `setup` that build `quailora._C`; none if it is to be left out."""
    if WANTED == "0":
        return {}
    if sys.platform != "linux":
        leave_out("it is for Linux only")
        return {}
    if not CSRC.exists():
        leave_out(f"its sources are not in {ROOT}")
        return {}
    try:
        import torch
    except ImportError:
        leave_out("torch is not seen by the build; with torch installed, `pip install --no-build-isolation` shows it")
        return {}

    toolkit = None
    if torch.version.cuda:
        toolkit = find_toolkit(torch.version.cuda)
        if toolkit:
            os.environ["CUDA_HOME"] = str(toolkit.home)  # read when torch.utils.cpp_extension is imported
            os.environ["TORCH_CUDA_ARCH_LIST"] = architectures()
        elif home := os.environ.get("CUDA_HOME"):
            leave_out(f"CUDA_HOME, {home}, holds no whole toolkit of CUDA {torch.version.cuda}", "CUDA kernels")
        else:
            print(f"quailora: no CUDA {torch.version.cuda} toolkit found, building for CPUs only", file=sys.stderr)
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    # torch's loop over threads stands in its headers, and is one thread where the compiler is not told of OpenMP. The
    # runtime is then the one that torch has loaded.
    openmp = "-fopenmp"

    def module(cuda: bool) -> Any:
        build: Any = CUDAExtension if cuda else CppExtension
        return build(
            name="quailora._C",
            sources=sources("extension.cpp", "cpu/*.cpp", *(["gram_cuda.cpp", "cuda/*.cu"] if cuda else [])),
            depends=sources("*.h", "cpu/*.h", "cuda/*.h", "cuda/*.cuh"),
            include_dirs=[str(toolkit.include)] if toolkit and cuda else [],
            library_dirs=[str(toolkit.library)] if toolkit and cuda else [],
            extra_compile_args={"cxx": ["-O3", "-g0", openmp], "nvcc": ["-O3"]},
            extra_link_args=[openmp],
        )

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            """With CUDA where there is a toolkit; if that fails, for CPUs; if that fails too, go on without."""
            (ext,) = self.extensions
            for cuda in [True, False] if toolkit else [False]:
                # What setuptools itself has noted of the extension stays. While it builds, it is not to be optional:
                # setuptools would keep some of the failures to itself.
                vars(ext).update(vars(module(cuda)), optional=False)
                try:
                    super().build_extensions()
                    break
                except FAILURES as error:
                    leave_out(f"{type(error).__name__}: {error}", "CUDA kernels" if cuda else "compiled extension")
            ext.optional = True  # so that setuptools copies what there is

    return {"ext_modules": [module(cuda=toolkit is not None)], "cmdclass": {"build_ext": Build}}


def packages() -> list[str]:
    """What is installed. An editable install makes `benchmarks` and `tests` importable too, so that neither needs the
    repository on sys.path, where the folder `kernels/` would hide the Hugging Face package of that name."""
    extra = ["benchmarks*", "tests*"] if {"editable_wheel", "develop"} & set(sys.argv) else []
    return [*find_packages(include=["quailora*", *extra]), "quailora.kernels"]


setup(
    packages=packages(),
    # A top-level import package named `kernels` would shadow the Hugging Face package that transformers imports.
    package_dir={"quailora.kernels": "kernels"},
    **extension(),
)
