"""Faults planted in the kernels are found: in the source by the test they name, dropped barriers by the emulator."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from quailora.kernels import cholesky, error_products, gram_product
from quailora.kernels.variants import Variant
from tests.emulation import ptx
from tests.emulation.ptx.sample import product_variant
from tests.emulation.test_ptx import launch_of_a_gram_product, launch_of_a_group
from tests.helpers import ROOT, aot
from tests.helpers.kernel_changes import slow_unless_changed
from tests.kernels.test_counts import factor, linear, positive_definite, shipped

TESTS = Path(__file__).resolve().parent
KERNELS = ROOT / "kernels"

# ---- faults in the source


@dataclass(frozen=True)
class Mutation:
    files: str  # of one kernel, a pattern in kernels/ without .py
    text: str  # stands in them exactly once
    replacement: str
    test: str  # that must fail, as pytest names it, from tests/kernels/


FAULTS = {  # files in kernels/ -> file of tests -> the test -> what is wrong, the text, what stands in its place
    "error_product*": {
        "interpreted/test_solve.py": {
            "test_doctor_finds_nothing_in_groups": [
                ("doctor: P of the first for all", "_select(linear, thin_0, thin_1, thin_2)", "thin_0"),
                ("doctor: height of the first for all", "_select(linear, m_0, m_1, m_2)", "m_0"),
                ("doctor: half of a dense E", "dense\n        return weight", "dense\n        return weight / 2"),
            ],
        },
        "interpreted/test_error_products.py": {
            "test_the_high_nibble_comes_first[64]": [
                ("swapped nibbles", "tl.join(high, low)", "tl.join(low, high)"),
                ("one value to a byte", "(pairs >> 32)", "(pairs & 0xFFFFFFFF)"),
            ],
            "test_the_high_nibble_comes_first[63]": [
                ("swapped nibbles of odd rows", "elements % 2 == 0", "elements % 2 == 1"),
                ("odd rows begin with a byte", "if ALIGNMENT > 1:", "if ALIGNMENT > 0:"),
            ],
            "test_each_block_has_its_own_absmax[error_product_t-80-64]": [
                ("blocks begin with rows", "(row_starts[:, None] + granules[None, :]) // BLOCKSIZE",
                 "row_starts[:, None] // BLOCKSIZE + granules[None, :] // BLOCKSIZE"),
                ("absmax of the next block", "// BLOCKSIZE\n", "// BLOCKSIZE + 1\n"),
                ("granules straddle rows", "min(blocksize, columns, alignment)", "min(blocksize, columns)"),
            ],
            "test_each_block_has_its_own_absmax[error_product_t-128-32]": [
                ("granules straddle blocks", "min(blocksize, columns, alignment)", "min(columns, alignment)"),
            ],
            "test_each_group_has_its_own_scale_and_zero[error_product-64]": [
                ("every scale above 0", "GRANULE)) * absmax[:, :, None]", "GRANULE)) * tl.abs(absmax)[:, :, None]"),
            ],
            "test_whole_tiles[nf4-ieee]": [
                ("table of the launch's first W", "_table(codes, partial),\n        partial,",
                 "partial,\n        partial,"),
                ("transposed: columns of the first tile", "inner, tile * KEPT, m, units", "inner, 0 * tile, m, units"),
                ("rows of the first tile", "table, kept, start, m, units",
                 "table, kept - tile * KEPT, start, m, units"),
            ],
            "test_nothing_beyond_the_edges_is_read[nf4]": [
                ("a row too many", "there = rows < m", "there = rows <= m"),
                ("a column too many", "(columns < n)[None, :]\n    weight", "(columns <= n)[None, :]\n    weight"),
                ("absmax of a row too many", "there[:, None] & (granules < n)[None, :]", "(granules < n)[None, :]"),
                ("a row of P too many", "(inner < inner_size)[:, None], EVEN", "(inner <= inner_size)[:, None], EVEN"),
            ],
            "test_nothing_beyond_the_edges_is_read[dense]": [
                ("ones beyond the edges", "mask=mask, other=0)", "mask=mask, other=1)"),
                ("no masks whatever the shape", '"even" if even else "ragged"', '"even" if True else "ragged"'),
            ],
            "test_masks_are_left_out_of_whole_tiles_only[heights1-768-masked-masked]": [
                ("no masks whatever the heights", "for size in (n, *heights)", "for size in (n,)"),
            ],
            "test_masks_are_left_out_of_whole_tiles_only[heights3-784-masked16-masked]": [
                ("rows of 16 taken for rows of 64", '"masked16" if (bits, alignment) == (4, 16) else "masked"',
                 '"masked"'),
            ],
            "test_q_is_rounded_to_the_compute_dtype[torch.float32-torch.float16]": [
                ("Q not rounded", "(ROWS, COLUMNS)).to(Q_DTYPE).to(tl.float32)", "(ROWS, COLUMNS))"),
            ],
            "test_q_is_rounded_to_the_compute_dtype[torch.bfloat16-torch.float32]": [
                ("Q rounded to the dtype of W", "_TRITON_DTYPES[codes.dtype] if", "tl.bfloat16 if"),
            ],
            "test_offsets_beyond_two_to_the_31[True-4bit]": [
                ("32-bit offsets of absmax", "(row_starts[:, None] + granules[None, :]) // BLOCKSIZE",
                 "(row_starts[:, None] + granules[None, :]).to(tl.int32) // BLOCKSIZE"),
            ],
            "test_offsets_beyond_two_to_the_31[False-dense]": [
                ("32-bit offsets", "row_starts = rows.to(tl.int64) * n", "row_starts = (rows * n).to(tl.int64)"),
            ],
            "test_offsets_of_the_error_beyond_two_to_the_31[int8]": [
                ("32-bit offsets of what is stored", "(rows - start).to(tl.int64)[:, None] * n",
                 "((rows - start) * n).to(tl.int64)[:, None]"),
            ],
            "test_int8_scales_belong_to_rows": [
                ("int8: scale of the next row", "_load(absmax_ptr + rows,", "_load(absmax_ptr + rows + 1,"),
                ("int8: over 128", "(1 / 127)", "(1 / 128)"),
            ],
            "test_the_error_is_that_of_the_reference_to_the_bit[96-int8-torch.float32-torch.float32]": [
                ("int8: in another order", "codes * absmax[:, None] * (1 / 127)",
                 "codes * (absmax[:, None] * (1 / 127))"),
            ],
            "test_each_linear_of_a_group_has_its_own_everything[2-nf4]": [
                ("second linear: P of the first", "_select(linear, thin_0, thin_1, thin_2)",
                 "_select(linear, thin_0, thin_0, thin_2)"),
                ("second linear: height of the first", "_select(linear, m_0, m_1, m_2)",
                 "_select(linear, m_0, m_0, m_2)"),
                ("second linear: partial product of the first", "_select(linear, 0, kept_0, kept_0 + kept_1)",
                 "_select(linear, 0, 0, kept_0 + kept_1)"),
                ("second linear: zeros of the first cut off", "product[:, :rank]", "product[:, : ranks[0]]"),
            ],
            "test_each_linear_of_a_group_has_its_own_everything[3-nf4]": [
                ("third linear: weight of the second", "_select(linear, weight_0, weight_1, weight_2)",
                 "_select(linear, weight_0, weight_1, weight_1)"),
                ("third linear: codes of the second", "_select(linear, codes_0, codes_1, codes_2)",
                 "_select(linear, codes_0, codes_1, codes_1)"),
                ("third linear: absmax of the second", "_select(linear, absmax_0, absmax_1, absmax_2)",
                 "_select(linear, absmax_0, absmax_1, absmax_1)"),
                ("third linear: tiles of the second", "_select(linear, 0, tiles_0, tiles_0 + tiles_1)",
                 "_select(linear, 0, tiles_0, tiles_0)"),
                ("third linear: a tile late", "(tile >= tiles_0 + tiles_1)", "(tile > tiles_0 + tiles_1)"),
            ],
            "test_the_walk_may_be_split_in_any_way_and_repeats_its_bits[9]": [
                ("share of the next split", "range(split * INNER,", "range((split + 1) * INNER,"),
                ("shares overlap", "tl.num_programs(1) * INNER)", "INNER)"),
                ("one split over another", "before = split.to(tl.int64) *", "before = 0 * split.to(tl.int64) *"),
                ("first split only", "partial.sum(dim=0) if split > 1 else partial[0]", "partial[0]"),
            ],
            "test_whole_tiles[dense-ieee]": [
                ("stored transposed", "(before + kept)[:, None] * RANK + ranks[None, :]",
                 "(before + kept)[:, None] + ranks[None, :] * kept_size"),
            ],
            "test_rows_of_the_error[65-5-37-nf4]": [
                ("error: rows from 0", "rows = start + tl.program_id(0) * ROWS", "rows = tl.program_id(0) * ROWS"),
                ("error: stored `start` rows too far", "(rows - start).to(tl.int64)", "rows.to(tl.int64)"),
                ("error: rounded whatever the dtype", "error.to(out_ptr.dtype.element_ty)", "error.to(tl.bfloat16)"),
            ],
            "test_rows_of_the_error[65-0-33-nf4]": [
                ("error: stored beyond `stop`", "out, start, start + rows,\n", "out, start, m,\n"),
                ("error: a row stored too many", "mask=(rows < stop)[:, None] &", "mask=(rows <= stop)[:, None] &"),
            ],
            "test_masks_are_left_out_of_whole_tiles_of_the_error_only[32-500-False]": [
                ("error: no masks in ragged columns", 'EVEN=rows % setting["ROWS"] == n % setting["COLUMNS"] == 0',
                 "EVEN=True"),
            ],
            "test_masks_are_left_out_of_whole_tiles_of_the_error_only[33-512-False]": [
                ("error: no masks in ragged rows", 'EVEN=rows % setting["ROWS"] == n % setting["COLUMNS"] == 0',
                 'EVEN=n % setting["COLUMNS"] == 0'),
            ],
        },
        "../emulation/test_ptx.py": {
            "test_error_products_keep_within_the_edges[tf32-masked-192-t]": [
                ("absmax of a column too many", "there[:, None] & (granules < n)[None, :]", "there[:, None]"),
                ("codes of a column too many", "there[:, None] & (pairs < pairs_per_row)[None, :]", "there[:, None]"),
                ("room for a linear that is not there", "tl.where(m_1 > 0, n, 0)", "n"),
            ],
            "test_error_products_keep_within_the_edges[tf32-ragged-75-n]": [
                ("a row of P too many, by address", "(inner < inner_size)[:, None], EVEN",
                 "(inner <= inner_size)[:, None], EVEN"),
                ("a row stored too many", "mask=(kept < kept_size)[:, None]", "mask=(kept <= kept_size)[:, None]"),
            ],
        },
    },
    "gram_product": {
        "interpreted/test_gram_product.py": {
            "test_every_element_is_taken_from_the_lower_triangle_once": [
                ("the upper triangle", "rows[:, None] >= inner[None, :]", "rows[:, None] <= inner[None, :]"),
                ("never turned", "tl.where(rows[:, None] >= inner[None, :], tile, tl.trans(tile))", "tile"),
                ("tiles above the diagonal", "top = tl.maximum(i, j)", "top = tl.minimum(i, j)"),
                ("the last step left out", "range(split, tiles, tl.num_programs(2))",
                 "range(split, tiles - 1, tl.num_programs(2))"),
            ],
            "test_partners_meet_in_the_same_step": [
                ("partners in other steps", "j = (step + tiles - i) % tiles", "j = (step + i) % tiles"),
            ],
            "test_the_walk_may_be_split_in_any_way_and_repeats_its_bits[256]": [
                ("steps taken twice", "range(split, tiles, tl.num_programs(2))", "range(split, tiles)"),
                ("one split over another", "(split * n + rows)", "(0 * split + rows)"),
            ],
            "test_nothing_beyond_the_edges_of_p_is_read": [
                ("a row of P too many", "mask=(inner < n)[:, None]", "mask=(inner <= n)[:, None]"),
            ],
            "test_a_group_is_its_linears_one_by_one": [
                ("a chunk of columns left out", "triton.cdiv(k, width)", "max(1, k // width)"),
                ("one chunk for all", "tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)", "tl.arange(0, WIDTH)"),
            ],
            "test_offsets_beyond_two_to_the_31": [
                ("32-bit offsets", "top.to(tl.int64)[:, None] * n", "top[:, None] * n"),
            ],
        },
        "../emulation/test_ptx.py": {
            "test_a_gram_product_keeps_within_the_edges[tf32-75]": [
                ("a row of H too many", "(top < n)[:, None]", "(top <= n)[:, None]"),
                ("a column of H too many", "(left < n)[None, :]", "(left <= n)[None, :]"),
                ("a column of P too many", "mask=(inner < n)[:, None] & (columns < k)[None, :]",
                 "mask=(inner < n)[:, None]"),
                ("a column stored too many", "mask=(rows < n)[:, None] & (columns < k)[None, :]",
                 "mask=(rows < n)[:, None]"),
            ],
        },
    },
    "padding": {
        "interpreted/test_gram_product.py": {
            "test_a_group_is_its_linears_one_by_one": [
                ("zeros before", "(0, length)", "(length, 0)"),
            ],
        },
    },
    "precision": {
        "interpreted/test_gram_product.py": {
            "test_every_precision[64-bf16x3]": [
                ("bf16x3 without the low half of a", "        sum = tl.dot(a_low, b_high, sum)  # small terms first\n",
                 ""),
                ("bf16x3 without the low half of b", "        sum = tl.dot(a_high, b_low, sum)\n", ""),
                ("low half of a as it is", "(a - a_high.to(tl.float32))", "a"),
            ],
            "test_every_precision[64-ieee]": [
                ("tf32 whatever was asked for", "input_precision=PRECISION", 'input_precision="tf32"'),
            ],
        },
    },
    "cholesky": {
        "interpreted/test_cholesky.py": {
            "test_the_inverse_factor_is_that_of_fp64[16]": [
                ("a row scaled once, not twice", "(row * scale)[None, :]", "row[None, :]"),
                ("pivot's own row reduced", "tl.where(i > j, column * scale", "tl.where(i != j, column * scale"),
            ],
            "test_the_inverse_factor_is_that_of_fp64[33]": [
                ("a block short: diagonal", "range(0, start, BLOCK):\n            left = tl.load(lower + rows",
                 "range(0, start - BLOCK, BLOCK):\n            left = tl.load(lower + rows"),
                ("a block short: panel's reduction", "range(0, start, BLOCK):\n                left",
                 "range(0, start - BLOCK, BLOCK):\n                left"),
                ("a block short: inverse", "range(edge, start, BLOCK)", "range(edge, start - BLOCK, BLOCK)"),
                ("the inverse's diagonal overwritten", "(columns >= start + BLOCK)", "(columns >= start)"),
                ("tf32 in a panel", 'panel = tl.dot(panel, tl.trans(tile_inverse), input_precision="ieee")',
                 'panel = tl.dot(panel, tl.trans(tile_inverse), input_precision="tf32")'),
                ("tf32 in the diagonal", 'tile -= tl.dot(left, tl.trans(left), input_precision="ieee")',
                 'tile -= tl.dot(left, tl.trans(left), input_precision="tf32")'),
                ("tf32 in the inverse", 'strip += tl.dot(left, right, input_precision="ieee")',
                 'strip += tl.dot(left, right, input_precision="tf32")'),
            ],
            "test_the_inverse_factor_is_that_of_fp64[32]": [
                ("a block short: panel", "range(start + BLOCK, padded, TALL)",
                 "range(start + 2 * BLOCK, padded, TALL)"),
            ],
            "test_the_inverse_factor_is_that_of_fp64[17]": [
                ("padding with zeros", "        tile = tl.where((high == low) & (high >= r), 1.0, tile)\n", ""),
            ],
            "test_only_the_lower_triangle_makes_the_factor": [
                ("upper triangle of a tile", "systems + high * row_stride + low * column_stride",
                 "systems + low * row_stride + high * column_stride"),
                ("upper triangle of a panel", "systems + below * row_stride + rows[None, :] * column_stride",
                 "systems + rows[None, :] * row_stride + below * column_stride"),
            ],
            "test_the_first_minor_that_is_not_positive_is_named[16-15]": [
                ("0-based minors", "start + j + 1", "start + j"),
            ],
            "test_the_first_minor_that_is_not_positive_is_named[40-4]": [
                ("the last minor, not the first", "tl.where(first_refused == 0, start + j + 1, first_refused)",
                 "start + j + 1"),
            ],
            "test_singular_systems_are_named": [
                ("a pivot of zero", "good = (pivot > least) & (pivot > tl.sum(",
                 "good = (pivot >= least) & (pivot >= tl.sum("),
            ],
            "test_what_is_not_finite_is_named[nan-20-3]": [
                ("a pivot that is NaN", "good = (pivot > least) & (pivot > tl.sum(tl.where(i == j, parts, 0.0)))",
                 "good = ~((pivot <= least) | (pivot <= tl.sum(tl.where(i == j, parts, 0.0))))"),
            ],
            "test_refused_columns_leave_the_factorization": [
                ("refused columns stay in the tile",
                 "scale = tl.where(good, tl.div_rn(1.0, tl.sqrt_rn(tl.where(good, pivot, 1.0))), 0.0)",
                 "scale = tl.div_rn(1.0, tl.sqrt_rn(tl.where(good, pivot, 1.0)))"),
                ("refused columns stay in the panel", "            panel = tl.where(accepted[None, :], panel, 0.0)\n",
                 ""),
                ("refused rows at their pivot", "tl.where(good, scale, refused)", "scale"),
                ("no least pivot", "(pivot > least)", "(pivot > 0.0)"),
            ],
            "test_a_pivot_is_above_a_part_of_its_diagonal_element": [
                ("a pivot at its least", "(pivot > least)", "(pivot >= least)"),
                ("a pivot at its part", "(pivot > tl.sum(", "(pivot >= tl.sum("),
                ("a part of one", "part * tl.sum(tl.where(high == low, tile, 0.0), axis=1)", "part + 0.0 * i"),
                ("a part of the row", "part * tl.sum(tl.where(high == low, tile, 0.0), axis=1)",
                 "part * tl.sum(tile, axis=1)"),
            ],
            "test_the_diagonal_grows_by_a_part_of_itself": [
                ("nothing grows", "tl.where(high == low, tile + shift * tile, tile)", "tile"),
                ("all of a tile grows", "tl.where(high == low, tile + shift * tile, tile)", "tile + shift * tile"),
            ],
            "test_layouts_and_batch_dimensions": [
                ("the first system for all", "    systems += system * system_stride\n", ""),
                ("what was added is not taken off again", "x[:, :r, :k]", "x[:, -r:, :k]"),
            ],
            "test_products[5-1000-7]": [
                ("base added", "mask=inside) - total", "mask=inside) + total"),
                ("base of the first in the batch", "base + batch * base_batch", "base + 0 * batch * base_batch"),
                ("splits overlap", "end = tl.minimum(begin + split, k)", "end = k"),
                ("a step left out", "range(begin, end, STEP)", "range(begin, end - STEP, STEP)"),
                ("the first split only", "out[:, 0] if splits == 1 else out.sum(dim=1)", "out[:, 0]"),
                ("one system's pieces over another's", "batch = (piece // splits)", "batch = (piece % splits)"),
                ("tf32 in a product", 'total += tl.dot(x, y, input_precision="ieee")',
                 'total += tl.dot(x, y, input_precision="tf32")'),
            ],
            "test_refinement_halves_the_residual": [
                ("no refinement", "    x = x + divide(product(c, x, base=y))\n", ""),
            ],
            "test_residual_is_as_small_as_that_of_torch[16-10000.0]": [
                ("refinement with the wrong sign", "x + divide(", "x - divide("),
            ],
        },
        "test_counts.py": {
            "test_a_cholesky_factor[33-1]": [
                ("rows beyond a panel's", "mask=(below < r) & (rows[None, :] < r)", "mask=rows[None, :] < r"),
                ("rows beyond the scratch", "lower + below * padded + rows[None, :], panel, mask=below < padded",
                 "lower + below * padded + rows[None, :], panel"),
                ("nothing above the inverse's diagonal", " | ((columns >= start + BLOCK) & (columns < padded))", ""),
                ("columns beyond the inverse's", " & (columns < padded)", ""),
            ],
        },
        "../emulation/test_ptx.py": {
            "test_each_system_has_scratch_of_its_own": [
                ("scratch of the first system for all", "    lower += system * padded * padded\n", ""),
            ],
            "test_a_product_of_the_solves_keeps_within_the_edges": [
                ("beyond a split's end", "mask=(rows < m) & (along[None, :] < end)", "mask=rows < m"),
            ],
        },
    },
    "orthonormalize": {
        "interpreted/test_orthonormalize.py": {
            "test_every_pivot_large_and_yet_nearly_singular": [
                ("no shift", "shift=0.0 if last else _SHIFT", "shift=0.0"),
            ],
            "test_every_pass_is_needed": [
                ("three passes", "_PASSES = 4", "_PASSES = 3"),
            ],
            "test_any_condition[10000000.0]": [
                ("two passes", "_PASSES = 4", "_PASSES = 2"),
                ("short columns dropped at once", "refused=0.0 if last else 1.0", "refused=0.0"),
            ],
            "test_a_little_outside_the_basis[1e-05]": [
                ("the basis taken out once", "if basis is not None:\n", "if basis is not None and step == 0:\n"),
            ],
            "test_a_little_outside_the_basis[0.1]": [
                ("the basis not subtracted", "product(basis.mT, q), base=q)", "product(basis.mT, q))"),
            ],
            "test_spanned_and_zero_columns_are_zero_in_their_place": [
                ("nothing is too short", "least=_SHORTEST**2", "least=0.0"),
                ("zero over zero", ".clamp_min(torch.finfo(torch.float32).tiny)", ""),
            ],
            "test_lengths_are_those_of_the_columns_given": [
                ("lengths of the pass", "q = product(q, inverse.mT)",
                 "q = torch.nn.functional.normalize(product(q, inverse.mT), dim=1)"),
            ],
            "test_what_the_passes_do_not_reach_is_dropped": [
                ("no least pivot in the last pass", "_LEAST_LAST_PIVOT = 0.25", "_LEAST_LAST_PIVOT = 0.0"),
                ("the least pivot of the others in the last pass", "_LEAST_LAST_PIVOT if last else _LEAST_PIVOT",
                 "_LEAST_PIVOT"),
                ("short columns stay in the last pass", "refused=0.0 if last else 1.0", "refused=1.0"),
            ],
            "test_singular_and_ill_conditioned[1000000.0]": [
                ("no pivot too short", "_LEAST_PIVOT = 1e-4", "_LEAST_PIVOT = 0.0"),
            ],
            "test_scales_do_not_matter": [
                ("lengths from squares in fp32", "vector_norm(y, dim=1, keepdim=True, dtype=torch.float64)",
                 "vector_norm(y, dim=1, keepdim=True)"),
            ],
            "test_short_is_meant_of_the_length_not_of_the_largest_entry": [
                ("scaled by the largest", "vector_norm(y, dim=1", "vector_norm(y, torch.inf, dim=1"),
            ],
            "test_any_condition[10000.0]": [
                ("the inverse not turned", "product(q, inverse.mT)", "product(q, inverse)"),
            ],
        },
    },
    "quantize_columns": {
        "interpreted/test_quantize_columns.py": {
            "test_scales_are_searched[5-64-32-4-True]": [
                ("errors of all columns fed back again", "(columns > j)[None, :]", "(columns >= start)[None, :]"),
                ("nothing fed back", "target + error[:, None] * u", "target + 0 * error[:, None] * u"),
                ("row of the first column for all", "row = factor + j *", "row = factor + 0 * j *"),
                ("the target taken for W", "w = tl.load(weight_rows + j, mask=there, other=0.0)",
                 "w = tl.sum(tl.where(is_j, target, 0.0), axis=1)"),
                ("no feedback", "    target += tl.load(feedback_rows", "    tl.load(feedback_rows"),
                ("scales of the first group for all", "inside = (columns >= start) & (columns < start + group)",
                 "inside = columns < group"),
                ("scales of all later columns", "inside = (columns >= start) & (columns < start + group)",
                 "inside = columns >= start"),
                ("importance left out", "off * off * importance[None, :]", "off * off * (importance[None, :] != 0)"),
                ("the first row of a program for all", "tl.program_id(0) * ROWS + tl.arange(0, ROWS)",
                 "tl.program_id(0) * ROWS + 0 * tl.arange(0, ROWS)"),
                ("the first program for all", "tl.program_id(0) * ROWS +", "0 * tl.program_id(0) * ROWS +"),
                ("a program left out", 'triton.cdiv(call["m"], call["ROWS"])', 'call["m"] // call["ROWS"]'),
                ("the last column of a group left out", "range(start, start + group)",
                 "range(start, start + group - 1)"),
                ("zeros not written", "mask=there)\n        reciprocal", "mask=there & (i < 0))\n        reciprocal"),
            ],
            "test_scales_are_searched[5-64-32-4-False]": [
                ("the clip in place of its part", "_fp16_and_bf16(span * tl.load(clips + i))",
                 "_fp16_and_bf16(span * tl.load(clips + number + i))"),
            ],
            "test_every_clip_and_sign_serves_some_row[True]": [
                ("one sign", "better = cost < best\n            best", "better = cost < 0\n            best"),
                ("the first clip only", "for i in range(number):", "for i in range(1):"),
                ("the last clip left out", "for i in range(number):", "for i in range(number - 1):"),
                ("the last of the better, not the best", "best = tl.where(better, cost, best)\n        best_scale",
                 "best_scale"),
            ],
            "test_every_clip_and_sign_serves_some_row[False]": [
                ("zero not clipped along", "-low * tl.load(clips + number + i)", "-low * tl.load(clips + number)"),
            ],
            "test_scales_are_given[64-32-4-True]": [
                ("given scales of the first group for all", "rows * scales_row + i * scales_column",
                 "rows * scales_row"),
                ("scales side by side", "rows * scales_row + i * scales_column", "rows * scales_row + i"),
                ("zeros side by side", "rows * zeros_row + i * zeros_column", "rows * zeros_row + i"),
                ("1 / 0", "return tl.where(scale == 0, 0.0, tl.div_rn(1.0, tl.where(scale == 0, 1.0, scale)))",
                 "return tl.div_rn(1.0, scale)"),
                ("divided, not multiplied by the reciprocal", "axis=1) * reciprocal", "axis=1) / scale"),
            ],
            "test_scales_are_given[64-32-4-False]": [
                ("the middle a code too low", "zero = tl.zeros_like(scale) + (top + 1) * 0.5",
                 "zero = tl.zeros_like(scale) + (top - 1) * 0.5"),
            ],
            "test_levels[nf4]": [
                ("a level too high", "tl.where(middles[None, :] < x[:, None]", "tl.where(level[None, :] < x[:, None]"),
                ("levels beyond the last", "mask=index < last, other=float(\"inf\")", "mask=index < last, other=0.0"),
            ],
            "test_levels[8-bit]": [
                ("16 levels of 256", "(16 if bits <= 4 else 256)", "16"),
            ],
            "test_ties": [
                ("halves rounded up", "return (x + 12582912.0) - 12582912.0", "return tl.floor(x + 0.5)"),
                ("a level between two: the upper", "middles[None, :] < x[:, None]", "middles[None, :] <= x[:, None]"),
                ("rounded by a smaller number", "return (x + 12582912.0) - 12582912.0",
                 "return (x + 8388608.0) - 8388608.0"),
            ],
            "test_scales_are_numbers_of_fp16_and_bf16[True]": [
                ("scales not rounded to fp16", "scale.to(tl.float16).to(tl.float32)", "scale"),
                ("scales not rounded to bf16", ".to(tl.bfloat16).to(tl.float32)", ""),
                ("scales of zero", ", 2.0**-24)", ", 0.0)"),
                ("the last of equal scales", "better = cost < best\n            best",
                 "better = cost <= best\n            best"),
            ],
            "test_scales_are_numbers_of_fp16_and_bf16[False]": [
                ("zero of the last clip, not the best", "best_zero = tl.where(better, zero, best_zero)\n        if",
                 "best_zero = zero\n        if"),
                ("a grid without 0: all above", "low = tl.min(tl.where(inside[None, :], target, 0.0), axis=1)",
                 "low = tl.min(tl.where(inside[None, :], target, float('inf')), axis=1)"),
                ("a grid without 0: all below", "high = tl.max(tl.where(inside[None, :], target, 0.0), axis=1)",
                 "high = tl.max(tl.where(inside[None, :], target, -float('inf')), axis=1)"),
            ],
            "test_nothing_beyond_the_edges_is_used": [
                ("row stride of k for the feedback", "rows * (feedback_units * ALIGNMENT)", "rows * k"),
                ("row stride of k for U", "j * (factor_units * ALIGNMENT)", "j * k"),
                ("column strides not looked at", "each if each.stride(1) == 1 else each.contiguous()", "each"),
                ("columns beyond the last", "here = there[:, None] & (columns < k)[None, :]", "here = there[:, None]"),
                ("strides of 75 taken for those of 64", "all(width % 16 == 0 for width in widths)", "True"),
            ],
            "test_offsets_beyond_two_to_the_31": [
                ("32-bit offsets", "    rows = rows.to(tl.int64)  # m n may exceed 2³¹\n", ""),
            ],
        },
        "../emulation/test_ptx.py": {
            "test_columns_are_those_of_the_reference_to_the_bit[symmetric]": [
                ("a row too many", "there = rows < m", "there = rows <= m"),
                ("a column of U too many", "mask=(columns < k)[None, :]", "mask=(columns <= k)[None, :]"),
                ("importance of all columns", "mask=inside, other=0.0", "other=0.0"),
            ],
            "test_columns_are_those_of_the_reference_to_the_bit[levels-16-ragged]": [
                ("a level too many", "mask=index < last, other", "mask=index <= last, other"),
                ("a scale of a row too many", "scale = tl.load(scale_ptrs, mask=there, other=0.0)",
                 "scale = tl.load(scale_ptrs)"),
            ],
        },
    },
    "settings": {
        "test_counts.py": {
            "test_the_error_may_take_the_place_of_the_weight[torch.float32-even]": [
                ("multiplications and additions fused", "FP_FUSION = False", "FP_FUSION = True"),
            ],
        },
    },
}  # fmt: skip

MUTATIONS = {
    f"{file}: {fault}": Mutation(file, text, replacement, f"{tests}::{test}")
    for file, by_tests in FAULTS.items()
    for tests, by_test in by_tests.items()
    for test, faults in by_test.items()
    for fault, text, replacement in faults
}


# Imports take seconds, and a process to itself is what a fault needs: one that has everything imported but the kernels
# forks for each. It is told, a line each, the folder of kernels, the tests and the file for their output.
SERVER = """
import faulthandler, gc, os, signal, sys
import hypothesis, numpy, pytest, torch, triton, triton.language
import quailora.kernels, quailora.quantization.bitsandbytes, quailora.ops.reference

