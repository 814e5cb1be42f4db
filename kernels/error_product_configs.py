"""What the kernels of error_products.py are compiled for: the cases that share a compiled kernel, and its settings.

Only its constants decide what a kernel is compiled for, such as that a row of E has `units` times ALIGNMENT elements.
Triton's default, to compile again for sizes that are multiples of 16, would give more forms than could be tested.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl

from quailora.kernels.codes import Codes
from quailora.kernels.precision import PRECISIONS
from quailora.kernels.settings import Setting, shared_bytes

# Programs to split the work into at least, if it can be: one for each multiprocessor of an H100 (132) or A100 (108),
# nearly. It is not asked of the device, so that a split, and its rounding, is the same on every GPU of a target. More
# programs would cost more partial products than they gain.
_PROGRAMS = 128

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def _bits(codes: Codes | None) -> int:
    return 0 if codes is None else 8 if codes.blocksize is None else 4


def _alignment(bits: int, n: int) -> int:
    """A power of two that divides n. Blocks of 4-bit codes have 64 elements and more, and half as many bytes; of all
    else, 16 are enough for loads of 16 bytes.
    """
    return next(size for size in ((64, 16, 1) if bits == 4 else (16, 1)) if n % size == 0)


def constants_of(codes: Codes | None, n: int, columns: int) -> dict[str, Any]:
    """What `_error_tile` must know about W and Q, for rows of n and tiles of this many columns."""
    blocksize = codes.blocksize if codes is not None and codes.blocksize is not None else 1
    alignment = _alignment(_bits(codes), n)
    return {
        "BITS": _bits(codes),
        "BLOCKSIZE": blocksize,
        "ALIGNMENT": alignment,
        "GRANULE": min(blocksize, columns, alignment),  # the greatest common divisor: all are powers of two
        "Q_DTYPE": _TRITON_DTYPES[codes.dtype] if codes is not None else tl.float32,
    }


# Of the kernel that writes E: so large that the look-up table is less than a tenth of what a program reads and writes.
_ERROR_TILE: Setting = {"ROWS": 16, "COLUMNS": 256}


def error_setting(target: str) -> Setting:
    """8 elements to a thread, which for W in 16 bits is one load; a pointer for each, where rows are ragged, fits the
    registers that ptxas likes to give. (A warp of AMD has 64 threads.)"""
    return _ERROR_TILE | {"num_warps": 16 if target.startswith("sm_") else 8, "num_stages": 1}


def error_grid(rows: int, n: int) -> tuple[int, int]:
    return triton.cdiv(rows, _ERROR_TILE["ROWS"]), triton.cdiv(n, _ERROR_TILE["COLUMNS"])


def product_grid(setting: Setting, kept: Sequence[int], inner: Sequence[int]) -> tuple[int, int]:
    """Tiles of the products, and how many programs share the loop over each."""
    tiles = sum(triton.cdiv(size, setting["KEPT"]) for size in kept)
    return tiles, min(triton.cdiv(_PROGRAMS, tiles), triton.cdiv(max(inner), setting["INNER"]))


# Sums that a program keeps at most; 8 warps have room for three times as many numbers beside them. bf16x3 holds its
# factors twice, and ieee all that a step multiplies, at once: they keep less.
_SUMS = {"ieee": 64 * 64, "bf16x3": 64 * 128, "tf32": 64 * 256, "bf16": 64 * 256}

_LARGEST_TILE = 256

# No tile reaches over an edge; some do; some do, and 16 divides n, but not 64, which codes of 4 bits are read for; some
# do, and nothing divides n. With an n of each.
FORMS = {"even": 4096, "masked": 4160, "masked16": 4112, "ragged": 4095}

# The kind of W or E, its dtype, and the one that Q is rounded to -> the precisions in which there are all ranks and
# forms: those that solvers take by themselves, or every one. All else shares a few, so that each that there is can be
# compiled in the tests: ranks are padded further, every tile has masks, and "bf16" is made in tf32.
_COMMON: dict[tuple[str, torch.dtype, torch.dtype], Sequence[str]] = {
    ("4bit", torch.bfloat16, torch.bfloat16): PRECISIONS,
    ("4bit", torch.float16, torch.float16): ("bf16x3", "tf32"),
    ("dense", torch.bfloat16, torch.bfloat16): ("bf16x3", "tf32"),
    ("dense", torch.float16, torch.float16): ("bf16x3", "tf32"),
}


@dataclass(frozen=True)
class Case:
    """Everything that the settings of a product depend on, except the GPU."""

    kind: str  # "4bit", "int8", "dense"
    dtype: torch.dtype  # of W
    compute: torch.dtype  # that a 4-bit Q is rounded to; else that of W
    rank: int  # the largest, padded: what tensor cores take
    precision: str
    transposed: bool
    form: str  # of FORMS

    @classmethod
    def of(
        cls,
        dtype: torch.dtype,
        codes: Codes | None,
        heights: Sequence[int],
        n: int,
        rank: int,
        transposed: bool,
        precision: str,
    ) -> "Case":
        assert precision in PRECISIONS, precision
        bits = _bits(codes)
        kind = {0: "dense", 4: "4bit", 8: "int8"}[bits]
        compute = codes.dtype if codes is not None and bits == 4 else dtype
        alignment, even = _alignment(bits, n), all(size % _LARGEST_TILE == 0 for size in (n, *heights))
        form = (
            "even" if even else "ragged" if alignment == 1 else "masked16" if (bits, alignment) == (4, 16) else "masked"
        )
        return cls(kind, dtype, compute, max(16, triton.next_power_of_2(rank)), precision, transposed, form).served()

    @classmethod
    def possible(cls) -> "Iterator[Case]":
        """What `of` may return."""
        types = [("4bit", dtype, compute) for dtype, compute in product(DTYPES, DTYPES)]
        types += [(kind, dtype, dtype) for kind, dtype in product(("int8", "dense"), DTYPES)]
        every = [
            cls(*each, rank, precision, transposed, form)
            for each, rank, precision, transposed, form in product(
                types, (16, 32, 64, 128, 256), PRECISIONS, (False, True), FORMS
            )
            if each[0] == "4bit" or form != "masked16"
        ]
        yield from dict.fromkeys(case.served() for case in every)

    @property
    def common(self) -> bool:
        return self.precision in _COMMON.get((self.kind, self.dtype, self.compute), ())

    def served(self) -> "Case":
        """The case that computes this product: itself, or one of the shared ones."""
        case = replace(self, precision="tf32") if self.precision == "bf16" and not self.common else self
        if case.common:
            return case
        form = {"even": "masked", "masked16": "ragged"}.get(case.form, case.form)
        return replace(case, rank=64 if case.rank <= 64 else 256, form=form)

    @property
    def name(self) -> str:
        q = [] if self.compute == self.dtype else ["q", DTYPES[self.compute]]
        words = [self.kind, DTYPES[self.dtype], *q, f"r{self.rank}", self.precision, "t" if self.transposed else "n"]
        return "-".join(words if self.form == "even" else [*words, self.form])

    @property
    def problem(self) -> str:
        return f"error_product-{self.name}"

    def settings(self, target: str) -> list[Setting]:
        """The default; and, for the most common case, others that may be faster."""
        # As many rows as registers allow, for the fewest re-reads of P; steps as short as tensor cores like them, so
        # that two of them fit the shared memory of every target. Masks take registers too.
        room = _SUMS[self.precision]
        kept = min(128 if self.precision == "ieee" else _LARGEST_TILE, max(64, room // self.rank))
        inner = 32 if kept * self.rank <= room else 16
        frequent = self.form == "even" and self.dtype == torch.bfloat16
        if self.precision == "bf16x3" and self.rank == 64 and frequent:
            # Without masks as many sums as in tf32 fit, though not everywhere beside whole steps.
            kept, inner = _LARGEST_TILE, 32 if target in ("sm_90", "sm_100", "gfx942") else 16
        masked, int8_beside_fp32 = "masked" in self.form, (self.kind, self.dtype) == ("int8", torch.float32)
        if masked and (int8_beside_fp32 or self.precision == "ieee"):  # which leave masks few registers
            kept, inner = 32 if self.rank == 256 else 64 if self.precision == "ieee" else kept, 16
        if masked and self.rank >= (128 if self.precision == "tf32" else 256):
            inner = 16
        if self.precision == "bf16x3" and self.form != "even" and self.kind != "4bit":
            kept, inner = (32 if self.rank == 256 else 64), 16  # fp32 or int8 as loaded, plus its two halves
        if self.form == "ragged":  # a pointer for every element and an absmax for every few: more registers
            kept, inner = min(kept, 32 if self.precision == "ieee" and self.rank in (32, 64, 128) else 64), 16
        nvidia = target.startswith("sm_")
        if self.kind == "int8" and not nvidia:  # 16 codes to a load, each unpacked and rounded in software
            kept = min(kept, 128)
        # Left alone, ptxas would rather spill a little than give a thread more than 128 registers (or 64, or 80). Such
        # blocks come one to a multiprocessor anyway, so it may take all 255; but for ieee, whose unrolled loop it would
        # reorder until even those overflow. AMD's compiler does neither.
        limit = {"maxnreg": 255} if nvidia and self.precision != "ieee" else {}
        if self.precision == "ieee" and not self.common:  # what fits whatever W and Q are
            kept, inner, limit = 32, 16, {"maxnreg": 168} if nvidia else {}
        settings = [{"KEPT": kept, "INNER": inner, "num_warps": 8, "num_stages": 2, **limit}]
        if frequent and self.kind == "4bit" and self.precision in ("tf32", "bf16") and kept == _LARGEST_TILE:
            if nvidia:
                half = 64 if shared_bytes(target) > 99 * 1024 else 32
                settings += [
                    # Two steps loading while one is multiplied.
                    {"KEPT": 256, "INNER": 32, "num_warps": 8, "num_stages": 3, **limit},
                    # Half the sums, so that two blocks share a multiprocessor, if their shared memory fits it too.
                    {"KEPT": 128, "INNER": half, "num_warps": 8, "num_stages": 2},
                ]
            else:
                settings += [
                    # Nothing is loading while a step is multiplied, but more blocks run at a time.
                    {"KEPT": 256, "INNER": 32, "num_warps": 8, "num_stages": 1},
                    # A fifth fewer instructions, with half as many waves to hide latencies.
                    {"KEPT": 256, "INNER": 32, "num_warps": 4, "num_stages": 2},
                ]
        if self.precision == "bf16x3" and self.rank == 64 and frequent:
            # More, and longer, steps of fewer rows.
            settings.append({"KEPT": 128, "INNER": 32, "num_warps": 8, "num_stages": 2, **limit})
        return settings

    def constants(self, codes: Codes | None, setting: Setting) -> dict[str, Any]:
        """The compile-time arguments except those of the setting."""
        return {
            "TRANSPOSED": self.transposed,
            "PRECISION": self.precision,
            "RANK": self.rank,
            "EVEN": self.form == "even",
            **constants_of(codes, FORMS[self.form], setting["KEPT" if self.transposed else "INNER"]),
        }
