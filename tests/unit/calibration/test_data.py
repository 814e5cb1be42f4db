"""Calibration data: cut into sequences, checked, and put into batches."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, TensorDataset
from transformers import PreTrainedTokenizerFast

from quailora.calibration import data as module
from quailora.calibration.data import SAMPLES, Calibration, load_calibration
from quailora.errors import CalibrationError
from tests.helpers.corpus import LINES, ids, lists


def test_text_file_is_cut_into_exactly_the_first_rows(tokenizer: PreTrainedTokenizerFast, text_file: Path) -> None:
    whole = ids(tokenizer, "".join(LINES))
    calibration = load_calibration(text_file, tokenizer, samples=5, sequence_length=16)
    assert lists(calibration) == [whole[i : i + 16] for i in range(0, 80, 16)]
    assert calibration.tokens == 80
    assert calibration.source == "corpus.txt"


def test_tail_is_kept_only_where_the_file_ends_before_enough_rows(
    tokenizer: PreTrainedTokenizerFast, text_file: Path
) -> None:
    whole = ids(tokenizer, "".join(LINES))
    length = len(whole) // 2 - 1  # two rows, and two or three tokens
    rows = load_calibration(str(text_file), tokenizer, sequence_length=length).sequences
    assert len(rows) == 3 and torch.cat(rows).tolist() == whole
    assert load_calibration(text_file, tokenizer, samples=2, sequence_length=length).tokens == 2 * length


def test_of_a_text_of_whole_rows_nothing_was_passed_over(tokenizer: PreTrainedTokenizerFast, text_file: Path) -> None:
    tokens = sum(map(len, load_calibration(text_file, tokenizer, sequence_length=1).sequences))
    found = load_calibration(text_file, tokenizer, sequence_length=tokens)
    assert (len(found), found.empty) == (1, 0)


@given(st.lists(st.lists(st.integers(0, 9), max_size=9), max_size=6), st.integers(1, 7))
def test_cutting_a_stream_does_not_depend_on_its_pieces(pieces: list[list[int]], length: int) -> None:
    rows = list(module._cut([torch.tensor(piece, dtype=torch.int64) for piece in pieces], length))
    assert list(chain(*(row.tolist() for row in rows))) == list(chain(*pieces))
    assert all(len(row) == length for row in rows[:-1]) and all(0 < len(row) <= length for row in rows)


def test_token_stream() -> None:
    assert lists(load_calibration(torch.arange(7), sequence_length=3)) == [[0, 1, 2], [3, 4, 5], [6]]


def test_a_record_that_cannot_be_used_stops_no_run(tokenizer: PreTrainedTokenizerFast) -> None:
    bad = {"messages": [{"role": "user", "content": [{"type": "image"}]}]}
    found = load_calibration([LINES[0], bad, bad, *LINES[1:], ""], tokenizer)
    assert lists(found) == lists(load_calibration(LINES, tokenizer))
    empty, unusable = found.notes()
    assert empty == "passed over 1 record of list (63 records) without tokens"
    assert unusable.startswith(
        "passed over 2 records of list (63 records) that could not be used; the first was record 1:"
    )
    assert unusable.endswith(
        "the first was record 1: a chat message has a part of type 'image'; only text parts can be used"
    )
    assert load_calibration(LINES, tokenizer).notes() == []


def test_mostly_unusable_records_are_refused_with_the_first_reason(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(CalibrationError, match=r"record 0: a float.*\(2 of the 3 records tried"):
        load_calibration([0.5, LINES[0], 3], tokenizer)
    with pytest.raises(CalibrationError, match=r"gives no tokens.*1 record of .*record 1: a float"):
        load_calibration(["", 0.5], tokenizer)

    def endless() -> Iterator[Any]:
        yield LINES[0]
        while True:
            yield {"question": "?"}

    with pytest.raises(CalibrationError, match=r"record 1: none of the known fields.*\(102 of the 103 records tried"):
        load_calibration(endless(), tokenizer)


PADDED = torch.tensor([[0, 0, 5, 6], [7, 8, 0, 0], [9, 0, 10, 11]])
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [1, 0, 1, 1]])


class DictDataset(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return len(PADDED)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {"input_ids": PADDED[row], "attention_mask": MASK[row]}


@pytest.mark.parametrize(
    "data",
    [
        {"input_ids": PADDED, "attention_mask": MASK},
        [{"input_ids": row, "attention_mask": mask.bool()} for row, mask in zip(PADDED, MASK, strict=True)],
        [{"input_ids": row, "attention_mask": mask} for row, mask in zip(PADDED.tolist(), MASK.tolist(), strict=True)],
        DataLoader(TensorDataset(PADDED.int(), MASK), batch_size=2),
        DictDataset(),
        DataLoader(DictDataset(), batch_size=2),
        [torch.tensor([5, 6]), torch.tensor([7, 8]), torch.tensor([9, 10, 11])],
        (ids for ids in ([5, 6], [7, 8], [9, 10, 11])),
    ],
    ids=["batch", "rows", "lists", "tuple-loader", "dataset", "dict-loader", "ragged", "generator"],
)
def test_padding_is_dropped_wherever_it_stands(data: Any) -> None:
    assert lists(load_calibration(data)) == [[5, 6], [7, 8], [9, 10, 11]]


def test_token_matrix_is_taken_in_order_and_copied() -> None:
    rows = torch.arange(12).view(3, 4)
    calibration = load_calibration(rows, samples=2, sequence_length=3)
    rows.zero_()
    assert lists(calibration) == [[0, 1, 2], [4, 5, 6]]
    # Nothing that was cut off is kept alive: 3 tokens of 8 bytes each.
    assert [sequence.untyped_storage().nbytes() for sequence in calibration.sequences] == [24, 24]


def test_endless_loader_is_left_as_soon_as_there_is_enough() -> None:
    def endless() -> Iterator[torch.Tensor]:
        while True:
            yield torch.arange(4)

    assert len(load_calibration(endless())) == SAMPLES == 2000


def test_calibration_passes_through() -> None:
    calibration = load_calibration(torch.arange(6).view(2, 3))
    assert load_calibration(calibration, samples=1) is calibration


@pytest.mark.parametrize(
    ("data", "options", "complaint"),
    [
        (torch.ones(2, 3), {}, r"integers.*torch\.float32, \(2, 3\)"),
        (torch.ones(2, 3, 4, dtype=torch.int64), {}, r"\(2, 3, 4\)"),
        ([{"input_ids": [[1, 2], [3]]}], {}, "record 0: input_ids and attention_mask must be rectangular"),
        ([(PADDED, PADDED)], {}, r"0 or 1.*values \[0, 5, 6, 7, 8\]"),
        ([(PADDED, MASK[:, 1:])], {}, r"\(3, 4\); got \(3, 3\)"),
        ([(PADDED, MASK[:0])], {}, r"got \(0, 4\) with values \[\]"),
        ([{"input_ids": PADDED, "attention_mask": 0 * MASK}], {}, r"list \(1 record\) gives no tokens"),
        (torch.empty(0, dtype=torch.int64), {}, "0 tokens gives no tokens"),
        ([], {}, "no tokens"),
        ([{"instruction": "Say it.", "instances": [None]}], {}, "record 0: field 'instances' begins with a NoneType"),
        (PADDED, {"vocab_size": 11}, r"tokens \(3, 4\): token id 11 in sequence 2.*vocabulary has 11"),
        (Calibration((torch.tensor([3]),), "mine"), {"vocab_size": 3}, "mine: token id 3"),
        (PADDED - 1, {}, "negative token id -1 in sequence 0"),
        (PADDED, {"samples": 0}, r"samples \(--samples\) must be at least 1, got 0"),
        (PADDED, {"sequence_length": 0}, r"sequence_length \(--sequence-length\) must be at least 1, got 0"),
        (["a text"], {}, "record 0: it is text, and there is no tokenizer"),
        (3, {}, "cannot be a int"),
        ("missing.txt", {}, "no file 'missing.txt'"),
        ("some/deep/folder/missing", {}, "no file 'some/deep"),
        ("A text, not a name. " * 50, {}, r"A text.*\.\.\.'; pass text itself as a list"),
    ],
)
def test_unusable_input_is_refused(data: Any, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(CalibrationError, match=complaint):
        load_calibration(data, **options)


def test_largest_token_of_the_vocabulary_is_accepted() -> None:
    assert load_calibration(PADDED, vocab_size=12).tokens == 12


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=9), min_size=1, max_size=12), st.integers(1, 5))
def test_batches_hold_every_token_once_and_keep_marks_them(rows: list[list[int]], batch_size: int) -> None:
    calibration = load_calibration(rows)
    lengths, seen = [], []
    for batch in calibration.batches(batch_size):
        assert batch.input_ids.dtype == torch.int64 and len(batch.input_ids) <= batch_size
        keep = torch.ones_like(batch.input_ids, dtype=torch.bool) if batch.keep is None else batch.keep
        assert batch.keep is None or not keep.all()
        assert (keep[:, :-1] >= keep[:, 1:]).all()  # padded on the right only
        assert keep[0].all()  # and no wider than the longest
        lengths += keep.sum(1).tolist()
        seen += [row[real].tolist() for row, real in zip(batch.input_ids, keep, strict=True)]
    assert lengths == sorted(lengths, reverse=True)
    assert sorted(seen) == sorted(rows)


def test_batches_order_and_padding() -> None:
    calibration = load_calibration([[1], [2, 3], [4], [5, 6]])
    first, second = calibration.batches(2)
    assert first.input_ids.tolist() == [[2, 3], [5, 6]] and first.keep is None
    assert second.input_ids.tolist() == [[1], [4]] and second.keep is None
    (both,) = calibration.batches(4)
    assert both.input_ids.tolist() == [[2, 3], [5, 6], [1, 0], [4, 0]]
    assert both.keep is not None
    assert both.keep.tolist() == [[True, True], [True, True], [True, False], [True, False]]
    with pytest.raises(CalibrationError, match=r"batch_size \(--batch-size\) must be at least 1, got 0"):
        calibration.batches(0)


def test_fingerprint_tells_tokens_and_bounds_apart() -> None:
    prints = {load_calibration(rows).fingerprint() for rows in ([[1, 2], [3]], [[1], [2, 3]], [[1, 2], [4]])}
    assert len(prints) == 3
    assert load_calibration([[1, 2], [3]], seed=5).fingerprint() in prints
