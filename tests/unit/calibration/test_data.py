import gzip
import json
import logging
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.utils.data import DataLoader, Dataset, TensorDataset
from transformers import PreTrainedTokenizerFast

from quailora.calibration import data as module
from quailora.calibration import sources
from quailora.calibration.data import SAMPLES, Calibration, load_calibration
from quailora.calibration.records import text_or_messages
from quailora.errors import CalibrationError

LINES = [f"line {i} of the corpus says that {i * i} is the square of {i} .\n" for i in range(60)]
CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """`datasets` keeps a copy of every file it loads."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE which begins each text with <s>, as Llama's does."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(LINES, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    # A context of 8: every test below that passes more would warn if anything did.
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", model_max_length=8)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def ids(tokenizer: PreTrainedTokenizerFast, text: str, special: bool = False) -> list[int]:
    return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]


def lists(calibration: Calibration) -> list[list[int]]:
    return [sequence.tolist() for sequence in calibration.sequences]


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("".join(LINES), encoding="utf-8")
    return path


# Streams


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


def test_one_endless_line_is_still_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PIECE", 10)
    (tmp_path / "line.txt").write_text("x" * 45)
    assert max(map(len, sources.read_text(tmp_path / "line.txt"))) == 20


@given(st.lists(st.lists(st.integers(0, 9), max_size=9), max_size=6), st.integers(1, 7))
def test_cutting_a_stream_does_not_depend_on_its_pieces(pieces: list[list[int]], length: int) -> None:
    rows = list(module._cut([torch.tensor(piece, dtype=torch.int64) for piece in pieces], length))
    assert list(chain(*(row.tolist() for row in rows))) == list(chain(*pieces))
    assert all(len(row) == length for row in rows[:-1]) and all(0 < len(row) <= length for row in rows)


def test_token_stream() -> None:
    assert lists(load_calibration(torch.arange(7), sequence_length=3)) == [[0, 1, 2], [3, 4, 5], [6]]


# Records


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ("a text", "a text"),
        ({"text": "a text", "messages": []}, "a text"),
        ({"text": None}, ""),
        ({"text": None, "messages": [{"role": "user", "content": "Hi"}]}, [{"role": "user", "content": "Hi"}]),
        (
            {"instruction": "Add.", "input": "", "output": "3"},
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            "\n\n### Instruction:\nAdd.\n\n### Response:\n3",
        ),
        (
            {"instruction": "Add {x}.", "input": "1 2", "response": "3"},
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request."
            "\n\n### Instruction:\nAdd {x}.\n\n### Input:\n1 2\n\n### Response:\n3",
        ),
        ({"prompt": "1 + 2 =", "completion": " 3"}, "1 + 2 = 3"),
        (
            {"prompt": [{"role": "user", "content": "1 + 2"}], "completion": [{"role": "assistant", "content": "3"}]},
            [{"role": "user", "content": "1 + 2"}, {"role": "assistant", "content": "3"}],
        ),
        ({"messages": [{"role": "user", "content": "Hi"}]}, [{"role": "user", "content": "Hi"}]),
        (
            {"conversations": [{"from": f, "value": f} for f in ("system", "human", "gpt")]},
            [
                {"role": "system", "content": "system"},
                {"role": "user", "content": "human"},
                {"role": "assistant", "content": "gpt"},
            ],
        ),
    ],
)
def test_text_of_a_record(record: Any, expected: Any) -> None:
    assert text_or_messages(record) == expected


def test_self_instruct_task_reads_as_alpaca() -> None:
    task = {"instruction": "Add.", "instances": [{"input": "1 2", "output": "3"}], "id": "seed_task_0"}
    assert text_or_messages(task) == text_or_messages({"instruction": "Add.", "input": "1 2", "output": "3"})


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"question": "?", "answer": "!"}, r"'question', 'answer'.*`column`.*conversations"),
        ({}, "no fields at all"),
        ({"text": 3}, "'text' holds a int"),
        ({"prompt": [{"role": "user", "content": "1 + 2"}], "completion": "3"}, "'prompt' holds a list"),
        ({"messages": [{"speaker": "me"}]}, "`role` and `content`"),
        (3.5, "a float is neither"),
    ],
)
def test_unreadable_records_name_what_was_found(record: Any, complaint: str) -> None:
    with pytest.raises(CalibrationError, match=complaint):
        text_or_messages(record)


def test_texts_carry_the_special_tokens_of_the_tokenizer_and_are_cut_off(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["the square of", "", LINES[3]]  # the tokenizer makes of "" one <s>: no text, so passed over
    expected = [ids(tokenizer, text, special=True)[:9] for text in (texts[0], texts[2])]
    found = load_calibration(texts, tokenizer, sequence_length=9)
    assert (lists(found), found.empty) == (expected, 1)
    assert load_calibration(texts, tokenizer, samples=1).empty == 0  # no more is looked at than is taken
    assert expected[0][0] == tokenizer.bos_token_id and len(expected[1]) == 9


def test_chats_carry_the_special_tokens_of_the_template_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = {"messages": [{"role": "user", "content": "the square"}, {"role": "assistant", "content": "is 4"}]}
    (sequence,) = load_calibration([chat], tokenizer).sequences
    assert tokenizer.decode(sequence) == "<user>the square</s><assistant>is 4</s>"
    assert (sequence == tokenizer.eos_token_id).sum() == 2 and not (sequence == tokenizer.bos_token_id).any()


def chat_of(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "the square"}, *messages], **fields}


def rendered(record: Any, tokenizer: PreTrainedTokenizerFast) -> str:
    (sequence,) = load_calibration([record], tokenizer).sequences
    text = tokenizer.decode(sequence)
    assert isinstance(text, str)
    return text


def test_text_parts_are_joined(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    """A template that trims its contents would print the list as Python does."""
    monkeypatch.setattr(tokenizer, "chat_template", CHAT_TEMPLATE.replace("m.content", "m.content | trim"))
    parts = [{"type": "text", "text": "is ", "image": None}, {"type": "text", "text": "4"}]
    assert rendered(chat_of({"role": "assistant", "content": parts}), tokenizer) == rendered(
        chat_of({"role": "assistant", "content": "is 4"}), tokenizer
    )
    for part, kind in (({"type": "image"}, "'image'"), ("is", "'str'")):
        with pytest.raises(CalibrationError, match=f"a part of type {kind}; only text"):
            load_calibration([chat_of({"role": "user", "content": [*parts, part]})], tokenizer)
    with pytest.raises(CalibrationError, match="content of a chat message is a int"):
        load_calibration([chat_of({"role": "user", "content": 4})], tokenizer)


CALL = {"type": "function", "function": {"name": "square", "arguments": {"x": 2}}}


@pytest.mark.parametrize("message", [{"content": None}, {}], ids=["null", "missing"])
def test_tool_calls_have_no_content(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, message: dict[str, Any]
) -> None:
    calls = "{% for c in m.tool_calls %}!{{ c.function.name }}{% endfor %}"
    template = "{% for m in messages %}{{ m.content | trim }}" + calls + "{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    record = chat_of({"role": "assistant", "tool_calls": [CALL], **message})
    assert rendered(record, tokenizer) == "the square!square"
    assert rendered(chat_of({"role": "assistant", "content": None}), tokenizer) == "the square"


@pytest.mark.parametrize("as_json", [False, True])
def test_tools_reach_the_template(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    template = "{% for t in tools or [] %}[{{ t.function.keys() | list }}]{% endfor %}{{ messages[0].content }}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    tools: Any = [{"type": "function", "function": {"name": "square", "strict": None}}]  # null as tables have it
    record = chat_of(tools=json.dumps(tools) if as_json else tools)
    assert rendered(record, tokenizer) == "[['name']]the square"
    record["chat"] = record.pop("messages")
    (sequence,) = load_calibration([record], tokenizer, column="chat").sequences
    assert tokenizer.decode(sequence) == "[['name']]the square"
    for without in (None, [], ""):
        assert rendered(chat_of(tools=without), tokenizer) == "the square"
    with pytest.raises(CalibrationError, match="'tools' is not JSON"):
        load_calibration([chat_of(tools="square")], tokenizer)
    with pytest.raises(CalibrationError, match="'tools' holds a dict"):
        load_calibration([chat_of(tools=tools[0])], tokenizer)


def test_a_rendered_text_gets_no_second_bos(tokenizer: PreTrainedTokenizerFast) -> None:
    bare, begun = load_calibration(["the square", "<s>the square"], tokenizer).sequences
    assert bare.tolist() == begun.tolist() and bare[0] == tokenizer.bos_token_id != bare[1]


def test_a_record_that_cannot_be_used_stops_no_run(tokenizer: PreTrainedTokenizerFast) -> None:
    bad = chat_of({"role": "assistant", "content": [{"type": "image"}]})
    found = load_calibration([LINES[0], bad, bad, *LINES[1:], ""], tokenizer)
    assert lists(found) == lists(load_calibration(LINES, tokenizer))
    empty, unusable = found.notes()
    assert empty == "1 records of list (63 records) had no tokens, and were passed over"
    assert unusable.startswith("2 records of list (63 records) could not be used")
    assert unusable.endswith(
        "the first was record 1: a chat message has a part of type 'image'; only text parts can be used"
    )
    assert load_calibration(LINES, tokenizer).notes() == []


def test_mostly_unusable_records_are_refused_with_the_first_reason(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(CalibrationError, match=r"record 0: a float.*\(2 of the 3 records tried"):
        load_calibration([0.5, LINES[0], 3], tokenizer)
    with pytest.raises(CalibrationError, match=r"gives no tokens.*1 records of .*record 1: a float"):
        load_calibration(["", 0.5], tokenizer)

    def endless() -> Iterator[Any]:
        yield LINES[0]
        while True:
            yield {"question": "?"}

    with pytest.raises(CalibrationError, match=r"record 1: none of the known fields.*\(102 of the 103 records tried"):
        load_calibration(endless(), tokenizer)


@pytest.mark.parametrize("value", ["the square", [{"role": "user", "content": "the square"}], [5, 6, 7]])
def test_column_overrides_the_fields(tokenizer: PreTrainedTokenizerFast, value: Any) -> None:
    chosen = load_calibration([{"text": "no", "body": value}], tokenizer, column="body")
    assert lists(chosen) == lists(load_calibration([value], tokenizer))
    with pytest.raises(CalibrationError, match=r"no column \(--column\) 'boody'; found 'text', 'body'"):
        load_calibration([{"text": "no", "body": value}], tokenizer, column="boody")


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
        ("r.json", '[{"q": 1}]', r"r\.json \(1 records\), record 0: none of the known fields among 'q'"),
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


# Data sets


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


# Tokens


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
        ([{"input_ids": PADDED, "attention_mask": 0 * MASK}], {}, r"list \(1 records\) gives no tokens"),
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


def test_text_that_needs_what_the_tokenizer_lacks(
    tokenizer: PreTrainedTokenizerFast, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(CalibrationError, match=r"corpus\.txt is text, and there is no tokenizer"):
        load_calibration(text_file)
    (tmp_path / "empty.md").write_text("")
    with pytest.raises(CalibrationError, match=r"empty\.md gives no tokens"):
        load_calibration(tmp_path / "empty.md", tokenizer)

    chat = [{"messages": [{"role": "user", "content": "Hi"}]}]
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(CalibrationError, match="record 0: it is a chat, and the tokenizer has no chat template"):
        load_calibration(chat, plain)
    plain.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(CalibrationError, match="refuses these messages: roles must alternate"):
        load_calibration(chat, plain)
    plain.chat_template = "{{ 3 + messages[0]['content'] }}"
    with pytest.raises(CalibrationError, match=r"record 0: .*refuses these messages: .*str"):
        load_calibration(chat, plain)


def test_long_texts_give_no_length_warning(
    tokenizer: PreTrainedTokenizerFast, text_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)  # it does not propagate to the root logger
    try:
        load_calibration(text_file, tokenizer)
        load_calibration(["".join(LINES), {"messages": [{"role": "user", "content": "".join(LINES)}]}], tokenizer)
        assert not caplog.records
        tokenizer("".join(LINES))  # shows that the warning was there to be given
        assert "longer than the specified maximum" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)


# Batches


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
