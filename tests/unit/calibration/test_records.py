"""What text and tokens a record gives: its fields, chats and tools, and the special tokens of each."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from quailora.calibration.data import load_calibration
from quailora.calibration.records import text_or_messages
from quailora.errors import CalibrationError
from tests.helpers.corpus import CHAT_TEMPLATE, LINES, ids, lists


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


@pytest.mark.parametrize("value", ["the square", [{"role": "user", "content": "the square"}], [5, 6, 7]])
def test_column_overrides_the_fields(tokenizer: PreTrainedTokenizerFast, value: Any) -> None:
    chosen = load_calibration([{"text": "no", "body": value}], tokenizer, column="body")
    assert lists(chosen) == lists(load_calibration([value], tokenizer))
    with pytest.raises(CalibrationError, match=r"no column \(--column\) 'boody'; found 'text', 'body'"):
        load_calibration([{"text": "no", "body": value}], tokenizer, column="boody")


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
