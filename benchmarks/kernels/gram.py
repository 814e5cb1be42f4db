"""The compiled accumulation of H, compared with torch.addmm in fp32 and with the peak of the machine's matrix units.

    python benchmarks/kernels/gram.py [--tokens 2048] [--features 576 1536 2048 4096] [--rounds 9] [--json PATH]

Each result is first compared with fp64. `addmm` is H + Xᵀ X by torch, of the full square, with X in fp32.
The floor is for the triangle: its multiply-adds at the rate of the faster of the products below, or a copy of the bytes
of X and of the triangle, read and written, whichever takes longer.
The shares compare the FLOPs per second on the n (n + 1) / 2 values of the triangle with those of torch's own product of
two 2048 x 2048 matrices, in the same dtype and in bf16; one round of it follows each run. If the processor has bf16
instructions (AVX512-BF16, AMX), the bf16 product comes near its peak, which fp32 cannot reach.
"""

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.timing import Timing, alternate, copy_rate, keep, require
from quailora.ops import extension

PEAK = 2048

# Relative, in the Frobenius norm: several times the rounding of fp32 sums, including addmm's longer ones.
TOLERANCE = 1e-6


def error(h: Tensor, x: Tensor) -> float:
    """Relative Frobenius error of the triangle of H, against fp64."""
    exact = (x.double().T @ x.double()).tril()
    return float((h.tril().double() - exact).norm() / exact.norm())


def work(tokens: int, features: int, element: int) -> tuple[float, float]:
    """FLOPs of the triangle, and bytes: X, with `element` bytes each, and the triangle of H, read and written."""
    triangle = features * (features + 1) / 2
    return 2 * tokens * triangle, element * tokens * features + 8 * triangle


HEAD = """\
| threads | dtype | features | error | addmm | ours | floor | times | of its matmul | of bf16 matmul |
| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"""


def line(row: Mapping[str, Any]) -> str:
    """A row of the Markdown table under HEAD."""
    addmm, ours = (Timing(tuple(row["seconds"][candidate])) for candidate in ("addmm", "ours"))
    return (
        f"| {row['threads']} | {row['dtype']} | {row['features']} | {row['error']:.1e} | {addmm} | {ours} "
        f"| {1e3 * row['floor']:.3g} ms | {addmm.over(ours):.1f} "
        f"| {100 * row['shares']['matmul']:.0f} % | {100 * row['shares']['bf16 matmul']:.0f} % |"
    )


def table(record: Mapping[str, Any]) -> str:
    """Markdown."""
    return "\n".join([HEAD, *map(line, record["rows"])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--features", type=int, nargs="+", default=[576, 1536, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    if reason := extension.obstacle(torch.device("cpu")):
        parser.exit(1, f"quailora._C: {reason}\n")
    from quailora import _C

    print(
        f"{_C.cpu_path()}, {options.tokens} tokens, median of {options.rounds} rounds, ± half the middle half's range\n"
    )
    print(HEAD)
    rows: list[dict[str, Any]] = []
    squares = {dtype: torch.randn(PEAK, PEAK).to(dtype) for dtype in (torch.bfloat16, torch.float32)}
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        rate = copy_rate(torch.device("cpu"), 8 * PEAK**2)
        for dtype, square in squares.items():
            peak = squares[torch.bfloat16]
            name = str(dtype).removeprefix("torch.")
            for features in options.features:
                x = torch.randn(options.tokens, features).to(dtype)
                wide, h, sums = x.float(), torch.zeros(features, features), torch.zeros(features, features)
                extension.gram_(h, x)
                off = error(h, x)
                require(off, TOLERANCE, f"ours, of {features} features in {name},")
                require(error(torch.addmm(sums, wide.T, wide), x), TOLERANCE, f"addmm, of {features} features,")
                times = alternate(
                    {
                        "addmm": partial(torch.addmm, sums, wide.T, wide, out=sums),
                        "ours": partial(extension.gram_, h, x),
                        "matmul": partial(torch.matmul, square, square),
                        "bf16 matmul": partial(torch.matmul, peak, peak),
                    },
                    options.rounds,
                )
                flops, moved = work(options.tokens, features, x.element_size())
                relative = flops / (2 * PEAK**3)  # to the FLOPs of the matmul
                floor = max(relative * min(times["matmul"].median, times["bf16 matmul"].median), moved / rate)
                shares = {
                    baseline: relative * times[baseline].over(times["ours"]) for baseline in ("matmul", "bf16 matmul")
                }
                rows.append(
                    {"threads": threads, "dtype": name, "features": features, "error": off, "floor": floor}
                    | {"flops": flops, "bytes": moved, "shares": shares}
                    | {"seconds": {candidate: timing.seconds for candidate, timing in times.items()}}
                )
                print(line(rows[-1]), flush=True)
    keep(options.json, torch.device("cpu"), {"path": _C.cpu_path(), "tokens": options.tokens, "rows": rows})


if __name__ == "__main__":
    main()
