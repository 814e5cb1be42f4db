"""The compiled accumulation of H, compared with torch.addmm in fp32 and with the peak of the machine's matrix units.

    python benchmarks/kernels/gram.py [--tokens 2048] [--features 576 1536 2048 4096] [--rounds 9] [--json PATH]

Each result is first compared with fp64. `addmm` is H + Xᵀ X by torch, of the full square, with X in fp32. On a GPU, if
there is one, `mm to fp32` is the same with X in bf16 and sums in fp32, 1024 tokens at a time, which is what there is
without the extension.
The floor is for the triangle: its multiply-adds at the rate of the faster of the products below, or a copy of the bytes
of X and of the triangle, read and written, whichever takes longer.
The shares compare the FLOPs per second on the n (n + 1) / 2 values of the triangle with those of torch's own product of
two square matrices, in the same dtype and in bf16; one round of it follows each run. If the processor has bf16
instructions (AVX512-BF16, AMX), the bf16 product comes near its peak, which fp32 cannot reach.
"""

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.timing import Timing, alternate, copy_rate, describe, keep, require
from quailora.modeling.devices import default_device
from quailora.ops import extension
from quailora.ops.precision import exact_products

PEAK = 2048  # side of the squares; four times that on a GPU

# Relative, in the Frobenius norm: several times the rounding of fp32 sums, including addmm's longer ones.
TOLERANCE = 1e-6

# Tokens and features, on a CPU and on a GPU.
SIZES = {"cpu": (2048, [576, 1536, 2048, 4096]), "cuda": (8192, [4096, 11008, 14336])}


# A stage of the CUDA kernel's loop, 32 tokens, by a warp: in bf16, aligned, compiled for sm_90 by CUDA 13.0. Of the
# additions, half are of every 16th stage only, and are left out.
PRODUCTS, OTHERS = 32, 188  # instructions: mma.m16n8k16, and those beside
PRODUCT_CYCLES = 4  # of one at the peak of an H100: 989 TFLOP/s, by 132 x 4 schedulers at 1.83 GHz
MMA_SHARE = 0.629  # of the peak: what mma, not wgmma, is taken to reach there (arXiv 2402.13499)


def expected_shares() -> tuple[float, float]:
    """Of an H100's peak in bf16, what the kernel reaches at least and at most: if a scheduler's products and its other
    instructions, one a cycle, never overlap, and if they always do. Waiting for memory is left out."""
    peak = PRODUCTS * PRODUCT_CYCLES
    multiplying = peak / MMA_SHARE
    return peak / (multiplying + OTHERS), peak / max(multiplying, OTHERS)


def error(h: Tensor, x: Tensor) -> float:
    """Relative Frobenius error of the triangle of H, against fp64."""
    exact = (x.double().T @ x.double()).tril()
    return float((h.tril().double() - exact).norm() / exact.norm())


def work(tokens: int, features: int, element: int) -> tuple[float, float]:
    """FLOPs of the triangle, and bytes: X, with `element` bytes each, and the triangle of H, read and written."""
    triangle = features * (features + 1) / 2
    return 2 * tokens * triangle, element * tokens * features + 8 * triangle


def mm_to_fp32(h: Tensor, x: Tensor) -> None:
    """h += xᵀ x by cuBLAS, of the whole square; 1024 tokens at a time, for tensor cores may truncate long sums."""
    for chunk in x.split(1024):
        h += torch.mm(chunk.T, chunk, out_dtype=torch.float32)


