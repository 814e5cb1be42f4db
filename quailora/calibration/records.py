"""From one record to tokens: which fields hold the text, chat templates, special tokens, padding."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quailora.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ACCEPTED_FIELDS = (
    "text; instruction, input (optional) and output or response; instruction and instances; "
    "prompt and completion; messages; conversations; input_ids and attention_mask (optional)"
)

# The layout of the `text` column of the data set tatsu-lab/alpaca.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n{output}"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n{output}"
)
_TEXT_FIELDS = ("text", "output", "response", "completion", "messages", "conversations")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}

NO_TOKENIZER = "is text, and there is no tokenizer: add one to the checkpoint's folder, or pass `tokenizer` in Python"

Message = dict[str, Any]


def encode(record: Any, tokenizer: PreTrainedTokenizerBase | None, column: str | None) -> Sequence[Tensor]:
    """The token sequences of one record, each (length,) int64: several if it is a batch of tokens, else one.

    Raises CalibrationError if the record cannot be used.
    """
    tools = record.get("tools") if isinstance(record, Mapping) else None
    if column is not None:
        if not isinstance(record, Mapping) or column not in record:
            found = ", ".join(map(repr, record)) if isinstance(record, Mapping) else f"a {type(record).__name__}"
            raise CalibrationError(f"no column (--column) {column!r}; found {found}")
        record = "" if record[column] is None else record[column]
    if isinstance(record, Mapping) and record.get("input_ids") is not None:
        return token_rows(record["input_ids"], record.get("attention_mask"))
    if isinstance(record, Tensor):
        return token_rows(record)
    if isinstance(record, list | tuple) and record:
        if isinstance(record[0], Tensor) and len(record) <= 2:
            return token_rows(*record)
        if isinstance(record[0], int):
            return token_rows(record)

    content = text_or_messages(record)
    if not content:
        return (torch.empty(0, dtype=torch.int64),)
    if tokenizer is None:
        raise CalibrationError(f"it {NO_TOKENIZER}")
    if isinstance(content, str):
        # A text that begins with BOS is a rendered chat, and has its special tokens already.
        rendered = bool(tokenizer.bos_token) and content.startswith(tokenizer.bos_token)
        return (tokenize(content, tokenizer, add_special_tokens=not rendered),)
    return (tokenize(_render(content, _read_tools(tools), tokenizer), tokenizer, add_special_tokens=False),)


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool) -> Tensor:
    """The tokens of a text, (length,) int64, however long it is."""
    # verbose=False: no warning about a length beyond the model's, as the sequence is cut afterwards.
    # Cut by us, not by `truncation=True`, which may cut on the left and stays set on the tokenizer.
    ids = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def token_rows(input_ids: Any, mask: Any = None) -> Sequence[Tensor]:
    """The real tokens of each row of input_ids, (t,) or (b, t) of integers; mask likewise, 1 for a real token.

    Raises CalibrationError for any other shape, dtype or mask.
    """
    try:
        ids = torch.as_tensor(input_ids, device="cpu")
        keep = torch.ones_like(ids) if mask is None else torch.as_tensor(mask, device="cpu")
    except (TypeError, ValueError) as error:
        raise CalibrationError(f"input_ids and attention_mask must be rectangular arrays: {error}") from error
    if ids.numel() == 0:
        return ()
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or ids.dim() not in (1, 2):
        raise CalibrationError(f"input_ids must be integers, (t,) or (b, t); got {ids.dtype}, {tuple(ids.shape)}")
    if keep.shape != ids.shape or not ((keep == 0) | (keep == 1)).all():
        raise CalibrationError(
            f"attention_mask must be 0 or 1 for each token of input_ids {tuple(ids.shape)}; "
            f"got {tuple(keep.shape)} with values {keep.unique()[:5].tolist()}"
        )
    length = ids.shape[-1]
    return [row[real] for row, real in zip(ids.long().view(-1, length), keep.bool().view(-1, length), strict=True)]


def text_or_messages(record: Any) -> str | list[Message]:
    """The text of one record, or its chat messages (`role`, `content`), which take a chat template to become text.

    A field that is null counts as missing: a file with several kinds of records has null in the columns of the others.
    Raises CalibrationError, naming the fields found, if they are none of ACCEPTED_FIELDS.
    """
    if isinstance(record, str):
        return record
    if isinstance(record, list | tuple):
        return [_message(message) for message in record]
    if not isinstance(record, Mapping):
        raise CalibrationError(f"a {type(record).__name__} is neither a text, chat messages, nor a record")

    def has(*names: str) -> bool:
        return all(name in record for name in names) and any(record[name] is not None for name in names)

    if has("text"):
        return _string(record, "text")
    if has("instruction") and record.get("instances"):
        instances = record["instances"]
        first = instances[0] if isinstance(instances, list | tuple) else instances
        if not isinstance(first, Mapping):
            raise CalibrationError(f"field 'instances' begins with a {type(first).__name__}, not a record")
        return _alpaca({**first, "instruction": record["instruction"]})
    if has("instruction", "output") or has("instruction", "response"):
        return _alpaca(record)
    if has("prompt", "completion"):
        if isinstance(record["prompt"], list) and isinstance(record["completion"], list):
            return text_or_messages(record["prompt"] + record["completion"])
        return _string(record, "prompt") + _string(record, "completion")
    for name in ("messages", "conversations"):
        if has(name):
            return text_or_messages(record[name])
    if any(record.get(name, "") is None for name in _TEXT_FIELDS):
        return ""
    raise CalibrationError(
        f"none of the known fields among {', '.join(map(repr, record)) or 'no fields at all'}; "
        f"name the one that holds the text with `column` (--column), or use: {ACCEPTED_FIELDS}"
    )


def _alpaca(record: Mapping[str, Any]) -> str:
    values = {
        "instruction": _string(record, "instruction"),
        "input": _string(record, "input"),
        "output": _string(record, "output") or _string(record, "response"),
    }
    return (ALPACA_WITH_INPUT if values["input"] else ALPACA).format_map(values)


def _string(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise CalibrationError(f"field {name!r} holds a {type(value).__name__}, not a string")
    return value


def _message(message: Any) -> Message:
    """A chat message for a template: without nulls, its `content` a string, or missing beside tool calls."""
    if isinstance(message, Mapping):
        given = _without_nulls(message)
        if "role" in given and ("content" in message or given.get("tool_calls")):
            if "content" in given or not given.get("tool_calls"):
                given["content"] = _joined(given.get("content", ""))
            return given
        if "from" in given and "value" in message:
            role = SHAREGPT_ROLES.get(given["from"], given["from"])
            return {"role": role, "content": _joined(given.get("value", ""))}
    raise CalibrationError(f"a chat message needs `role` and `content`, or `from` and `value`: {str(message)[:80]!r}")


def _joined(content: Any) -> str:
    """The content of a message as one string. Many templates would print a list of parts as Python does."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise CalibrationError(
            f"the content of a chat message is a {type(content).__name__}, not a string or a list of text parts"
        )
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise CalibrationError(f"a chat message has a part of type {kind!r}; only text parts can be used")
    return "".join(part["text"] for part in content)


def _without_nulls(value: Any) -> Any:
    """The same dicts and lists without keys whose value is null: tables have null for every key of other records."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(item) for item in value]
    return value


def _read_tools(tools: Any) -> list[Any] | None:
    """The tools of a record for the chat template; they may be written as JSON. None if there are none."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools or "null")
        except ValueError as error:
            raise CalibrationError(f"field 'tools' is not JSON: {error}") from error
    if tools is not None and not isinstance(tools, list):
        raise CalibrationError(f"field 'tools' holds a {type(tools).__name__}, not a list")
    return _without_nulls(tools) or None


def _render(messages: list[Message], tools: list[Any] | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a chat, with the special tokens that the template writes."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise CalibrationError(
            "it is a chat, and the tokenizer has no chat template: use the tokenizer of an instruction-tuned model, "
            "set `tokenizer.chat_template`, or name a text field with `column` (--column)"
        )
    from jinja2 import TemplateError  # what transformers renders templates with

    try:
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    except (TemplateError, TypeError, ValueError) as error:  # such as roles that do not alternate
        raise CalibrationError(f"the tokenizer's chat template refuses these messages: {error}") from error
    assert isinstance(text, str)
    return text
