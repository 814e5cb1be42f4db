"""Where records come from: files of text or of records, data sets in memory, in a folder or on the hub."""

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from quailora.calibration import sources
from quailora.calibration.data import load_calibration
from quailora.errors import CalibrationError
from tests.helpers.corpus import LINES, ids, lists


def test_large_file_is_read_in_pieces_cut_after_newlines(
    tokenizer: PreTrainedTokenizerFast, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "PIECE", 100)
    pieces = list(sources.read_text(text_file))
    assert "".join(pieces) == "".join(LINES)
    assert len(pieces) > 10 and all(piece.endswith("\n") for piece in pieces)
    # This tokenizer never joins a newline with what follows, so pieces must give what the whole gives.
    rows = load_calibration(text_file, tokenizer, sequence_length=7).sequences
    assert torch.cat(rows).tolist() == ids(tokenizer, "".join(LINES))


def test_large_file_is_read_no_further_than_needed(
    tokenizer: PreTrainedTokenizerFast, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "PIECE", 100)
    # Python decodes ahead by some KB, so what is not UTF-8, and raises when read, stands far behind.
    text_file.write_bytes(text_file.read_bytes() * 50 + b"\xff")
    assert len(load_calibration(text_file, tokenizer, samples=2, sequence_length=8)) == 2
    with pytest.raises(CalibrationError, match="not UTF-8"):
        load_calibration(text_file, tokenizer)


def test_a_column_of_plain_text_is_an_error(tokenizer: PreTrainedTokenizerFast, text_file: Path) -> None:
    with pytest.raises(CalibrationError, match=r"column='body' \(--column\) names a field .* is plain text"):
        load_calibration(text_file, tokenizer, column="body")


def test_one_endless_line_is_still_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PIECE", 10)
    (tmp_path / "line.txt").write_text("x" * 45)
    assert max(map(len, sources.read_text(tmp_path / "line.txt"))) == 20


def write_records(path: Path, records: list[Any], layout: str) -> Path:
    if layout == "array":
        path.write_text(" \n" + json.dumps(records, indent=1))
    else:
        path.write_text("\n\n".join(map(json.dumps, records)) + "\n")
    return path


@pytest.mark.parametrize(("name", "layout"), [("r.json", "array"), ("r.json", "lines"), ("r.jsonl", "lines")])
def test_json_records_are_drawn_by_the_seed_without_replacement(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, name: str, layout: str
) -> None:
    records = [{"text": line} if i % 3 else {"text": ""} for i, line in enumerate(LINES)]  # 40 of 60 hold text
    path = write_records(tmp_path / name, records, layout)
    drawn = load_calibration(path, tokenizer, samples=30, seed=1)
    rows = lists(drawn)
    every = [ids(tokenizer, record["text"], special=True) for record in records if record["text"]]
    assert len({tuple(row) for row in rows}) == 30 and all(row in every for row in rows)
    assert load_calibration(path, tokenizer, samples=30, seed=1).fingerprint() == drawn.fingerprint()
    assert load_calibration(path, tokenizer, samples=30, seed=2).fingerprint() != drawn.fingerprint()
    assert lists(load_calibration(path, tokenizer)) == every
    assert drawn.source == f"{name} (60 records)"


@pytest.mark.parametrize(
    "name", ["r.csv", "r.CSV", "r.tsv", "r.ndjson", "r.JSONL", "r.jsonl.gz", "r.csv.gz", "r.parquet"]
)
def test_files_of_records_are_told_by_their_suffix(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, name: str
) -> None:
    """They must not be read as text, with commas, quotes and braces among the tokens."""
    texts = [f'"{line[:-1]}", he\tsaid' for line in LINES]
    table = datasets.Dataset.from_dict({"number": list(range(60)), "text": texts})
    path = tmp_path / "r[1].d" / name  # not a pattern
    path.parent.mkdir()
    kind = name.lower().split(".")[1]
    plain = path.with_name(f"plain.{kind}")
    if kind == "parquet":
        table.to_parquet(plain)
    elif kind in ("csv", "tsv"):
        table.to_csv(plain, sep="\t" if kind == "tsv" else ",")
    else:
        table.to_json(plain)
    path.write_bytes(gzip.compress(plain.read_bytes()) if name.endswith(".gz") else plain.read_bytes())
    found = load_calibration(path, tokenizer, samples=20, seed=1)
    assert lists(found) == lists(load_calibration(texts, tokenizer, samples=20, seed=1))
    assert found.source == f"{name} (60 records)"


