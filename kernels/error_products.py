"""E P and Eᵀ A, E = W - Q, straight from the weight W and the packed Q, with E never in memory; and E itself.

Equivalent to
    error_product(weight, codes, right)     (weight.float() - Q.float()) @ right       (m, n) (n, r) -> (m, r)
    error_product_t(weight, codes, left)    (weight.float() - Q.float()).T @ left      (n, m) (m, r) -> (n, r)
    error(weight, codes)                     weight.float() - Q.float()                (m, n)
with Q the values of the forward pass, rounded to its compute dtype.

    m, n, r    outputs, inputs, rank; any, r up to 256
    b          elements that share one absmax in a 4-bit weight: b in a row along the flat, row-major order
    weight     (m, n) bf16, fp16 or fp32, row-major
    codes      4 bits: (ceil(m n / 2),) uint8, high nibble first.  LLM.int8: (m, n) int8
    absmax     4 bits: (ceil(m n / b),) fp32, of either sign.  LLM.int8: (m,) fp32
    right      (n, r) fp32;  left (m, r) fp32; in the kernel with columns of zeros up to RANK, which tensor cores take

    error_product_kernels.py    the kernels: how the work is divided, and what it costs
    error_product_configs.py    what they are compiled for: tiles, warps and stages by rank, precision and GPU
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial as bind
from itertools import product
from typing import Any

import torch
from torch import Tensor

from quailora.kernels.codes import Codes as Codes
from quailora.kernels.error_product_configs import (
    DTYPES,
    FORMS,
    Case,
    constants_of,
    error_grid,
    error_setting,
    product_grid,
)
from quailora.kernels.error_product_kernels import error_kernel, error_product_kernel
from quailora.kernels.padding import padded
from quailora.kernels.settings import FP_FUSION, Problem, Setting, chosen, target_of
from quailora.kernels.variants import Variant

# The linears of one launch: q, k and v share an input, gate and up do. (MLA and others have no more.)
_GROUP = 3


def error(
    weight: Tensor, codes: Codes | None, *, out: Tensor | None = None, start: int = 0, stop: int | None = None
) -> Tensor:
    """Rows start..stop of E, (stop - start, n): a new fp32 matrix, or `out` (contiguous), rounded to its dtype.

    `out` may be those rows of `weight` itself, so that E takes the place of W. In bf16 that loses nothing where W and Q
    are bf16 and within a factor of two of each other, or Q is 0: as all elements are of NF4 in blocks with their own
    absmax, and three quarters of FP4. The products then take E as a `weight` without codes.
    """
    m, n = weight.shape
    rows = (m if stop is None else stop) - start
    if out is None:
        out = torch.empty(rows, n, dtype=torch.float32, device=weight.device)
    assert out.is_contiguous() and out.shape == (rows, n), f"expected contiguous ({rows}, {n}), got {tuple(out.shape)}"
    setting = error_setting(target_of(weight.device))
    constants = constants_of(codes, n, setting["COLUMNS"])
    error_kernel[error_grid(rows, n)](
        weight.contiguous(), *_packed(weight, codes), _table(codes, weight), out, start, start + rows,
        n // constants["ALIGNMENT"], EVEN=rows % setting["ROWS"] == n % setting["COLUMNS"] == 0,
        **constants, **setting, enable_fp_fusion=FP_FUSION,
    )  # fmt: skip
    return out


def error_product(weight: Tensor, codes: Codes | None, right: Tensor, *, precision: str = "tf32") -> Tensor:
    """E P: (m, n) times (n, r) fp32 -> (m, r) fp32. Without codes, `weight` is E itself."""
    return grouped_error_product([(weight, codes)], [right], precision=precision)[0]


def error_product_t(weight: Tensor, codes: Codes | None, left: Tensor, *, precision: str = "tf32") -> Tensor:
    """Eᵀ A: the transpose of (m, n) times (m, r) fp32 -> (n, r) fp32. Without codes, `weight` is E itself."""
    return grouped_error_product_t([(weight, codes)], [left], precision=precision)[0]


def grouped_error_product(
    errors: Sequence[tuple[Tensor, Codes | None]], rights: Sequence[Tensor], *, precision: str = "tf32"
) -> list[Tensor]:
    """[E₀ P₀, E₁ P₁, ...] of linears that share their input (n alike): each E as (weight, codes), each P (n, r) fp32.

    m and r may differ from linear to linear; the kind of quantization and the dtypes may not. The products are views
    of one buffer.
    """
    return _in_groups(errors, rights, False, precision)


def grouped_error_product_t(
    errors: Sequence[tuple[Tensor, Codes | None]], lefts: Sequence[Tensor], *, precision: str = "tf32"
) -> list[Tensor]:
    """[E₀ᵀ A₀, E₁ᵀ A₁, ...], as `grouped_error_product`: each A (m, r) fp32."""
    return _in_groups(errors, lefts, True, precision)


def _in_groups(
    errors: Sequence[tuple[Tensor, Codes | None]], thins: Sequence[Tensor], transposed: bool, precision: str
) -> list[Tensor]:
    products: list[Tensor] = []
    for start in range(0, len(errors), _GROUP):
        group = slice(start, start + _GROUP)
        products += _launch(errors[group], thins[group], transposed, precision)
    return products


def _launch(
    errors: Sequence[tuple[Tensor, Codes | None]],
    thins: Sequence[Tensor],
    transposed: bool,
    precision: str,
    setting: Setting | None = None,
) -> list[Tensor]:
    weights = [weight.contiguous() for weight, _ in errors]
    heights, n, device = [weight.shape[0] for weight in weights], weights[0].shape[1], weights[0].device
    ranks = [thin.shape[1] for thin in thins]
    codes = errors[0][1]
    case = Case.of(weights[0].dtype, codes, heights, n, max(ranks), transposed, precision)
    thins = [padded(thin, case.rank).contiguous() for thin in thins]
    if setting is None:
        setting = chosen(case.problem, case.settings(target_of(device)), device)
    constants = case.constants(codes, setting)
    kept = [n] * len(errors) if transposed else heights
    tiles, split = product_grid(setting, kept, heights if transposed else [n])
    partial = torch.empty(split, sum(kept), case.rank, dtype=torch.float32, device=device)
    packed = [_packed(*error) for error in errors]
    error_product_kernel[(tiles, split)](
        *_filled(weights, weights[0]),
        *_filled([codes for codes, _ in packed], packed[0][0]),
        *_filled([absmax for _, absmax in packed], packed[0][1]),
        *_filled(thins, thins[0]),
        *_filled(heights, 0),
        _table(codes, partial),
        partial,
        n // constants["ALIGNMENT"],
        **constants,
        **setting,
        enable_fp_fusion=FP_FUSION,
    )
    total = partial.sum(dim=0) if split > 1 else partial[0]
    return [product[:, :rank].contiguous() for product, rank in zip(total.split(kept), ranks, strict=True)]


def _filled(values: Sequence[Any], filling: Any) -> list[Any]:
    return [*values, *[filling] * (_GROUP - len(values))]


def _packed(weight: Tensor, codes: Codes | None) -> tuple[Tensor, Tensor]:
    return (weight, weight) if codes is None else (codes.codes, codes.absmax)


def _table(codes: Codes | None, filling: Tensor) -> Tensor:
    return filling if codes is None or codes.table is None else codes.table  # read only if there are 4-bit codes


# (m, n) of projections in models of 7 to 8 billion parameters: square, to the MLP, and from it.
_SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))


def problems(device: torch.device) -> Iterator[Problem]:
    """The cases to time, on synthetic weights (their values do not matter): the products of krylov, and those of als,
    which uses E itself where it can.
    """
    cases = [
        *product(("4bit",), (16, 64), ("tf32", "bf16"), (False, True)),
        *product(("4bit", "dense"), (64,), ("bf16x3",), (False, True)),
    ]
    for (m, n), (kind, rank, precision, transposed) in product(_SHAPES, cases):
        weight = torch.randn(m, n, dtype=torch.bfloat16, device=device)
        codes = (
            None
            if kind == "dense"
            else Codes(
                torch.randint(256, (m * n // 2,), dtype=torch.uint8, device=device),
                torch.rand(m * n // 64, device=device),
                64,
                torch.bfloat16,
                torch.randn(256, 2, device=device).view(torch.int64).view(256),
            )
        )
        thin = torch.randn(m if transposed else n, rank, device=device)
        case = Case.of(weight.dtype, codes, [m], n, rank, transposed, precision)
        yield Problem(
            case.problem,
            case.settings(target_of(device)),
            bind(_launch, [(weight, codes)], [thin], transposed, precision),
        )


def variants(target: str) -> Iterator[Variant]:
    """Every setting of every case, and E itself; of 4-bit weights, those in blocks of 64."""
    for case in Case.possible():
        yield from _product_variants(target, case)
    for kind, dtype, compute in dict.fromkeys((case.kind, case.dtype, case.compute) for case in Case.possible()):
        for form, out in product(FORMS, dict.fromkeys((dtype, torch.float32))):
            if kind == "4bit" or (kind == "int8" and form != "masked16"):
                yield _error_variant(target, kind, dtype, form, compute, out)


def _example(kind: str, dtype: torch.dtype) -> Codes | None:
    nothing = torch.empty(0)
    return {"4bit": Codes(nothing, nothing, 64, dtype), "int8": Codes(nothing, nothing), "dense": None}[kind]


def _types(kind: str, dtype: torch.dtype) -> dict[str, str]:
    weight = f"*{DTYPES[dtype]}"
    codes = {"4bit": "*u8", "int8": "*i8", "dense": weight}[kind]
    return {"weight": weight, "codes": codes, "absmax": weight if kind == "dense" else "*fp32"}


def _product_variants(target: str, case: Case) -> Iterator[Variant]:
    types = _types(case.kind, case.dtype) | {"thin": "*fp32", "m": "i32"}
    names = {name: [f"{name}_{i}" for i in range(_GROUP)] for name in types}
    pointers = [name for key in types if key != "m" for name in names[key]]

    def grid(call: Mapping[str, Any]) -> tuple[int, int]:
        n, heights = call["units"] * call["ALIGNMENT"], [call[f"m_{i}"] for i in range(_GROUP) if call[f"m_{i}"]]
        return product_grid(call, *(([n] * len(heights), heights) if case.transposed else (heights, [n])))

    # The tensor cores of sm_90 take a left factor in tf32 from registers. Where W is one as it is loaded, with no codes
    # to look up and to pair with, it is copied in the pieces that a thread holds: 8 bytes.
    narrow = (target, case.kind, case.precision, case.transposed) == ("sm_90", "dense", "tf32", False)
    for number, setting in enumerate(case.settings(target)):
        constants = case.constants(_example(case.kind, case.compute), setting)
        yield Variant(
            name="-".join([case.name, *([str(number)] if number else [])]),
            kernel=error_product_kernel,
            signature={name: kind_of for key, kind_of in types.items() for name in names[key]}
            | {"table_ptr": "*i64" if case.kind == "4bit" else "*fp32"}
            | {"partial_ptr": "*fp32", "units": "i32"},
            constexprs=constants | {"KEPT": setting["KEPT"], "INNER": setting["INNER"]},
            attrs=(*pointers, "table_ptr", "partial_ptr"),
            num_warps=setting["num_warps"],
            num_stages=setting["num_stages"],
            maxnreg=setting.get("maxnreg"),
            uses_tensor_cores=case.precision != "ieee",
            grid=grid,
            uses_wide_loads=case.form == "even" and not narrow,
        )


def _error_variant(
    target: str, kind: str, dtype: torch.dtype, form: str, compute: torch.dtype, out: torch.dtype
) -> Variant:
    n, setting = FORMS[form], error_setting(target)
    pointers = _types(kind, dtype)
    pointers |= {"table": "*i64" if kind == "4bit" else pointers["weight"], "out": f"*{DTYPES[out]}"}
    words = ["error", kind, DTYPES[dtype], *([] if compute == dtype else ["q", DTYPES[compute]])]
    return Variant(
        name="-".join([*words, *([] if out == dtype else ["to-fp32"]), form]),
        kernel=error_kernel,
        signature={f"{name}_ptr": of for name, of in pointers.items()}
        | dict.fromkeys(("start", "stop", "units"), "i32"),
        constexprs={"EVEN": form == "even", "ROWS": setting["ROWS"], "COLUMNS": setting["COLUMNS"]}
        | constants_of(_example(kind, compute), n, setting["COLUMNS"]),
        attrs=tuple(f"{name}_ptr" for name in pointers),
        num_warps=setting["num_warps"],
        num_stages=setting["num_stages"],
        uses_tensor_cores=False,
        grid=lambda call: error_grid(call["stop"] - call["start"], call["units"] * call["ALIGNMENT"]),
        uses_wide_loads=form == "even",
    )
