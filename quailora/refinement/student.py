"""The loss of model-level refinement: how far the quantized model's predictions are from the full-precision model's.

The full-precision model, the teacher, is not in memory. What comes out of its last block is kept from a pass made
before, and the final norm and the head, which the two models share, turn it into logits a few tokens at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from quailora.adapters.targets import Target
from quailora.calibration.calls import replaced_forward
from quailora.calibration.data import Batch, Calibration
from quailora.calibration.hidden_states import HiddenStates
from quailora.errors import AdapterError, CalibrationError
from quailora.modeling.blocks import find_blocks
from quailora.refinement.config import BLOCKS_INSTEAD, RefinementConfig

# Logits of a chunk of tokens that are in fp32 at a time: 128 MiB for each of the few tensors that the loss takes.
_LOGITS_AT_ONCE = 1 << 25


@dataclass(frozen=True)
class Sequences:
    """What of the data is trained on and what measures, in micro-batches.

    batches: those that measure first.
    held_out: how many measure.
    accumulated: micro-batches in a step.
    """

    batches: tuple[Batch, ...]
    held_out: int
    accumulated: int

    @classmethod
    def of(cls, data: Calibration, config: RefinementConfig, batch_size: int, seed: int) -> Sequences:
        """Drawn at random: no more than the steps take, and one in `config.held_out` of it besides.

        Raises CalibrationError where there are fewer than two sequences of two tokens or more.
        """
        usable = [sequence for sequence in data.sequences if len(sequence) > 1]
        if len(usable) < 2:
            advice = "give more data, raise samples (--samples), or lower sequence_length (--sequence-length)"
            if data.longest == 1:
                advice = "raise sequence_length (--sequence-length), or give longer texts"
            raise CalibrationError(
                "refinement holds some of the data out, so it takes at least 2 sequences of 2 tokens or more: "
                f"{data.source} has {len(usable)}; {advice}"
            )
        order = torch.randperm(len(usable), generator=torch.Generator().manual_seed(seed)).tolist()
        in_step = max(1, config.tokens // data.longest)
        most = config.steps * in_step
        held = max(1, min(len(usable), most + most // config.held_out) // (config.held_out + 1))
        drawn = [usable[i] for i in order[: held + most]]

        def batches(sequences: Sequence[Tensor]) -> list[Batch]:
            return list(Calibration(tuple(sequences), data.source).batches(batch_size))

        measuring = batches(drawn[:held])
        return cls((*measuring, *batches(drawn[held:])), len(measuring), -(-in_step // batch_size))

    @property
    def tokens(self) -> int:
        """Of all batches."""
        return sum(batch.input_ids.numel() if batch.keep is None else int(batch.keep.sum()) for batch in self.batches)

    @property
    def tokens_held_out(self) -> int:
        """Those that are predicted while it is measured."""
        return sum(len(predicted(batch)[0]) for batch in self.batches[: self.held_out])


def predicted(batch: Batch) -> tuple[Tensor, Tensor]:
    """The row and the position of each token that predicts a real one."""
    keep = torch.ones_like(batch.input_ids, dtype=torch.bool) if batch.keep is None else batch.keep
    row, position = (keep[:, 1:] & keep[:, :-1]).nonzero(as_tuple=True)
    return row, position


@dataclass(frozen=True, eq=False)
class Teacher:
    """The full-precision model.

    hidden: by batch, what comes out of its last block, (b, t, d).
    tuples: by class of block, whether it returns a tuple.
    """

    hidden: HiddenStates
    tuples: Mapping[type[nn.Module], bool]


class Student:
    """The quantized model with its factors, beside what the full-precision model gives."""

    def __init__(self, model: PeftModel, teacher: Teacher, data: Sequences) -> None:
        self.model, self.data, self._teacher = model, data, teacher
        base: Any = model.get_base_model()
        self.device, self.dtype = base.get_input_embeddings().weight.device, base.dtype
        self._blocks = find_blocks(base, base.get_decoder())
        self._longest = max(batch.input_ids.shape[1] for batch in data.batches)

    def kl(self, number: int) -> Tensor:
        """The sum over the predicted tokens of a batch."""
        batch = self.data.batches[number]
        row, position = (index.to(self.device) for index in predicted(batch))
        ids = batch.input_ids.to(self.device)
        mask = None if batch.keep is None else batch.keep.to(self.device, torch.int64)
        hidden = self._teacher.hidden[number][row, position]  # (p, d)
        with self._autocast():
            logits: Tensor = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            chosen = logits[row, position]  # (p, vocabulary)
            size = max(1, min(self._longest, _LOGITS_AT_ONCE // chosen.shape[-1]))
            total: Tensor = _KL.apply(chosen, list(hidden.split(size)), self._logits)
        return total

    def held_out(self) -> float:
        """The mean over all predicted tokens that are held out."""
        with torch.no_grad():
            total = sum(self.kl(number).item() for number in range(self.data.held_out))
        return total / self.data.tokens_held_out

    def check_gradients(self, target: Target, sides: Sequence[Tensor]) -> None:
        """Raises AdapterError where a base passes no gradient on, on this device."""
        with torch.enable_grad(), gradient_errors(target.name, target.base, self.device), self._autocast():
            ids = self.data.batches[0].input_ids[:1, :2].to(self.device)
            self.model(input_ids=ids, use_cache=False).logits.float().square().mean().backward()
        if any(side.grad is None for side in sides):
            raise AdapterError(_no_gradient(target.name, target.base, self.device))
        self.model.zero_grad(set_to_none=True)

    def _autocast(self) -> torch.autocast:
        """Products of the factors, which are in fp32, in the model's dtype, as trainers have it."""
        half = self.dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(self.device.type, self.dtype if half else torch.bfloat16, enabled=half)

    def _logits(self, hidden: Tensor) -> Tensor:
        """(c, vocabulary), of tokens whose hidden states come out of the last block as (c, d)."""

        def give(block: Any, *args: Any, **kwargs: Any) -> Any:
            return (hidden[None], None) if self._teacher.tuples[type(block.module)] else hidden[None]

        ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=self.device)
        with replaced_forward(self._blocks, give):
            found: Tensor = self.model(input_ids=ids, use_cache=False).logits[0]
        return found


