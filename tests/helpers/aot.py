"""Compile a kernel for a GPU that is not there, and read what it takes: registers, shared memory, instructions."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from quailora.kernels.settings import FP_FUSION, SHARED_BYTES
from quailora.kernels.variants import Variant

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Target:
    """A GPU. `shared_bytes`: what one block may have."""

    name: str
    gpu: GPUTarget
    shared_bytes: int


def _gpu(name: str) -> GPUTarget:
    return GPUTarget("hip", name, 64) if name.startswith("gfx") else GPUTarget("cuda", int(name[len("sm_") :]), 32)


TARGETS = {name: Target(name, _gpu(name), shared_bytes) for name, shared_bytes in SHARED_BYTES.items()}


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes. Instructions are the machine's own, counted by name as they stand in the code."""

    registers: int  # per thread
    spills: int  # CUDA: accesses to local memory in the code; AMD: registers spilled
    stack_bytes: int  # per thread
    shared_bytes: int  # per block
    threads: int  # per block
    instructions: Counter[str]
    loop: Counter[str]  # the longest innermost loop: where the time goes

    def count(self, pattern: str) -> int:
        """Instructions whose name matches the regular expression from its start."""
        return _count(self.instructions, pattern)

    @property
    def tensor_core_instructions(self) -> int:
        return self.count(r"HMMA|HGMMA|UTC\w*MMA|v_mfma")

    @property
    def wide_loads(self) -> int:
        """Loads of 16 bytes from global memory; a tensor memory access (TMA) moves at least as much."""
        return self.count(r"(LDG|LDGSTS)\.(\w+\.)*128|UTMALDG|(global|buffer)_load_(dwordx4|b128)")

    def loop_instructions_per_element(self, elements: int, pattern: str = "") -> float:
        """Instructions that threads execute in one turn of the loop, per element that the block handles in it."""
        return _count(self.loop, pattern) * self.threads / elements


def compile_for(target: Target, variant: Variant) -> CompiledKernel:
    """Compile as a launch on that GPU would; Triton keeps the result on disk, by the text of the kernel."""
    arguments = variant.kernel.arg_names
    source = ASTSource(
        fn=variant.kernel,
        signature={name: variant.signature.get(name, "constexpr") for name in arguments},
        constexprs=dict(variant.constexprs),
        attrs={(arguments.index(name),): [["tt.divisibility", 16]] for name in variant.attrs},
    )
    options = {
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        "enable_fp_fusion": FP_FUSION,
    }
    if variant.maxnreg is not None:
        options["maxnreg"] = variant.maxnreg
    return triton.compile(source, target=target.gpu, options=options)


def in_blocks(variant: Variant, size: int) -> Variant:
    """A variant with 4-bit codes, which are in blocks of 64, as a launch compiles it for smaller ones."""
    constants = dict(variant.constexprs)
    return replace(variant, constexprs=constants | {"BLOCKSIZE": size, "GRANULE": min(size, constants["GRANULE"])})


def resources(compiled: CompiledKernel) -> Resources:
    return _amd_resources(compiled) if "amdgcn" in compiled.asm else _nvidia_resources(compiled)


def faults(target: Target, variant: Variant) -> list[str]:
    """What of the variant does not fit the target, or is not as promised."""
    needs, found = resources(compile_for(target, variant)), []
    if needs.spills or needs.stack_bytes:
        found.append(f"{needs.spills} spills, {needs.stack_bytes} bytes of stack, with {needs.registers} registers")
    if needs.shared_bytes > target.shared_bytes:
        found.append(f"{needs.shared_bytes} bytes of shared memory, of {target.shared_bytes}")
    if variant.uses_tensor_cores and not needs.tensor_core_instructions:
        found.append("no tensor-core instruction")
    if variant.uses_wide_loads and not needs.wide_loads:
        found.append("no load of 16 bytes")
    return found


def _nvidia_resources(compiled: CompiledKernel) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run(NVIDIA_TOOLS / "cuobjdump", "-res-usage", file.name)
        code = disassembled(Path(file.name))
    [(registers, stack)] = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    instructions, loop = nvidia_instructions(code)
    return Resources(
        registers=int(registers),
        spills=_count(instructions, r"LDL|STL"),
        stack_bytes=int(stack),
        shared_bytes=compiled.metadata.shared,
        threads=compiled.metadata.num_warps * 32,
        instructions=instructions,
        loop=loop,
    )


def disassembled(cubin: Path) -> str:
    return _run(NVIDIA_TOOLS / "nvdisasm", "-c", "-ndf", str(cubin))


def nvidia_instructions(code: str) -> tuple[Counter[str], Counter[str]]:
    """All instructions of a kernel, and those of its longest innermost loop."""
    return _instructions(
        code,
        instruction=r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)",
        label=r"(\.L_x_\d+):",
        branch=r"BRA",
    )


def _amd_resources(compiled: CompiledKernel) -> Resources:
    code = compiled.asm["amdgcn"]
    facts = {name: int(value) for name, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", code, re.MULTILINE)}
    instructions, loop = _instructions(
        code, instruction=r"\t([a-z]\w+)(.*)", label=r"(\.LBB\w+):", branch=r"s_cbranch|s_branch"
    )
    return Resources(
        registers=facts["vgpr_count"],
        spills=facts["vgpr_spill_count"],
        stack_bytes=facts["private_segment_fixed_size"],
        shared_bytes=compiled.metadata.shared,
        threads=compiled.metadata.num_warps * 64,
        instructions=instructions,
        loop=loop,
    )


def _run(tool: Path, *arguments: str) -> str:
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def _count(instructions: Counter[str], pattern: str) -> int:
    return sum(number for name, number in instructions.items() if re.match(pattern, name))


def _instructions(code: str, instruction: str, label: str, branch: str) -> tuple[Counter[str], Counter[str]]:
    """All instructions, and those of the longest loop that holds no other."""
    names: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in code.splitlines():
        if found := re.match(label, line):
            labels[found[1]] = len(names)
        elif found := re.match(instruction, line):
            names.append(found[1])
            target = re.search(r"\.L\w+", found[2])
            if re.match(branch, found[1]) and target and target[0] in labels:  # a label seen before: backwards
                loops.append((labels[target[0]], len(names)))
    innermost = [
        (start, end)
        for start, end in loops
        if not any(start <= s and e <= end and (s, e) != (start, end) for s, e in loops)
    ]
    start, end = max(innermost, key=lambda loop: loop[1] - loop[0], default=(0, 0))
    # A branch to itself ends every kernel: that is no loop.
    return Counter(names), Counter(names[start:end] if end - start > 1 else [])