assert not [name for name in sys.modules if name.startswith("quailora.kernels.")]
gc.freeze()  # pytest collects garbage as it ends, and would go through all of torch
for line in sys.stdin:
    folder, tests, output = line.rstrip().split("\\t")
    child = os.fork()
    if child == 0:
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(1, 2)
        faulthandler.dump_traceback_later(110)
        signal.alarm(120)  # a loop that has lost its end, or a heap written over
        quailora.kernels.__path__ = [folder]
        code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", *tests.split()])
        sys.stdout.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Outcome:
    code: int  # pytest's exit code, or -signal
    output: str

    @property
    def found(self) -> bool:
        """A test failed, died or hung: in the interpreter's real memory, a wrong offset may do any of them."""
        return self.code in (pytest.ExitCode.TESTS_FAILED, -signal.SIGSEGV, -signal.SIGABRT, -signal.SIGALRM)


Run = Callable[[Path, list[str]], Outcome]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Run tests with the kernels of a folder, all under the interpreter or none."""
    output = tmp_path_factory.mktemp("output") / "output"
    with ExitStack() as servers:

        @cache
        def server(interpret: str) -> subprocess.Popen[str]:
            environment = os.environ | {
                "TRITON_INTERPRET": interpret,
                "OMP_NUM_THREADS": "1",
                "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            }
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", SERVER], env=environment, cwd=TESTS, text=True, bufsize=1,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
            return servers.enter_context(process)

        def run(folder: Path, tests: list[str]) -> Outcome:
            [interpret] = {"1" if test.startswith("interpreted/") else "0" for test in tests}
            process = server(interpret)
            assert process.stdin and process.stdout
            output.unlink(missing_ok=True)
            print(folder, " ".join(tests), output, sep="\t", file=process.stdin)
            answer = process.stdout.readline()
            assert answer, "the server has ended; its last words are in the captured stderr"
            return Outcome(int(answer), output.read_text())

        yield run


def faulty_kernels(folder: Path, mutation: Mutation) -> Path:
    """The kernels as links to their files, but for the one with the fault."""
    texts = {file.name: file.read_text() for file in KERNELS.glob(f"{mutation.files}.py")}
    found = sum(text.count(mutation.text) for text in texts.values())
    assert found == 1, f"{mutation.files}.py has {mutation.text!r} {found} times"
    for file in KERNELS.glob("*.py"):
        if mutation.text in texts.get(file.name, ""):
            (folder / file.name).write_text(texts[file.name].replace(mutation.text, mutation.replacement))
        else:
            (folder / file.name).symlink_to(file)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("file", dict.fromkeys(mutation.test.partition("::")[0] for mutation in MUTATIONS.values()))
def test_without_a_fault_the_tests_pass(file: str, run: Run) -> None:
    """Else every fault would be "found"."""
    tests = {mutation.test for mutation in MUTATIONS.values()}
    outcome = run(KERNELS, sorted(test for test in tests if test.startswith(f"{file}::")))
    assert outcome.code == pytest.ExitCode.OK, outcome.output


def cases() -> Iterator[Any]:
    """Of each kernel and file of tests, the first is quick; the others where the kernel has changed."""
    first: set[tuple[str, str]] = set()
    for name, mutation in MUTATIONS.items():
        kind = mutation.files, mutation.test.partition("::")[0]
        quick = kind not in first
        first.add(kind)
        kernel = mutation.files.replace("*", "s")
        yield pytest.param(name, id=name, marks=[] if quick else slow_unless_changed(kernel))


@pytest.mark.parametrize("name", cases())
def test_a_fault_in_the_source_is_found(name: str, run: Run, tmp_path: Path) -> None:
    outcome = run(faulty_kernels(tmp_path, MUTATIONS[name]), [MUTATIONS[name].test])
    assert outcome.found, outcome.output


def test_a_mutation_that_no_longer_applies_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"gram_product.py has 'no such text' 0 times"):
        faulty_kernels(tmp_path, Mutation("gram_product", "no such text", "", ""))


# ---- barriers and waits, dropped from the compiled kernel

SYNCHRONIZATION = re.compile(r"(bar\.sync|cp\.async\.wait_group)\s+\d+;")


def needed_synchronization(variant: Variant, launch: Callable[[Callable[[str], str]], bool]) -> list[str]:
    """The barriers and waits of the compiled kernel, less those that are not missed: Triton emits some twice.

    `launch` executes the variant with a rewriting of its PTX and says whether the result is right. One after the other
    is dropped, and put back if the emulator reports a fault or the result is wrong.
    """
    text = aot.compile_for(aot.TARGETS["sm_80"], variant).asm["ptx"]
    assert launch(lambda text: text)
    dropped: set[int] = set()
    needed = []
    for number, match in enumerate(SYNCHRONIZATION.finditer(text)):

        def rewrite(text: str, without: frozenset[int] = frozenset(dropped | {number})) -> str:
            count = iter(range(10**6))
            return SYNCHRONIZATION.sub(lambda found: "" if next(count) in without else found[0], text)

        try:
            missed = not launch(rewrite)
        except ptx.EmulationError:
            missed = True
        if missed:
            needed.append(match[1])
        else:
            dropped.add(number)
    return needed


def product_launch(variant: Variant) -> Callable[[Callable[[str], str]], bool]:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(32, 224, generator=generator), torch.randn(224, 32, generator=generator)
    a, b = (a.bfloat16(), b.bfloat16()) if variant.signature["a_ptr"] == "*bf16" else (a, b)
    exact = a.double() @ b.double()

    def launch(rewrite: Callable[[str], str]) -> bool:
        c = torch.full((32, 32), torch.nan)
        ptx.run(variant, {"a_ptr": a, "b_ptr": b, "c_ptr": c, "m": 32, "n": 32, "k": 224}, rewrite=rewrite)
        return bool((c - exact).norm() < 2e-3 * exact.norm())  # tf32: 10 bits of mantissa, cut off

    return launch


@pytest.mark.parametrize(("dtype", "precision"), [("bf16", "ieee"), ("fp32", "tf32")])
def test_a_dropped_barrier_is_found(dtype: str, precision: str) -> None:
    """Without a pipeline there are four barriers, all of them needed: around a turn's loads, and around the result."""
    variant = product_variant(dtype, precision, num_warps=4, num_stages=1)
    assert needed_synchronization(variant, product_launch(variant)) == ["bar.sync"] * 4


