"""Which refinement is meant, and the state that a model is trained in."""

import os
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from quailora.refinement.config import by_level, refinement_config
from quailora.refinement.model import _trainable, global_states_kept


def test_defaults_by_level() -> None:
    given = (("blocks", None, None), ("model", None, None), ("model", 7, 0.5))
    blocks, model, other = (refinement_config(*each) for each in given)
    assert blocks is not None and model is not None and other is not None
    assert (blocks.steps, blocks.rate, blocks.tokens) == (48, 1e-3, 2048)
    assert (model.steps, model.rate, model.tokens) == (48, 1e-3, 1024)
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
