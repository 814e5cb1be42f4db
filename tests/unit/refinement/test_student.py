"""The loss of model-level refinement, and the data that it takes."""

import pytest
import torch
from torch import Tensor

from quailora.calibration.data import Calibration
from quailora.errors import CalibrationError
from quailora.refinement.config import MODEL, RefinementConfig
from quailora.refinement.student import _KL, Sequences

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


@pytest.mark.parametrize(
    "lengths, advice",
    [
        ((8,), r"give more data, raise samples \(--samples\), or lower sequence_length"),
        ((8, 1), "give more data"),
        ((1, 1, 1), r"raise sequence_length \(--sequence-length\), or give longer texts"),
    ],
)
def test_too_little_to_hold_some_out(lengths: tuple[int, ...], advice: str) -> None:
    little = Calibration(tuple(torch.zeros(length, dtype=torch.int64) for length in lengths), "little")
    found = sum(length > 1 for length in lengths)
    with pytest.raises(CalibrationError, match=rf"at least 2 sequences of 2 tokens .* little has {found}; {advice}"):
        Sequences.of(little, RefinementConfig(MODEL), 1, 0)
