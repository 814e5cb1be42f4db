"""A small text, and tokens of it."""

from transformers import PreTrainedTokenizerFast

from quailora.calibration.data import Calibration

LINES = [f"line {i} of the corpus says that {i * i} is the square of {i} .\n" for i in range(60)]
CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"


def ids(tokenizer: PreTrainedTokenizerFast, text: str, special: bool = False) -> list[int]:
    return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]


def lists(calibration: Calibration) -> list[list[int]]:
    return [sequence.tolist() for sequence in calibration.sequences]