def measure(
    ours: Callable[[Tensor, Tensor], None], x: Tensor, squares: Mapping[torch.dtype, Tensor], rate: float, rounds: int
) -> dict[str, Any]:
    """A row of the record, for `ours` that adds to H what X (tokens, n) gives; the device copies `rate` bytes/s."""
    (tokens, features), name = x.shape, str(x.dtype).removeprefix("torch.")
    h, sums = (torch.zeros(features, features, device=x.device) for _ in range(2))
    wide = x.float()
    square, peak = squares[x.dtype], squares[torch.bfloat16]
    candidates: dict[str, Callable[[], object]] = {
        "addmm": partial(torch.addmm, sums, wide.T, wide, out=sums),
        "ours": partial(ours, h, x),
        "matmul": partial(torch.matmul, square, square),
        "bf16 matmul": partial(torch.matmul, peak, peak),
    }
    ours(h, x)
    off = error(h, x)
    require(off, TOLERANCE, f"ours, of {features} features in {name},")
    require(error(torch.addmm(sums, wide.T, wide), x), TOLERANCE, f"addmm, of {features} features,")
    errors = {}
    if x.is_cuda and x.dtype == torch.bfloat16:
        candidates["mm to fp32"] = partial(mm_to_fp32, sums, x)
        mm_to_fp32(sums.zero_(), x)
        errors["mm to fp32"] = error(sums, x)  # shown, not required: nothing of ours
    times = alternate(candidates, rounds)
    flops, moved = work(tokens, features, x.element_size())
    relative = flops / (2 * len(square) ** 3)  # to the FLOPs of the matmul
    floor = max(relative * min(times["matmul"].median, times["bf16 matmul"].median), moved / rate)
    shares = {baseline: relative * times[baseline].over(times["ours"]) for baseline in ("matmul", "bf16 matmul")}
    return (
        {"dtype": name, "features": features, "error": off, "errors": errors, "floor": floor}
        | {"flops": flops, "bytes": moved, "shares": shares}
        | {"seconds": {candidate: timing.seconds for candidate, timing in times.items()}}
    )


HEAD = """\
| threads | dtype | features | error | addmm | mm to fp32 | ours | floor | times | of its matmul | of bf16 matmul |
| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"""


def line(row: Mapping[str, Any]) -> str:
    """A row of the Markdown table under HEAD."""
    addmm, ours = (Timing(tuple(row["seconds"][candidate])) for candidate in ("addmm", "ours"))
    mm = Timing(tuple(row["seconds"]["mm to fp32"])) if "mm to fp32" in row["seconds"] else "—"
    return (
        f"| {row['threads']} | {row['dtype']} | {row['features']} | {row['error']:.1e} | {addmm} | {mm} | {ours} "
        f"| {1e3 * row['floor']:.3g} ms | {addmm.over(ours):.1f} "
        f"| {100 * row['shares']['matmul']:.0f} % | {100 * row['shares']['bf16 matmul']:.0f} % |"
    )


def table(record: Mapping[str, Any]) -> str:
    """Markdown."""
    return "\n".join([HEAD, *map(line, record["rows"])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, help="2048; on a GPU 8192")
    parser.add_argument("--features", type=int, nargs="+", help="576 1536 2048 4096; on a GPU 4096 11008 14336")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    device = default_device(None)
    if reason := extension.obstacle(device):
        parser.exit(1, f"quailora._C: {reason}\n")
    from quailora import _C

    on_gpu = device.type == "cuda"
    tokens, features = SIZES[device.type]
    tokens, features = options.tokens or tokens, options.features or features
    path = describe(device) if on_gpu else _C.cpu_path()
    print(f"{path}, {tokens} tokens, median of {options.rounds} rounds, ± half the middle half's range\n")
    print(HEAD)
    rows: list[dict[str, Any]] = []
    side = 4 * PEAK if on_gpu else PEAK
    squares = {dtype: torch.randn(side, side, device=device).to(dtype) for dtype in (torch.bfloat16, torch.float32)}
    for threads in [1] if on_gpu else sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        rate = copy_rate(device, 8 * side**2)
        for dtype in squares:
            for n in features:
                x = torch.randn(tokens, n, device=device).to(dtype)
                with exact_products(device):
                    rows.append({"threads": threads} | measure(extension.gram_, x, squares, rate, options.rounds))
                print(line(rows[-1]), flush=True)
    keep(options.json, device, {"path": path, "tokens": tokens, "rows": rows})


if __name__ == "__main__":
    main()
