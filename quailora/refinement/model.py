"""Model-level refinement: A and B of all linears, trained together for what the model predicts.

The whole quantized model with its factors is trained, by transformers' Trainer, for the full-precision model's
distribution of the next token:

    mean over tokens of KL(full precision || quantized + factors),     temperature 1

(RILQ, arXiv 2412.01129, and QAD, arXiv 2601.20088, train for it too.) The loss itself is in `student.py`.
"""

from __future__ import annotations

import math
import os
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
from quailora.errors import NotFiniteError
from quailora.quantization.registry import evaluating
from quailora.refinement.config import RefinementConfig
from quailora.refinement.student import Sequences, Student, Teacher, predicted
from quailora.reporting.markdown import count
from quailora.reporting.report import ModelReport

_SCALE = 1024.0  # of the loss: gradients of hidden states are too small for float16
_BETAS = (0.9, 0.95)  # of Adam, as for blocks
_CLIPPED = 1.0  # norm of the gradient
_ACCELERATE: tuple[Any, ...] = (PartialState, AcceleratorState, GradientState)
_MIXED_PRECISION = "ACCELERATE_MIXED_PRECISION"  # the variable that accelerate reads


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
        AdapterError: no gradient reaches the factors.
    """
    start = perf_counter()
    student = Student(model, teacher, data)
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
        # A step changes factors by the same share of their size, whatever the error and the scaling are.
        rates = [config.rate * _root_mean_square(sides) for sides in groups]
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
    return ModelReport(data.tokens_held_out, first, best.kl, best.step, stopped, perf_counter() - start)


def _root_mean_square(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(torch.cat([each.detach().flatten() for each in tensors]).square().mean().item())


class _Trainer(Trainer):
    """transformers' Trainer with our loss. Its items are numbers of micro-batches."""

    def __init__(self, student: Student, **options: Any) -> None:
        data = student.data
        numbers = range(data.held_out, len(data.batches))
        rows = [{"number": number, "input_ids": data.batches[number].input_ids} for number in numbers]
        super().__init__(student.model, train_dataset=rows, data_collator=lambda batch: batch[0], **options)
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False  # so that it divides by the micro-batches of a step
        self._student = student
        tokens = sum(len(predicted(data.batches[number])[0]) for number in numbers)
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
        student: Student,
        groups: Sequence[Sequence[Tensor]],
        config: RefinementConfig,
        first: float,
        progress: Callable[[str], None],
    ) -> None:
        self._student, self._config, self._progress = student, config, progress
        self._sides = [side for sides in groups for side in sides]
        self.kl, self.step, self._since = first, 0, 0
        self._keep()
        progress(f"KL divergence on held-out tokens {first:.4f} before refinement, {count(config.steps, 'step')}")

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
