"""The loss of model-level refinement, the data it takes, and the state that a model is trained in."""

import os
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from quailora.calibration.data import Calibration
from quailora.errors import CalibrationError
from quailora.refinement.config import MODEL, RefinementConfig, by_level, refinement_config
from quailora.refinement.model import _KL, Sequences, _trainable, global_states_kept

# ---- the loss


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """By definition."""
    p = teacher.float().softmax(-1)
    return (p * (p.log() - student.float().log_softmax(-1))).sum()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_the_loss_and_its_gradient_in_chunks(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student, head = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((7, 11), (11, 5)))
    hidden = torch.randn(7, 5, generator=generator).to(dtype)
    student.requires_grad_()
    expected = 3 * divergence(student, hidden @ head.T)
    (gradient,) = torch.autograd.grad(expected, student)
    loss = 3 * _KL.apply(student, list(hidden.split(3)), lambda part: part @ head.T)
    loss.backward()
    assert student.grad is not None and student.grad.dtype == dtype
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    assert (student.grad - gradient).norm() <= tolerance * gradient.norm()


def test_equal_models_have_no_loss() -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = _KL.apply(logits, [torch.arange(4)], lambda rows: logits[rows])
    loss.backward()
    assert loss.item() == 0 and logits.grad is not None and not logits.grad.any()


# ---- the data


def data(number: int, length: int = 8) -> Calibration:
    """Every sequence of a token of its own."""
    return Calibration(tuple(torch.full((length,), i) for i in range(number)), "tokens")


def found(sequences: Sequences) -> tuple[list[int], list[int]]:
    """Which are held out, and which are trained on."""
    firsts = [batch.input_ids[:, 0] for batch in sequences.batches]
    return torch.cat(firsts[: sequences.held_out]).tolist(), torch.cat(firsts[sequences.held_out :]).tolist()


@pytest.mark.parametrize(
    "number, batch_size, held_out, trained, accumulated",
    [
        (2, 1, 1, 1, 4),
        (33, 1, 1, 32, 4),
        (34, 2, 2, 32, 2),
        (34, 3, 2, 32, 2),
        (1000, 4, 11, 11 * 16 + 4, 1),  # 45 steps of 4, and one sixteenth of them
    ],
)
def test_no_more_sequences_than_the_steps_take(
    number: int, batch_size: int, held_out: int, trained: int, accumulated: int
) -> None:
    config = RefinementConfig(MODEL, steps=45, tokens=32)
    sequences = Sequences.of(data(number), config, batch_size, seed=0)
    held, train = found(sequences)
    assert (len(held), len(train), sequences.accumulated) == (held_out, trained, accumulated)
    assert len({*held, *train}) == len(held) + len(train)
    assert max(len(batch.input_ids) for batch in sequences.batches) <= batch_size


def test_the_draw_follows_from_the_seed() -> None:
    config = RefinementConfig(MODEL)
    one, again, other = (found(Sequences.of(data(40), config, 1, seed)) for seed in (0, 0, 1))
    assert one == again != other


@pytest.mark.parametrize("lengths", [(8,), (8, 1), (1, 1, 1)])
def test_too_little_to_hold_some_out(lengths: tuple[int, ...]) -> None:
    little = Calibration(tuple(torch.zeros(length, dtype=torch.int64) for length in lengths), "little")
    with pytest.raises(
        CalibrationError, match=r"refine \(--refine\) .* at least 2 sequences of 2 tokens .* little has"
    ):
        Sequences.of(little, RefinementConfig(MODEL), 1, 0)


def test_defaults_by_level() -> None:
    given = (("blocks", None, None), ("model", None, None), ("model", 7, 0.5))
    blocks, model, other = (refinement_config(*each) for each in given)
    assert blocks is not None and model is not None and other is not None
    assert (blocks.steps, blocks.rate, blocks.tokens) == (48, 1e-3, 2048)
    assert (model.steps, model.rate, model.tokens) == (48, 3e-5, 1024)
    assert (other.steps, other.rate, other.tokens) == (7, 0.5, 1024)
    assert by_level(None) == (None, None)
    assert by_level(blocks) == (blocks, None) and by_level(model) == (None, model)


# ---- the state of the model


class Base(nn.Module):
    """What a PeftModel gives, of a model with dropout in a module and in an attribute."""

    is_gradient_checkpointing = False

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(4, 4), nn.Dropout(0.5)
        self.attention_dropout = 0.5

    def get_base_model(self) -> Any:
        return self

    def gradient_checkpointing_disable(self) -> None:
        self.disabled = True


def test_a_model_is_trained_without_dropout_and_left_as_it_was() -> None:
    model: Any = Base().eval()
    model.linear.bias.requires_grad_(False)
    with _trainable(model, [[model.linear.bias]]):
        assert model.training and model.linear.bias.requires_grad and not model.linear.weight.requires_grad
        assert model.dropout.p == model.attention_dropout == 0
        model.linear.bias.grad = torch.ones(4)
    assert not model.training and model.linear.weight.requires_grad and not model.linear.bias.requires_grad
    assert model.dropout.p == model.attention_dropout == 0.5 and model.linear.bias.grad is None and model.disabled


def test_random_states_are_kept() -> None:
    draw = lambda: SimpleNamespace(a=random.random(), b=np.random.rand(), c=torch.rand(1).item())  # noqa: E731
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with global_states_kept():
        random.seed(2), np.random.seed(2), torch.manual_seed(2)
    assert draw() == expected


def test_the_accelerator_of_a_caller_is_kept() -> None:
    with global_states_kept():  # whatever other tests have left
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
        mine = Accelerator(cpu=True, gradient_accumulation_steps=3)
        with global_states_kept():
            its = Accelerator(cpu=True)
            assert (its.mixed_precision, its.gradient_accumulation_steps) == ("no", 1)
        assert (mine.mixed_precision, mine.gradient_accumulation_steps) == ("bf16", 3)
        assert os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"
