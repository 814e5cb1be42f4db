"""Calibration data: files, data sets, texts or tokens in; token sequences without padding, and batches of them, out."""

from __future__ import annotations

import hashlib
import json
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from quailora.calibration.tokenizer import load_tokenizer
from quailora.errors import CalibrationError
from quailora.modeling.checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLES = 2000  # the paper's s (arXiv 2410.14713, section 4)
SEQUENCE_LENGTH = 2048
SHUFFLE_BUFFER = 10_000  # records of a streamed data set that a draw chooses from
PIECE = 4 << 20  # characters of a text file tokenized at once, which takes some 140 bytes each

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
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.+-]+)?")
_JSON_SUFFIXES = (".json", ".jsonl")
_FILE_SUFFIXES = (".txt", ".md", *_JSON_SUFFIXES)


class Batch(NamedTuple):
    """Some sequences side by side.

    input_ids: (b, t) int64, padded on the right with 0.
    keep: (b, t) bool, True where a real token stands; None where nothing is padded.
    """

    input_ids: Tensor
    keep: Tensor | None


@dataclass(frozen=True, eq=False)
class Calibration:
    """The tokens that H is gathered on.

    sequences: each (length,) int64 on the CPU, at least one token long, real tokens only.
    source: what they were read from, for the report.
    seed: of the draw, where there was one.
    empty: how many records, or rows of tokens, had no tokens and were passed over.
    """

    sequences: tuple[Tensor, ...] = field(repr=False)
    source: str
    seed: int = 0
    empty: int = 0

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def tokens(self) -> int:
        """How many tokens there are in all."""
        return sum(len(sequence) for sequence in self.sequences)

    @property
    def longest(self) -> int:
        """The length of the longest sequence."""
        return max(map(len, self.sequences))

    def fingerprint(self) -> str:
        """SHA-256 of the tokens, the bounds of the sequences included: equal where a run may be resumed."""
        digest = hashlib.sha256()
        for sequence in self.sequences:
            digest.update(len(sequence).to_bytes(8, "little"))
            digest.update(sequence.numpy().astype("<i8", copy=False).tobytes())
        return digest.hexdigest()

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Every sequence once, `batch_size` at a time, longest first: little padding, and a batch too large for the
        memory is met at once rather than at the end.

        Padding stands on the right, where causal attention never shows it to a real token: the blocks need no mask.
        Raises CalibrationError if batch_size < 1.
        """
        _check_positive("batch_size", batch_size)
        ordered = sorted(self.sequences, key=len, reverse=True)  # stable: equal lengths stay in order
        return (_collate(ordered[i : i + batch_size]) for i in range(0, len(ordered), batch_size))


def load_calibration(
    data: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    samples: int = SAMPLES,
    sequence_length: int = SEQUENCE_LENGTH,
    seed: int = 0,
    split: str = "train",
    column: str | None = None,
    vocab_size: int | None = None,
) -> Calibration:
    """At most `samples` sequences of at most `sequence_length` tokens from any of these:

    - a text file (any suffix but .json and .jsonl), UTF-8: one stream, tokenized without special tokens and cut into
      rows in file order, so that "64 x 512" is exactly the first 32768 tokens. A shorter last row is kept only where
      the file ends before `samples` rows. Not more of a large file is read than needed: it is tokenized in pieces
      of 4 Mi characters cut after a newline, so a token or two at each cut may differ from tokenizing it whole;
    - a 1-D integer tensor: a stream likewise;
    - a .jsonl file, a .json file (an array, or a record a line), a `datasets.Dataset`, a list of strings or of
      records: where there are more than `samples`, a random draw without replacement;
    - the name of a data set on the Hugging Face Hub, "name" or "name:config", or a folder `datasets.load_dataset`
      reads: `split` is streamed, its shards in random order and its records through a shuffle buffer of 10 000, so no
      more is downloaded than that buffer and the draw;
    - a 2-D integer tensor (samples x length), a DataLoader, or any other iterable of tensors, of (input_ids,) or
      (input_ids, attention_mask), or of records: in the order given;
    - a Calibration: returned as it is, samples and lengths included.

    A record is a string, a list of chat messages, or a mapping with the fields of ACCEPTED_FIELDS, looked for in that
    order (`input_ids` first); `column` names the one field to use instead. Texts are tokenized with the
    special tokens the tokenizer adds by default, chats as its chat template has them. A record is one sequence, cut
    off at `sequence_length`; records without tokens are passed over. Tokens whose attention_mask is 0 are dropped
    wherever they stand.

    vocab_size: of the model, for checking the token ids.

    Raises CalibrationError if nothing usable comes out, saying what was found and what is accepted.
    """
    _check_positive("samples", samples)
    _check_positive("sequence_length", sequence_length)
    if isinstance(data, Calibration):
        _check_vocabulary(data, vocab_size)
        return data

    sequences: Iterable[Tensor]
    if isinstance(data, Tensor) and data.dim() == 1:
        source = f"a stream of {len(data)} tokens"
        sequences = _cut(_rows(data), sequence_length)
    elif (file := _text_file(data)) is not None:
        if tokenizer is None:
            raise CalibrationError(f"{file} is text, and there is no tokenizer: pass `tokenizer`")
        source = file.name
        pieces = (_tokenize(piece, tokenizer, add_special_tokens=False) for piece in _read_pieces(file))
        sequences = _cut(pieces, sequence_length)
    else:
        records, source = _open_records(data, samples, seed, split)
        sequences = _encode_all(records, source, tokenizer, column)

    kept: list[Tensor] = []
    empty = 0
    for sequence in sequences:
        if len(sequence):
            kept.append(sequence[:sequence_length].clone())  # a view would keep the whole tensor it was cut from alive
        else:
            empty += 1
        if len(kept) == samples:
            break
    calibration = Calibration(tuple(kept), source, seed, empty)
    if not len(calibration):
        raise CalibrationError(f"{source} gives no tokens: it is empty, tokenizes to nothing, or is all masked out")
    _check_vocabulary(calibration, vocab_size)
    return calibration


def read_calibration(
    source: Checkpoint,
    data: Any,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    samples: int = SAMPLES,
    sequence_length: int | None = None,
    seed: int = 0,
    split: str = "train",
    column: str | None = None,
) -> Calibration:
    """`load_calibration` with the checkpoint's own tokenizer and limits; by default sequences are as long as the model
    has positions, 2048 at most. Raises CalibrationError for sequences it has no positions for."""
    text = source.config.get_text_config(decoder=True)
    positions = getattr(text, "max_position_embeddings", None)
    if sequence_length is None:
        sequence_length = min(SEQUENCE_LENGTH, positions or SEQUENCE_LENGTH)
    if tokenizer is None and not isinstance(data, Calibration | Tensor):
        tokenizer = load_tokenizer(source)
    loaded = load_calibration(
        data,
        tokenizer,
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
        split=split,
        column=column,
        vocab_size=text.vocab_size,
    )
    if positions is not None and loaded.longest > positions:
        raise CalibrationError(
            f"sequences of {loaded.longest} tokens, and the model has {positions} positions: lower sequence_length"
        )
    return loaded


def text_or_messages(record: Any) -> str | list[dict[str, Any]]:
    """The text of one record, or its chat messages (`role`, `content`) where it takes a chat template to make a text.

    Raises CalibrationError, naming the fields found, if they are none of ACCEPTED_FIELDS.
    """
    if isinstance(record, str):
        return record
    if isinstance(record, list | tuple):
        return [_message(message) for message in record]
    if not isinstance(record, Mapping):
        raise CalibrationError(f"a {type(record).__name__} is neither a text, chat messages, nor a record")
    if record.get("text") is not None:
        return _string(record, "text")
    if "instruction" in record and record.get("instances"):
        instances = record["instances"]
        first = instances[0] if isinstance(instances, list | tuple) else instances
        if not isinstance(first, Mapping):
            raise CalibrationError(f"field 'instances' begins with a {type(first).__name__}, not a record")
        return _alpaca({**first, "instruction": record["instruction"]})
    if "instruction" in record and ("output" in record or "response" in record):
        return _alpaca(record)
    if "prompt" in record and "completion" in record:
        if isinstance(record["prompt"], list) and isinstance(record["completion"], list):
            return text_or_messages(record["prompt"] + record["completion"])
        return _string(record, "prompt") + _string(record, "completion")
    for name in ("messages", "conversations"):
        if name in record:
            return text_or_messages(record[name] or "")
    if "text" in record:  # None, and no other field to use instead
        return ""
    raise CalibrationError(
        f"none of the known fields among {', '.join(map(repr, record)) or 'no fields at all'}; "
        f"name the one that holds the text with `column`, or use: {ACCEPTED_FIELDS}"
    )


def _alpaca(record: Mapping[str, Any]) -> str:
    values = {
        "instruction": _string(record, "instruction"),
        "input": _string(record, "input"),
        "output": _string(record, "output" if "output" in record else "response"),
    }
    return (ALPACA_WITH_INPUT if values["input"] else ALPACA).format_map(values)


def _message(message: Any) -> dict[str, Any]:
    if isinstance(message, Mapping):
        if "role" in message and "content" in message:
            return dict(message)
        if "from" in message and "value" in message:
            return {"role": SHAREGPT_ROLES.get(message["from"], message["from"]), "content": message["value"]}
    raise CalibrationError(f"a chat message needs `role` and `content`, or `from` and `value`: {str(message)[:80]!r}")


def _string(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if value is None:  # what data sets hold where a field is empty
        return ""
    if not isinstance(value, str):
        raise CalibrationError(f"field {name!r} holds a {type(value).__name__}, not a string")
    return value


def _text_file(data: Any) -> Path | None:
    if isinstance(data, str | os.PathLike) and os.path.isfile(path := Path(data).expanduser()):
        return None if path.suffix in _JSON_SUFFIXES else path
    return None


def _open_records(data: Any, samples: int, seed: int, split: str) -> tuple[Iterable[tuple[int, Any]], str]:
    """The numbered records of `data`, in the order to try them in, and what to call their source."""
    if isinstance(data, str | os.PathLike):
        path = Path(data).expanduser()
        if os.path.isdir(path):
            return enumerate(_stream_dataset(str(path), None, split, seed)), f"{path} ({split})"
        if not os.path.isfile(path):
            if path.suffix in _FILE_SUFFIXES or not (isinstance(data, str) and _HUB_NAME.fullmatch(data)):
                shown = str(data) if len(str(data)) <= 80 else f"{str(data)[:80]}..."
                raise CalibrationError(f"there is no file {shown!r}; pass text itself as a list of strings")
            name, _, config = data.partition(":")
            return enumerate(_stream_dataset(name, config or None, split, seed)), f"{data} ({split})"
        data, kind = _read_json(path), path.name
    elif isinstance(data, Tensor):
        return enumerate([data]), f"tokens {tuple(data.shape)}"
    elif isinstance(data, Mapping):
        if "input_ids" in data:
            return enumerate([data]), "tokens"
        if split not in data:
            raise CalibrationError(f"no split {split!r} (nor input_ids) among {', '.join(map(repr, data))}")
        return _open_records(data[split], samples, seed, split)
    else:
        kind = type(data).__name__
    if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        return _draw(data, samples, seed), f"{kind} ({len(data)} records)"
    if isinstance(data, Iterable):
        return enumerate(data), kind
    raise CalibrationError(f"calibration data cannot be a {kind}: pass a file, a data set, texts, or tokens")


def _draw(records: Sequence[Any], samples: int, seed: int) -> Iterator[tuple[int, Any]]:
    # More than `samples` are offered, for those without tokens are passed over; the caller stops when it has enough.
    order: Iterable[int] = range(len(records))
    if len(records) > samples:
        order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed)).tolist()
    return ((number, records[number]) for number in order)


class _JsonLines:
    """The records of a file with one a line, parsed when asked for: a large file is scanned, never held."""

    def __init__(self, path: Path) -> None:
        self.path, self.starts = path, array("q")
        start = 0
        with path.open("rb") as file:
            for line in file:
                if not line.isspace():
                    self.starts.append(start)
                start += len(line)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: int) -> Any:
        with self.path.open("rb") as file:
            file.seek(self.starts[number])
            line = file.readline()
        try:
            return json.loads(line)
        except ValueError as error:  # bad JSON or bad UTF-8
            raise CalibrationError(f"{self.path}, record {number}: {error}") from error


def _read_json(path: Path) -> Sequence[Any] | _JsonLines:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        array_begins = path.suffix == ".json" and next((c for line in file for c in line.lstrip()[:1]), "") == "["
    if not array_begins:
        return _JsonLines(path)
    try:
        records: list[Any] = json.loads(path.read_bytes())
    except ValueError as error:
        raise CalibrationError(f"{path}: {error}") from error
    return records


def _stream_dataset(name: str, config: str | None, split: str, seed: int) -> Iterable[Any]:
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(
            f"the data set {name!r} takes a package to read: pip install datasets (the extra quailora[data])"
        ) from error
    try:
        stream = datasets.load_dataset(name, config, split=split, streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise CalibrationError(
            f"no file {name!r} here, and as a data set (config {config!r}, split {split!r}) it does not load; "
            f"give another split, or a config as 'name:config'. {type(error).__name__}: {error}"
        ) from error

    def records() -> Iterator[Any]:
        try:
            yield from stream.shuffle(seed, buffer_size=SHUFFLE_BUFFER)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise CalibrationError(f"the data set {name!r} cannot be read: {type(error).__name__}: {error}") from error

    return records()


def _read_pieces(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            while piece := file.read(PIECE):
                yield piece + file.readline(PIECE)
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 text: {error}; accepted are text, .json and .jsonl") from error


def _cut(pieces: Iterable[Tensor], length: int) -> Iterator[Tensor]:
    """One stream, given in pieces, as rows of `length`; the last row is what remains."""
    rest = torch.empty(0, dtype=torch.int64)
    for piece in pieces:
        rest = torch.cat([rest, piece])
        whole = len(rest) // length * length
        yield from rest[:whole].view(-1, length)
        rest = rest[whole:]
    if len(rest):
        yield rest


def _encode_all(
    records: Iterable[tuple[int, Any]], source: str, tokenizer: PreTrainedTokenizerBase | None, column: str | None
) -> Iterator[Tensor]:
    for number, record in records:
        try:
            sequences = _encode(record, tokenizer, column)
        except CalibrationError as error:
            raise CalibrationError(f"{source}, record {number}: {error}") from error
        yield from sequences


def _encode(record: Any, tokenizer: PreTrainedTokenizerBase | None, column: str | None) -> Sequence[Tensor]:
    """The sequences of one record: several where it is a batch of tokens, else one."""
    if column is not None:
        if not isinstance(record, Mapping) or column not in record:
            found = ", ".join(map(repr, record)) if isinstance(record, Mapping) else f"a {type(record).__name__}"
            raise CalibrationError(f"no column {column!r}; found {found}")
        record = "" if record[column] is None else record[column]
    if isinstance(record, Mapping) and "input_ids" in record:
        return _rows(record["input_ids"], record.get("attention_mask"))
    if isinstance(record, Tensor):
        return _rows(record)
    if isinstance(record, list | tuple) and record:
        if isinstance(record[0], Tensor) and len(record) <= 2:
            return _rows(*record)
        if isinstance(record[0], int):
            return _rows(record)

    content = text_or_messages(record)
    if not content:
        return (torch.empty(0, dtype=torch.int64),)
    if tokenizer is None:
        raise CalibrationError("it is text, and there is no tokenizer: pass `tokenizer`")
    if isinstance(content, str):
        return (_tokenize(content, tokenizer, add_special_tokens=True),)
    # The template writes the special tokens itself.
    return (_tokenize(_render(content, tokenizer), tokenizer, add_special_tokens=False),)


def _render(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        raise CalibrationError(
            "it is a chat, and the tokenizer has no chat template: take the tokenizer of an instruction-tuned model, "
            "set `tokenizer.chat_template`, or name a text field with `column`"
        )
    from jinja2 import TemplateError  # what transformers renders templates with

    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except (TemplateError, TypeError, ValueError) as error:  # such as a content that it cannot add to a string
        raise CalibrationError(f"the tokenizer's chat template refuses these messages: {error}") from error
    assert isinstance(text, str)
    return text


def _tokenize(text: str, tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool) -> Tensor:
    # verbose=False: no warning about a length beyond the model's, for what goes to the model is cut afterwards.
    # Cut by us, not by `truncation=True`, which may cut on the left and stays set on the tokenizer.
    ids = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def _rows(input_ids: Any, mask: Any = None) -> Sequence[Tensor]:
    """The real tokens of each row of input_ids, (t,) or (b, t) of integers; mask likewise, 1 where a token is real."""
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


def _collate(sequences: Sequence[Tensor]) -> Batch:
    input_ids = pad_sequence(list(sequences), batch_first=True)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    keep = torch.arange(input_ids.shape[1]) < lengths[:, None]
    return Batch(input_ids, None if keep.all() else keep)


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise CalibrationError(f"{name} must be at least 1, got {value}")


def _check_vocabulary(calibration: Calibration, vocab_size: int | None) -> None:
    for number, sequence in enumerate(calibration.sequences):
        low, high = (extreme.item() for extreme in sequence.aminmax())
        if low < 0:
            raise CalibrationError(f"{calibration.source}: negative token id {low} in sequence {number}")
        if vocab_size is not None and high >= vocab_size:
            raise CalibrationError(
                f"{calibration.source}: token id {high} in sequence {number}, where the model's vocabulary has "
                f"{vocab_size}; was it tokenized with another model's tokenizer?"
            )
