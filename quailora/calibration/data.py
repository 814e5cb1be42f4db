"""Calibration data: files, data sets, texts or tokens in; token sequences without padding, and batches of them, out."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from quailora.calibration.records import NO_TOKENIZER, encode, token_rows, tokenize
from quailora.calibration.sources import open_records, read_text, text_file
from quailora.calibration.tokenizer import load_tokenizer
from quailora.errors import CalibrationError
from quailora.modeling.checkpoint import Checkpoint
from quailora.reporting.markdown import count

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLES = 2000  # the paper's s (arXiv 2410.14713, section 4)
SEQUENCE_LENGTH = 2048
_PATIENCE = 100  # unusable records beyond the usable ones before the rest is not tried


class Batch(NamedTuple):
    """Some sequences side by side.

    input_ids: (b, t) int64, padded on the right with 0.
    keep: (b, t) bool, True for real tokens; None if nothing is padded.
    """

    input_ids: Tensor
    keep: Tensor | None

    def halves(self) -> list[Batch]:
        """The same in two batches of the same length, the first at least as large; of one sequence, itself."""
        size = -(-len(self.input_ids) // 2)
        keeps = [None, None] if self.keep is None else self.keep.split(size)
        return [Batch(*half) for half in zip(self.input_ids.split(size), keeps, strict=False)]


@dataclass(frozen=True, eq=False)
class Calibration:
    """The tokens that H is computed from.

    sequences: each (length,) int64 on the CPU, at least one token long, real tokens only.
    source: what they were read from, for the report.
    seed: of the random draw, if there was one.
    empty: how many records, or rows of tokens, had no tokens and were passed over.
    unusable, reason: how many records could not be used and were passed over, and why the first.
    named: whether `source` is the name of a file or of a data set, which tells it from other data.
    """

    sequences: tuple[Tensor, ...] = field(repr=False)
    source: str
    seed: int = 0
    empty: int = 0
    unusable: int = 0
    reason: str = ""
    named: bool = False

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def tokens(self) -> int:
        """The number of tokens of all sequences."""
        return sum(len(sequence) for sequence in self.sequences)

    @property
    def longest(self) -> int:
        """The length of the longest sequence."""
        return max(map(len, self.sequences))

    def fingerprint(self) -> str:
        """SHA-256 of the tokens and of where sequences end. A run is resumed only with equal data."""
        digest = hashlib.sha256()
        for sequence in self.sequences:
            digest.update(len(sequence).to_bytes(8, "little"))
            digest.update(sequence.numpy().astype("<i8", copy=False).tobytes())
        return digest.hexdigest()

    def notes(self) -> list[str]:
        """What was passed over, in sentences for the report."""
        notes = []
        if self.empty:
            notes.append(f"passed over {count(self.empty, 'record')} of {self.source} without tokens")
        if self.unusable:
            notes.append(
                f"passed over {count(self.unusable, 'record')} of {self.source} that could not be used; the first was "
                f"{self.reason}"
            )
        return notes

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Every sequence once, `batch_size` at a time, longest first: little padding, and a batch that is too large
        for the memory comes first rather than last.

        Padding is on the right, where causal attention never shows it to a real token, so the blocks need no mask.
        Raises CalibrationError if batch_size < 1.
        """
        _check_positive("batch_size (--batch-size)", batch_size)
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

    - a text file, UTF-8 (also .gz): one stream, tokenized without special tokens and cut into rows in file order, so
      that "64 x 512" is exactly the first 32768 tokens. A shorter last row is kept only if the file ends before
      `samples` rows. Only as much of a large file is read as needed: it is tokenized in pieces of 4 Mi characters cut
      after a newline, so a token or two at each cut may differ from tokenizing it whole;
    - a 1-D integer tensor: a stream as well;
    - a file of records (.json, .jsonl, .ndjson, .csv, .tsv, .parquet, .arrow; also .gz), which `datasets` reads; a
      `datasets.Dataset`; a list of strings or of records. If there are more than `samples`, a random draw without
      replacement;
    - the name of a data set on the Hugging Face Hub, "name" or "name:config", or a folder that
      `datasets.load_dataset` reads: `split` is streamed, its shards in random order and its records through a shuffle
      buffer of 10 000, so no more is downloaded than that buffer and the draw;
    - a 2-D integer tensor (samples x length), a DataLoader, or any other iterable of tensors, of (input_ids,) or
      (input_ids, attention_mask), or of records: in the order given;
    - a Calibration: returned as it is, whatever its samples and lengths.

    A record is a string, a list of chat messages, or a mapping with the fields of `records.ACCEPTED_FIELDS`, looked
    for in that order (`input_ids` first); `column` names the one field to use instead. Texts are tokenized with the
    special tokens the tokenizer adds by default, unless they begin with BOS already; chats as the chat template
    renders them, with the record's `tools`. A record is one sequence, cut off at `sequence_length`. Tokens whose
    attention_mask is 0 are dropped wherever they are.

    Records without tokens, and those that cannot be used, are passed over and counted: see `Calibration.notes`.

    vocab_size: of the model, to check the token ids.

    Raises CalibrationError if more records cannot be used than can, or if no tokens come out, with the first reason;
    and for a `column` of plain text.
    """
    _check_positive("samples (--samples)", samples)
    _check_positive("sequence_length (--sequence-length)", sequence_length)
    if isinstance(data, Calibration):
        _check_vocabulary(data, vocab_size)
        return data

    sequences: Iterable[Tensor]
    if isinstance(data, Tensor) and data.dim() == 1:
        tally = _Tally(f"a stream of {count(len(data), 'token')}")
        sequences = _cut(token_rows(data), sequence_length)
    elif (file := text_file(data)) is not None:
        if tokenizer is None:
            raise CalibrationError(f"{file} {NO_TOKENIZER}")
        if column is not None:
            raise CalibrationError(
                f"column={column!r} (--column) names a field of records, and {file} is plain text: leave it out"
            )
        tally = _Tally(file.name)
        pieces = (tokenize(piece, tokenizer, add_special_tokens=False) for piece in read_text(file))
        sequences = _cut(pieces, sequence_length)
    else:
        records, source = open_records(data, samples, seed, split)
        tally = _Tally(source)
        sequences = _encode_all(records, tally, tokenizer, column)

    kept: list[Tensor] = []
    empty = 0
    for sequence in sequences:
        if len(sequence):
            kept.append(sequence[:sequence_length].clone())  # a view would keep the whole tensor it was cut from alive
        else:
            empty += 1
        if len(kept) == samples:
            break
    tally.check()
    named = isinstance(data, str | os.PathLike)
    calibration = Calibration(tuple(kept), tally.source, seed, empty, tally.unusable, tally.reason, named)
    if not kept:
        nothing = f"{tally.source} gives no tokens: it is empty, tokenizes to nothing, or is all masked out"
        raise CalibrationError("; ".join([nothing, *calibration.notes()]))
    _check_vocabulary(calibration, vocab_size)
    return calibration


@dataclass(frozen=True)
class CalibrationConfig:
    """How much data is taken, and of what: see `load_calibration`. Raises CalibrationError for numbers below 1.

    sequence_length: None is the number of positions of the model, 2048 at most.
    """

    samples: int = SAMPLES
    sequence_length: int | None = None
    seed: int = 0
    split: str = "train"
    column: str | None = None

    def __post_init__(self) -> None:
        _check_positive("samples (--samples)", self.samples)
        if self.sequence_length is not None:
            _check_positive("sequence_length (--sequence-length)", self.sequence_length)


def read_calibration(
    source: Checkpoint,
    data: Any,
    config: CalibrationConfig | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    vocab_size: int | None = None,
) -> Calibration:
    """`load_calibration` with the tokenizer and the limits of the checkpoint.

    vocab_size: None is the checkpoint's.

    Raises CalibrationError for sequences longer than the model has positions, and as `load_calibration`.
    """
    config = config or CalibrationConfig()
    text = source.config.get_text_config(decoder=True)
    positions = getattr(text, "max_position_embeddings", None)
    if tokenizer is None and not isinstance(data, Calibration | Tensor):
        tokenizer = load_tokenizer(source)
    loaded = load_calibration(
        data,
        tokenizer,
        samples=config.samples,
        sequence_length=config.sequence_length or min(SEQUENCE_LENGTH, positions or SEQUENCE_LENGTH),
        seed=config.seed,
        split=config.split,
        column=config.column,
        vocab_size=vocab_size or text.vocab_size,
    )
    if positions is not None and loaded.longest > positions:
        raise CalibrationError(
            f"sequences of {loaded.longest} tokens, and the model has {positions} positions: lower sequence_length "
            "(--sequence-length)"
        )
    return loaded


def _cut(pieces: Iterable[Tensor], length: int) -> Iterator[Tensor]:
    """A stream of tokens, given in pieces, as rows of `length`; the last row is the remainder."""
    rest = torch.empty(0, dtype=torch.int64)
    for piece in pieces:
        rest = torch.cat([rest, piece])
        whole = len(rest) // length * length
        yield from rest[:whole].view(-1, length)
        rest = rest[whole:]
    if len(rest):
        yield rest


@dataclass
class _Tally:
    """How many records of a source could be used and how many not, with the first reason."""

    source: str
    usable: int = 0
    unusable: int = 0
    reason: str = ""

    def check(self, patience: int = 0) -> None:
        """Raise CalibrationError if more records were unusable than usable, by more than `patience`."""
        if self.unusable > self.usable + patience:
            tried = self.usable + self.unusable
            of_all = f" ({self.unusable} of the {tried} records tried cannot be used)" if tried > 1 else ""
            raise CalibrationError(f"{self.source}, {self.reason}{of_all}")


def _encode_all(
    records: Iterable[tuple[int, Any]],
    tally: _Tally,
    tokenizer: PreTrainedTokenizerBase | None,
    column: str | None,
) -> Iterator[Tensor]:
    for number, record in records:
        try:
            sequences = encode(record, tokenizer, column)
        except CalibrationError as error:
            tally.unusable += 1
            tally.reason = tally.reason or f"record {number}: {error}"
            tally.check(_PATIENCE)
        else:
            tally.usable += 1
            yield from sequences


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
