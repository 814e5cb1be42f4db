"""The compiled accumulation of H against torch.addmm in fp32, and against what the machine's matrix units can do.

    python benchmarks/gram.py [--tokens 2048] [--features 576 1536 2048 4096] [--rounds 9]

Each result is first compared with fp64. `addmm` is H + Xᵀ X by torch, all of the square, with X given to it in fp32.
The shares are of the rate at which the n (n + 1) / 2 values of the triangle come, of the rate of torch's own product of
two 2048 x 2048 matrices, of that dtype and of bf16, a round of which follows each run. Where the processor multiplies
bf16 by instructions of their own (AVX512-BF16, AMX), the latter comes near to its peak, and fp32 cannot.
"""

import argparse
from functools import partial

import torch
from timing import alternate
from torch import Tensor

from quailora import extension

PEAK = 2048


def error(x: Tensor) -> float:
    """Relative Frobenius error of the triangle, against fp64."""
    h = torch.zeros(x.shape[1], x.shape[1])
    extension.gram_(h, x)
    exact = (x.double().T @ x.double()).tril()
    return float((h.double() - exact).norm() / exact.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--features", type=int, nargs="+", default=[576, 1536, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    if reason := extension.obstacle(torch.device("cpu")):
        parser.exit(1, f"quailora._C: {reason}\n")
    from quailora import _C

    print(
        f"{_C.cpu_path()}, {options.tokens} tokens, median of {options.rounds} rounds, ± half the middle half's range\n"
    )
    print("| threads | dtype | features | error | addmm | ours | times | of its matmul | of bf16 matmul |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    squares = {dtype: torch.randn(PEAK, PEAK).to(dtype) for dtype in (torch.bfloat16, torch.float32)}
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        for dtype, square in squares.items():
            peak = squares[torch.bfloat16]
            for features in options.features:
                x = torch.randn(options.tokens, features).to(dtype)
                wide, h, sums = x.float(), torch.zeros(features, features), torch.zeros(features, features)
                off = error(x)
                times = alternate(
                    {
                        "addmm": partial(torch.addmm, sums, wide.T, wide, out=sums),
                        "ours": partial(extension.gram_, h, x),
                        "matmul": partial(torch.matmul, square, square),
                        "bf16 matmul": partial(torch.matmul, peak, peak),
                    },
                    options.rounds,
                )
                # Relative to the peak: multiply-adds over multiply-adds, then time over time.
                work = options.tokens * features * (features + 1) / 2 / PEAK**3
                print(
                    f"| {threads} | {str(dtype).removeprefix('torch.')} | {features} | {off:.1e} "
                    f"| {1e3 * times['addmm'].median:.1f} ms ± {50 * times['addmm'].spread:.0f} % "
                    f"| {1e3 * times['ours'].median:.1f} ms ± {50 * times['ours'].spread:.0f} % "
                    f"| {times['addmm'].over(times['ours']):.1f} "
                    f"| {100 * work * times['matmul'].over(times['ours']):.0f} % "
                    f"| {100 * work * times['bf16 matmul'].over(times['ours']):.0f} % |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
