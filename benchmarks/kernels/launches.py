"""How often the host launches something on a GPU to solve a block of Llama 2, counted without a GPU.

    python benchmarks/kernels/launches.py [--shapes 7b] [--rank 64] [--json PATH]

`solve_group` runs with the default solver and damping on tensors that have shapes only, from NF4 with double
quantization, with H as the forward pass leaves it. Each operation of torch that is not a view counts as one launch,
which is the least it makes: decompositions, which stand apart, are loops of cuSOLVER's. So does each Triton kernel.
Eigenproblems are not among them: the host solves them.
At about 5 µs each, they are time of the host that the GPU waits for unless it has more to do.
"""

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.common.fake_cuda import CUDA, Indexing, fake_cuda
from benchmarks.common.timing import keep
from benchmarks.kernels.solver import LLAMA_2, groups
from quailora import ops
from quailora.quantization.bitsandbytes_weights import FourBit, NestedAbsmax
from quailora.solvers import krylov
from quailora.solvers.config import DEFAULT_DAMPING, SolverConfig
from quailora.solvers.inputs import Linear
from quailora.solvers.problem import to_floats
from quailora.solvers.solve import solve_group

# Beside views. prim.device is a question, not an operation.
_NO_LAUNCH = {"prim.device", "aten.empty", "aten.empty_like", "aten.empty_strided", "aten.new_empty", "aten.lift_fresh"}
DECOMPOSITIONS = {
    "aten._linalg_eigh": "eigenproblem",
    "aten._linalg_svd": "SVD",
    "aten.linalg_qr": "QR",
    "aten.linalg_cholesky_ex": "Cholesky",
}

Counts = dict[str, int]


class _Operations(TorchDispatchMode):
    """Counts torch's operations on the GPU."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        name = str(function.overloadpacket)
        on_gpu = any(isinstance(x, Tensor) and x.is_cuda for x in tree_leaves((results, args, kwargs)))
        if on_gpu and not function.is_view and name not in _NO_LAUNCH:
            if name in DECOMPOSITIONS:  # with its shape and dtype
                name += f" {' × '.join(map(str, args[0].shape))}, {str(args[0].dtype).removeprefix('torch.')}"
            self.counts[name] += 1
        return results


class _Copies(Indexing):
    """Counts copies."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def copied(self, source: Tensor) -> None:
        self.counts["aten.copy_"] += 1


def _read(values: Tensor) -> list[float]:
    """What the host reads of a sound problem: all is finite and positive, and H symmetric, says the third."""
    return [0.0 if i == 2 else 1.0 for i in range(len(values))]


def _nothing_gained(gains: Sequence[Tensor]) -> list[float]:
    """What krylov reads of layers that are done."""
    return [0.0 for _ in to_floats(gains)]


class _Accumulated:
    """H as the forward pass leaves it: one triangle."""

    def __init__(self, features: int) -> None:
        self.h = torch.empty(features, features, device=CUDA)

    def matrix(self) -> Tensor:
        ops.mirror_(self.h)
        return self.h


def linear(m: int, n: int, rank: int) -> Linear:
    """Without values: bf16, and NF4 with double quantization."""
    blocks = m * n // 64
    absmax = NestedAbsmax(
        torch.empty(blocks, dtype=torch.uint8, device=CUDA),
        torch.empty(256, device=CUDA),
        torch.empty(-(-blocks // 256), device=CUDA),
        torch.empty((), device=CUDA),
        256,
    )
    codes = torch.empty(m * n // 2, dtype=torch.uint8, device=CUDA)
    quantized = FourBit(codes, absmax, 64, "nf4", (m, n), torch.bfloat16)
    return Linear(torch.empty(m, n, dtype=torch.bfloat16, device=CUDA), quantized, rank)


def count(model: str, rank: int) -> dict[str, Counts]:
    """Linears that share an input -> operation of torch, or Triton kernel -> launches."""
    found = {}
    for group in groups(model):
        counts: Counter[str] = Counter()

        def launch(kernel: Any, *args: Any, counts: Counter[str] = counts, **keywords: Any) -> None:
            counts[f"triton.{kernel.fn.__name__}"] += 1

        with (
            fake_cuda(launch, indexing=_Copies(counts)),
            patch.object(FakeTensor, "tolist", _read),
            patch.object(krylov, "to_floats", _nothing_gained),
        ):
            linears = [linear(m, group.columns, rank) for m in group.rows]
            gram = _Accumulated(group.columns)
            with _Operations(counts):
                solve_group(linears, gram, SolverConfig(damping=DEFAULT_DAMPING), overwrite_weights=True)
        found[group.name] = dict(counts.most_common())
    return found


def total(groups: Mapping[str, Counts]) -> int:
    return sum(sum(counts.values()) for counts in groups.values())


def table(record: Mapping[str, Any]) -> str:
    """Launches by group and by operation, and the decompositions, as Markdown."""
    groups = record["groups"]
    block: Counter[str] = sum((Counter(counts) for counts in groups.values()), Counter())
    lines = ["| linears | torch | decompositions | Triton | all |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, counts in [*groups.items(), ("**a block**", block)]:
        triton = sum(number for key, number in counts.items() if key.startswith("triton."))
        decompositions = sum(number for key, number in counts.items() if key.partition(" ")[0] in DECOMPOSITIONS)
        whole = sum(counts.values())
        lines.append(f"| {name} | {whole - triton - decompositions} | {decompositions} | {triton} | {whole} |")
    lines += ["", "| of the block | launches |", "| --- | ---: |"]
    shown = block.most_common(12)
    lines += [f"| `{name.removeprefix('aten.')}` | {number} |" for name, number in shown]
    rest = sum(block.values()) - sum(number for _, number in shown)
    lines.append(f"| {len(block) - len(shown)} others | {rest} |")
    found = [(*name.partition(" "), number) for name, number in block.most_common()]
    dense = [(DECOMPOSITIONS[name], of, number) for name, _, of, number in found if name in DECOMPOSITIONS]
    if dense:
        lines += ["", "| decompositions of the block | of | number |", "| --- | --- | ---: |"]
        lines += [f"| {kind} | {of} | {number} |" for kind, of, number in dense]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=LLAMA_2, default="7b")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--json", type=Path, help="write the counts to this file")
    arguments = parser.parse_args()
    record = {"model": arguments.shapes, "rank": arguments.rank, "groups": count(arguments.shapes, arguments.rank)}
    print(table(record))
    keep(arguments.json, torch.device("cpu"), record)


if __name__ == "__main__":
    main()
