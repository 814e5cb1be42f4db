"""Model-level refinement: A and B of all linears, trained together for what the model predicts.

The whole quantized model with its factors is trained, by transformers' Trainer, for the full-precision model's
distribution of the next token:

    mean over tokens of KL(full precision || quantized + factors),     temperature 1

(RILQ, arXiv 2412.01129, and QAD, arXiv 2601.20088, train for it too.) The full-precision model is not in memory: what
comes out of its last block is kept from a pass made before, and the final norm and the head, which the two models
share, turn it into logits a few tokens at a time.
"""

from __future__ import annotations

import math
import os
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from peft import PeftModel
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from quailora import ops
from quailora.adapters.targets import Target
from quailora.calibration.calls import replaced_forward
from quailora.calibration.data import Batch, Calibration
from quailora.calibration.hidden_states import HiddenStates
from quailora.errors import AdapterError, CalibrationError, NotFiniteError
from quailora.modeling.blocks import find_blocks
from quailora.quantization.registry import evaluating, is_quantized
from quailora.refinement.config import RefinementConfig
from quailora.reporting.report import ModelReport

# Logits of a chunk of tokens that are in fp32 at a time: 128 MiB for each of the few tensors that the loss takes.
_LOGITS_AT_ONCE = 1 << 25
_SCALE = 1024.0  # of the loss: gradients of hidden states are too small for float16
_BETAS = (0.9, 0.95)  # of Adam, as for blocks
_CLIPPED = 1.0  # norm of the gradient
_ACCELERATE: tuple[Any, ...] = (PartialState, AcceleratorState, GradientState)
_MIXED_PRECISION = "ACCELERATE_MIXED_PRECISION"  # the variable that accelerate reads


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
            raise CalibrationError(
                f"refine (--refine) holds some of the data out, so it takes at least 2 sequences of 2 tokens or more: "
                f"{data.source} has {len(usable)}; give more, or lower sequence_length (--sequence-length)"
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


@dataclass(frozen=True, eq=False)
class Teacher:
    """The full-precision model.

    hidden: by batch, what comes out of its last block, (b, t, d).
    tuples: by class of block, whether it returns a tuple.
    """

    hidden: HiddenStates
    tuples: Mapping[type[nn.Module], bool]


def refine_model(
    model: PeftModel,
    targets: Sequence[Target],
    teacher: Teacher,
    data: Sequences,
    config: RefinementConfig,
    *,
    seed: int = 0,
    progress: Callable[[str], None] = lambda line: None,
) -> ModelReport:
    """Give the targets the A and B that did best on held-out tokens, which may be those that they have; says what was
    done. The model is on one device, and is otherwise left as it was.

    teacher: of the batches of `data`.
    seed: of the order of the data.

    Where the loss is no longer finite, `ModelReport.stopped` says so.

    Raises:
        NotFiniteError: the loss is not finite to begin with.
        AdapterError: the head is quantized, or no gradient reaches the factors.
    """
    start = perf_counter()
    student = _Student(model, teacher, data)
    groups = [target.parameters() for target in targets]
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # Older versions have only the names that are deprecated now.
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        stack.enter_context(_trainable(model, groups))
        stack.enter_context(evaluating(list(model.modules())))
        stack.enter_context(ops.half_products(student.device, [student.dtype]))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="quailora-")))
        student.check_gradients(targets[0], groups[0])
        first = student.held_out()
        if not math.isfinite(first):
            raise NotFiniteError("the KL divergence of the quantized model from the full-precision one is not finite")
        best = _Best(student, groups, config, first, progress)
        # A step moves A Bᵀ as far whatever the scaling is.
        rates = [config.rate / target.scaling**0.5 for target in targets]
        adam = torch.optim.Adam(
            [{"params": sides, "lr": rate} for sides, rate in zip(groups, rates, strict=True)], betas=_BETAS
        )
        trainer = _Trainer(
            student,
            args=_arguments(folder, config, data.accumulated, student.device, seed),
            callbacks=[best],
            optimizers=(adam, None),
        )
        stopped = ""
        try:
            trainer.train()
        except NotFiniteError:
            stopped = f"the loss was not finite in step {trainer.state.global_step + 1}"
        best.restore()
    tokens = sum(len(_predicted(batch)[0]) for batch in data.batches[: data.held_out])
    return ModelReport(tokens, first, best.kl, best.step, stopped, perf_counter() - start)


