"""bf16 and fp16 products on a CPU: torch's own, and those computed in fp32 and rounded, as quailora does if the CPU has
no instructions for them.

    python benchmarks/kernels/half.py [--tokens 2048] [--rounds 5] [--json PATH]

The products are those of a block of SmolLM2-135M and of its head, for that many tokens, and causal attention over 512.
Each result is first compared with fp64. The floor is the product in fp32 alone, without conversion or rounding.
"""

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

import quailora
from benchmarks.common.timing import Timing, alternate, describe, keep, require
from quailora.ops.cpu_matmul import Float32Products

# Name -> what is computed, and the shapes of its operands for a number of tokens.
PRODUCTS: dict[str, tuple[Callable[..., Tensor], Callable[[int], list[tuple[int, ...]]]]] = {
    "q": (linear, lambda t: [(t, 576), (576, 576)]),
    "gate": (linear, lambda t: [(t, 576), (1536, 576)]),
    "down": (linear, lambda t: [(t, 1536), (576, 1536)]),
    "head, 512 tokens": (linear, lambda t: [(512, 576), (49152, 576)]),
    "attention": (partial(scaled_dot_product_attention, is_causal=True), lambda t: [(t // 512, 9, 512, 64)] * 3),
}


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


HEAD = """\
| dtype | product | torch | in fp32, rounded | floor | times |
| --- | --- | ---: | ---: | ---: | ---: |"""


def line(row: Mapping[str, Any]) -> str:
    """A row of the Markdown table under HEAD."""
    own, ours, floor = (Timing(tuple(row["seconds"][candidate])) for candidate in ("torch", "ours", "fp32"))
    return (
        f"| {row['dtype']} | {row['product']} | {own} | {ours} | {1e3 * floor.median:.3g} ms | {own.over(ours):.1f} |"
    )


def table(record: Mapping[str, Any]) -> str:
    """Markdown."""
    return "\n".join([HEAD, *map(line, record["rows"])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="a multiple of 512")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()

    cpu = torch.device("cpu")
    services = quailora.backends(cpu)
    taken = (f"{name} {services[f'{name}_products'].backend}" for name in ("bf16", "fp16"))
    print(f"{describe(cpu)}; quailora takes {', '.join(taken)}\n")
    print(HEAD)
    rows: list[dict[str, Any]] = []
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        for what, (product, shapes) in PRODUCTS.items():
            operands = [torch.randn(shape).to(dtype) for shape in shapes(options.tokens)]
            wide = [each.float() for each in operands]
            exact = product(*(each.double() for each in operands))

            def ours(product: Callable[..., Tensor] = product, operands: list[Tensor] = operands) -> Tensor:
                with Float32Products(operands[0].dtype):
                    return product(*operands)

            own: Callable[[], Tensor] = partial(product, *operands)
            for who, run in (("torch", own), ("ours", ours)):
                require(error(run(), exact), torch.finfo(dtype).eps, f"{what} in {name} by {who}")
            times = alternate({"torch": own, "ours": ours, "fp32": partial(product, *wide)}, options.rounds)
            seconds = {candidate: timing.seconds for candidate, timing in times.items()}
            rows.append({"dtype": name, "product": what, "seconds": seconds})
            print(line(rows[-1]), flush=True)
    keep(options.json, cpu, {"tokens": options.tokens, "rows": rows})


if __name__ == "__main__":
    main()