def test_text_may_be_compressed(tokenizer: PreTrainedTokenizerFast, text_file: Path) -> None:
    path = text_file.with_name("corpus.txt.gz")
    path.write_bytes(gzip.compress(text_file.read_bytes()))
    assert lists(load_calibration(path, tokenizer)) == lists(load_calibration(text_file, tokenizer))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CalibrationError, match=r"corpus\.txt\.gz is not UTF-8 text: .*\.parquet"):
        load_calibration(path, tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("r.jsonl", '{"text": "a"}\n{"text": \n', r"r\.jsonl cannot be read as json: .*in row 1"),
        ("r.json", '[{"text": "a"},', r"r\.json cannot be read as json: "),
        ("r.json", '[{"q": 1}]', r"r\.json \(1 record\), record 0: none of the known fields among 'q'"),
        ("r.jsonl", '["Hi"]\n["Ho"]\n', r"r\.jsonl cannot be read as json: "),
        ("r.jsonl", "", r"r\.jsonl \(0 records\) gives no tokens"),
        ("r.csv", "", r"r\.csv cannot be read as csv: .*No columns"),
        ("r.parquet", "text\nno table\n", r"r\.parquet cannot be read as parquet: .*magic bytes"),
        ("r.jsonl.gz", "not compressed", r"r\.jsonl\.gz cannot be read as json: "),
    ],
)
def test_broken_files_are_named(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, name: str, content: str, complaint: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CalibrationError, match=complaint):
        load_calibration(tmp_path / name, tokenizer)


def test_a_file_may_hold_records_of_several_kinds(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """As columns of one table, each record has null in the fields of the others."""
    records = [
        {"text": LINES[0]},
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Say 3.", "response": "3"},
        {"prompt": "1 + 2 =", "completion": " 3"},
        {"messages": [{"role": "user", "content": "the square"}]},
        {"conversations": [{"from": "human", "value": "the square"}]},
        {"input_ids": [5, 6, 7]},
    ]
    path = write_records(tmp_path / "r.jsonl", records, "lines")
    assert lists(load_calibration(path, tokenizer)) == lists(load_calibration(records, tokenizer))


def test_dataset_objects(tokenizer: PreTrainedTokenizerFast) -> None:
    data = datasets.Dataset.from_list([{"text": line} for line in LINES])
    expected = lists(load_calibration(LINES, tokenizer, samples=7, seed=3))
    assert lists(load_calibration(data, tokenizer, samples=7, seed=3)) == expected
    assert lists(load_calibration({"test": data}, tokenizer, samples=7, seed=3, split="test")) == expected
    assert lists(load_calibration(data.to_iterable_dataset(), tokenizer, samples=2)) == lists(
        load_calibration(LINES[:2], tokenizer)
    )
    with pytest.raises(CalibrationError, match=r"no split \(--split\) 'train'.*'test'"):
        load_calibration({"test": data}, tokenizer)


def test_dataset_folder_is_streamed_and_shuffled_by_the_seed(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    write_records(tmp_path / "train.jsonl", [{"text": line} for line in LINES], "lines")
    first, again, other = (load_calibration(tmp_path, tokenizer, samples=9, seed=seed) for seed in (1, 1, 2))
    every = lists(load_calibration(LINES, tokenizer))
    assert len({tuple(row) for row in lists(first)}) == 9 and all(row in every for row in lists(first))
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    with pytest.raises(CalibrationError, match="split 'validation'"):
        load_calibration(tmp_path, tokenizer, split="validation")


def test_hub_name_and_config_reach_the_hub(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        asked.append((name, config, split, streaming))
        if config is None:
            raise ValueError("Config name is missing.")
        return datasets.Dataset.from_list([{"text": line} for line in LINES]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_calibration("owner/set-1.0:raw", tokenizer, samples=4, split="test")) == 4
    with pytest.raises(CalibrationError, match=r"'name:config'.*Config name is missing"):
        load_calibration("owner/set-1.0", tokenizer)
    assert asked == [("owner/set-1.0", "raw", "test", True), ("owner/set-1.0", None, "train", True)]


def test_a_broken_line_in_a_folder_of_data_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n{"text": \n')
    with pytest.raises(CalibrationError, match=f"{tmp_path.name}' cannot be read: "):
        load_calibration(tmp_path, samples=2)