@pytest.mark.parametrize(("dtype", "precision"), [("bf16", "ieee"), ("fp32", "tf32")])
def test_a_dropped_wait_is_found(dtype: str, precision: str) -> None:
    """A pipeline waits for copies before the loop, in each turn and after it, each with a barrier; then stores."""
    variant = product_variant(dtype, precision, num_warps=4, num_stages=3)
    needed = needed_synchronization(variant, product_launch(variant))
    assert needed.count("cp.async.wait_group") >= 3
    assert needed.count("bar.sync") >= 4


def test_one_warp_needs_no_barrier() -> None:
    variant = product_variant("bf16", num_warps=1, num_stages=1)
    assert needed_synchronization(variant, product_launch(variant)) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["4bit-bf16-r16-bf16x3-n-masked", "4bit-bf16-r16-tf32-t-ragged"])
def test_a_dropped_wait_of_an_error_product_is_found(name: str) -> None:
    variant = shipped(error_products, name)
    weight, quantized = linear(37, 192 if name.endswith("masked") else 75)
    launch = launch_of_a_group(variant, [weight], [quantized], [5])
    needed = needed_synchronization(variant, without_failing(launch))
    # Before the loop, in each turn and after it: around the copies, and around the factors' way to the tensor cores.
    assert needed.count("bar.sync") >= 4
    assert needed.count("cp.async.wait_group") >= (1 if name.endswith("masked") else 0)  # ragged rows are not copied


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16x3", "tf32"])
def test_a_dropped_wait_of_a_gram_product_is_found(precision: str) -> None:
    variant = shipped(gram_product, f"k32-{precision}")
    needed = needed_synchronization(variant, without_failing(launch_of_a_gram_product(variant, 160, 16)))
    assert needed.count("bar.sync") >= 4
    assert needed.count("cp.async.wait_group") >= 1


def without_failing(launch: Callable[[Callable[[str], str]], None]) -> Callable[[Callable[[str], str]], bool]:
    """Whether it finds the result right."""

    def run(rewrite: Callable[[str], str]) -> bool:
        try:
            launch(rewrite)
        except AssertionError:
            return False
        return True

    return run


def test_a_dropped_barrier_of_the_factorization_is_found() -> None:
    """They order memory that threads share: that of the multiprocessor, and the scratch of the blocks before."""
    variant, r = shipped(cholesky, "factor-r64"), 49  # four blocks: every loop runs, and runs again
    systems = positive_definite(1, r)
    exact = torch.linalg.inv(torch.linalg.cholesky(systems.double()))

    def launch(rewrite: Callable[[str], str]) -> bool:
        inverse, _, _ = factor(systems, rewrite)
        # As under the interpreter: the condition, 10, times some roundings.
        return bool((inverse - exact).norm() < 10 * torch.finfo(torch.float32).eps * exact.norm())

    text = aot.compile_for(aot.TARGETS["sm_80"], variant).asm["ptx"]
    assert needed_synchronization(variant, launch) == [match[1] for match in SYNCHRONIZATION.finditer(text)]
