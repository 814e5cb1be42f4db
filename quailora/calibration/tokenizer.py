"""The tokenizer that belongs to a checkpoint, or to an adapter trained on it."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from quailora.errors import CheckpointError
from quailora.modeling.checkpoint import Checkpoint

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_tokenizer(source: Checkpoint, adapter: Path | None = None) -> PreTrainedTokenizerBase | None:
    """The tokenizer in the folder `adapter`, if training has saved one there, else the checkpoint's; None if neither.

    Raises CheckpointError, with the reason, if it cannot be read: it is damaged, or needs a package that is not
    installed or code of its own.
    """
    saved = adapter is not None and any((adapter / name).is_file() for name in _TOKENIZER_FILES)
    name, revision = (str(adapter), None) if saved else (source.name, source.revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=source.trust_remote_code)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError) as error:
        if not saved and not any(source.has(each) for each in _TOKENIZER_FILES):
            return None
        raise CheckpointError(
            f"the tokenizer of {name} cannot be read: {type(error).__name__}: {' '.join(str(error).split())[:600]}"
        ) from error
    return tokenizer if len(tokenizer) else None  # transformers makes an empty one if there are no files