class _Student:
    """The quantized model with its factors, beside what the full-precision model gives."""

    def __init__(self, model: PeftModel, teacher: Teacher, data: Sequences) -> None:
        self.model, self.data, self._teacher = model, data, teacher
        base: Any = model.get_base_model()
        if is_quantized(base.get_output_embeddings()):
            raise AdapterError(
                "refine='model' (--refine model) turns hidden states of the full-precision model into logits with the "
                "base's head, and this one is quantized: leave lm_head in full precision, or take refine='blocks' "
                "(--refine blocks)"
            )
        self.device, self.dtype = base.get_input_embeddings().weight.device, base.dtype
        self._blocks = find_blocks(base, base.get_decoder())
        self._longest = max(batch.input_ids.shape[1] for batch in data.batches)

    def kl(self, number: int) -> Tensor:
        """The sum over the predicted tokens of a batch."""
        batch = self.data.batches[number]
        row, position = (index.to(self.device) for index in _predicted(batch))
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
        total, tokens = 0.0, 0
        with torch.no_grad():
            for number in range(self.data.held_out):
                total += self.kl(number).item()
                tokens += len(_predicted(self.data.batches[number])[0])
        return total / tokens

    def check_gradients(self, target: Target, sides: Sequence[Tensor]) -> None:
        """Raises AdapterError where a base passes no gradient on, on this device."""
        try:
            with torch.enable_grad(), self._autocast():
                ids = self.data.batches[0].input_ids[:1, :2].to(self.device)
                self.model(input_ids=ids, use_cache=False).logits.float().square().mean().backward()
        except (RuntimeError, NotImplementedError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise AdapterError(f"{_no_gradient(target, self.device)}: {' '.join(str(error).split())[:200]}") from error
        if any(side.grad is None for side in sides):
            raise AdapterError(_no_gradient(target, self.device))
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


def _no_gradient(target: Target, device: torch.device) -> str:
    return (
        f"no gradient reaches {target.name} through this base ({type(target.base).__name__}) on {device}, so its "
        "factors cannot be trained there: use another device (--device), or refine='blocks' (--refine blocks), which "
        "needs none of the base"
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


class _Trainer(Trainer):
    """transformers' Trainer with our loss. Its items are numbers of micro-batches."""

    def __init__(self, student: _Student, **options: Any) -> None:
        data = student.data
        numbers = range(data.held_out, len(data.batches))
        rows = [{"number": number, "input_ids": data.batches[number].input_ids} for number in numbers]
        super().__init__(student.model, train_dataset=rows, data_collator=lambda batch: batch[0], **options)
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False  # so that it divides by the micro-batches of a step
        self._student = student
        tokens = sum(len(_predicted(data.batches[number])[0]) for number in numbers)
        self._tokens = tokens / len(rows)  # of a micro-batch, so that every token counts the same

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = self._student.kl(inputs["number"])
        if not loss.isfinite():
            raise NotFiniteError("the loss is not finite")
        return loss * (_SCALE / self._tokens)


class _Best(TrainerCallback):
    """Measures every so many steps, keeps the factors that did best, and ends training once nothing gets better."""

    def __init__(
        self,
        student: _Student,
        groups: Sequence[Sequence[Tensor]],
        config: RefinementConfig,
        first: float,
        progress: Callable[[str], None],
    ) -> None:
        self._student, self._config, self._progress = student, config, progress
        self._sides = [side for sides in groups for side in sides]
        self.kl, self.step, self._since = first, 0, 0
        self._keep()
        progress(f"KL divergence on held-out tokens {first:.4f} before refinement, {config.steps} steps")

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        step = state.global_step
        if step % self._config.every and step != self._config.steps:
            return
        found = self._student.held_out()
        self._progress(f"{found:.4f} after step {step}")
        self._since += 1
        if found < self.kl:
            self.kl, self.step, self._since = found, step, 0
            self._keep()
        control.should_training_stop |= self._since == self._config.patience

    def restore(self) -> None:
        with torch.no_grad():
            for side, kept in zip(self._sides, self._kept, strict=True):
                side.copy_(kept)

    def _keep(self) -> None:
        self._kept = [side.detach().cpu().clone() for side in self._sides]


def _arguments(
    folder: Path, config: RefinementConfig, accumulated: int, device: torch.device, seed: int
) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=1,  # micro-batch
        gradient_accumulation_steps=accumulated,
        lr_scheduler_type="linear",
        warmup_steps=config.warmup,
        max_grad_norm=_CLIPPED * _SCALE,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        use_cpu=device.type == "cpu",
        seed=seed % 2**32,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # or the Trainer would copy the model to all of them
    return arguments


def _predicted(batch: Batch) -> tuple[Tensor, Tensor]:
    """The row and the position of each token that predicts a real one."""
    keep = torch.ones_like(batch.input_ids, dtype=torch.bool) if batch.keep is None else batch.keep
    row, position = (keep[:, 1:] & keep[:, :-1]).nonzero(as_tuple=True)
    return row, position


@contextmanager
def _trainable(model: PeftModel, groups: Sequence[Sequence[Tensor]]) -> Iterator[None]:
    """Within it the model is in training mode without dropout, with gradients of these parameters alone, and
    afterwards as it was."""
    base: Any = model.get_base_model()
    checkpointing = base.is_gradient_checkpointing
    with ExitStack() as undo:
        undo.callback(model.zero_grad, set_to_none=True)
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
            for name, value in list(vars(module).items()):
                if isinstance(value, float) and ("drop" in name or (name == "p" and isinstance(module, nn.Dropout))):
                    undo.callback(setattr, module, name, value)
                    setattr(module, name, 0.0)
        for parameter in model.parameters():
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        for sides in groups:
            for side in sides:
                side.requires_grad_(True)
        if not checkpointing:
            undo.callback(base.gradient_checkpointing_disable)
        model.train()
        yield


@contextmanager
def global_states_kept() -> Iterator[None]:
    """Within it a Trainer may seed all generators, and has accelerate to itself, whose state is one for all: that of a
    caller's Accelerator is there again afterwards."""
    python, of_numpy = random.getstate(), np.random.get_state()
    kept = [(shared, dict(shared)) for shared in (each._shared_state for each in _ACCELERATE)]
    precision = os.environ.pop(_MIXED_PRECISION, None)
    try:
        for shared, _ in kept:
            shared.clear()
        with torch.random.fork_rng():
            yield
    finally:
        for shared, before in kept:
            shared.clear()
            shared.update(before)
        os.environ.pop(_MIXED_PRECISION, None)
        if precision is not None:
            os.environ[_MIXED_PRECISION] = precision
        random.setstate(python)
        np.random.set_state(of_numpy)
