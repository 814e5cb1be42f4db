"""Compile csrc/cuda/gram.cu for a GPU that is not there, and execute the PTX that nvcc makes of it."""

import itertools
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tests.emulation.ptx.machine import Block, Counters
from tests.emulation.ptx.memory import GlobalMemory
from tests.emulation.ptx.program import Program, parse
from tests.helpers import ROOT

SOURCE = ROOT / "csrc" / "cuda" / "gram.cu"
STEP_LIMIT = 1_000_000  # of a block: those here take some thousands


def find_nvcc() -> str | None:
    """The compiler of the toolkit that CUDA_HOME names, or of the search path, or of the newest in /usr/local."""
    usual = sorted(map(str, Path("/usr/local").glob("cuda*/bin")), reverse=True)
    named = [os.path.join(os.environ["CUDA_HOME"], "bin")] if "CUDA_HOME" in os.environ else []
    return shutil.which("nvcc", path=os.pathsep.join([*named, os.environ.get("PATH", ""), *usual]))


@dataclass(frozen=True)
class Compiled:
    ptx: str
    messages: str  # of the assembler, with what each kernel takes

    def entry(self, name: str) -> str:
        """The PTX of the one kernel whose mangled name contains `name`."""
        [text] = re.findall(rf"^\.visible \.entry \w*{name}\w*\(.*?^}}$", self.ptx, re.DOTALL | re.MULTILINE)
        return text

    def resources(self, name: str) -> str:
        """What the assembler says of that kernel."""
        [text] = re.findall(rf"Function properties for \w*{name}\w*\n(.*\n.*)", self.messages)
        return text


def compile_gram(nvcc: str, target: str, folder: Path, source: Path = SOURCE) -> Compiled:
    """For a target such as sm_90, with no torch; `folder` takes what nvcc writes."""
    flags = ["-std=c++17", "-O3", f"-arch={target}", "-cubin", "-Xptxas", "-v", "--keep", "--keep-dir", str(folder)]
    command = [nvcc, *flags, "-o", str(folder / "gram.cubin"), str(source)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return Compiled((folder / "gram.ptx").read_text(), run.stdout + run.stderr)


def emulated(entry: str) -> Program:
    """A kernel in what the emulator knows, which is what Triton emits.

    Triton has no structs as parameters: the one here becomes global memory, whose address is the parameter.
    """
    entry = re.sub(r"ld\.param(\.\S+\s+\S.*\[%)", r"ld.global\1", entry)
    entry = re.sub(r"mov\.b64(\s+%\w+), (\w+_param_0);", r"ld.param.u64\1, [\2];", entry)
    entry = re.sub(r"\.param \.align 8 \.b8 (\w+)\[\d+\]", r".param .u64 \1", entry)
    entry = re.sub(r"\.maxntid (\d+), 1, 1", r".reqntid \1", entry)
    entry = re.sub(r"\b_ZN4simt5bytesE\b", "global_smem", entry)
    return parse(entry.replace("cvta.to.global.u64", "mov.u64"))


def execute(
    entry: str,
    layout: str,
    values: Sequence[torch.Tensor | int],
    grid: tuple[int, int, int],
    shared_bytes: int,
) -> Counters:
    """Run a kernel whose one parameter is a struct of `layout` (as for `struct.pack`), with contiguous tensors for its
    pointers, which are read and written in place. Raises ptx.EmulationError for what a GPU would leave undefined."""
    program, memory, counters = emulated(entry), GlobalMemory(), Counters()
    packed = [
        memory.add(str(number), value.reshape(-1).view(torch.uint8).numpy())
        if isinstance(value, torch.Tensor)
        else value
        for number, value in enumerate(values)
    ]
    arguments = np.frombuffer(struct.pack(layout, *packed), np.uint8).copy()
    [(name, _)] = program.parameters
    parameters = {name: np.uint64(memory.add("arguments", arguments))}
    for z, y, x in itertools.product(*map(range, reversed(grid))):
        Block(program, parameters, memory, shared_bytes, (x, y, z), grid, counters).run(STEP_LIMIT)
    return counters