@contextmanager
def gradient_errors(name: str, linear: nn.Module, device: torch.device) -> Iterator[None]:
    """Within it, what a base raises where it passes no gradient on is an AdapterError that names the linear."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise AdapterError(f"{_no_gradient(name, linear, device)}: {' '.join(str(error).split())[:200]}") from error


def _no_gradient(name: str, linear: nn.Module, device: torch.device) -> str:
    return (
        f"no gradient reaches {name} through this base ({type(linear).__name__}) on {device}, so its factors cannot be "
        f"trained there: use another device (--device), or {BLOCKS_INSTEAD}, which needs none of the base"
    )


class _KL(torch.autograd.Function):
    """The sum over tokens of KL(teacher || student), from the student's logits (p, vocabulary), and from the teacher's
    hidden states in chunks, each (c, d), of which `logits` makes (c, vocabulary).

    Its gradient is softmax(student) - softmax(teacher), so nothing in fp32 is kept from one chunk to the next.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, hidden: Sequence[Tensor], logits: Callable[[Tensor], Tensor]) -> Tensor:
        total = torch.zeros((), device=student.device)
        grad = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        start = 0
        for part in hidden:
            chunk = slice(start, start := start + len(part))
            log_q = student[chunk].float().log_softmax(-1)
            log_p = logits(part).float().log_softmax(-1)
            total += nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
            if grad is not None:
                grad[chunk] = log_q.exp_() - log_p.exp_()
        ctx.save_for_backward(*([] if grad is None else [grad]))
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * outer[0], None, None
