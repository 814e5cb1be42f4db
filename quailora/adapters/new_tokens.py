"""New tokens: models with resized embeddings, which have rows that the checkpoint lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel


def resize_to(model: PreTrainedModel, adapter: Path) -> int | None:
    """Resize the model's embeddings to those in an adapter folder, and return the number of rows; None if the folder
    has no embeddings, or of the same size. New rows have no meaningful values yet.

    PEFT saves embeddings under the same name, whether `modules_to_save` names them or the vocabulary was resized.

    model: the transformers model, before PEFT wraps it; it may be on the meta device.
    """
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    key = f"base_model.model.{name}.weight"
    with safe_open(adapter / SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
        if key not in file.keys():  # noqa: SIM118  (no dict)
            return None
        rows = int(file.get_slice(key).get_shape()[0])
    if rows == vocabulary(model):
        return None
    model.resize_token_embeddings(rows, mean_resizing=False)
    return rows


def vocabulary(model: PreTrainedModel) -> int:
    """The number of rows of the model's input embeddings. Token ids must be below it."""
    embedding: Any = model.get_input_embeddings()
    return int(embedding.weight.shape[0])


def add_rows(embedding: nn.Embedding, rows: Tensor) -> None:
    """Make an embedding of n tokens also look up tokens n, n + 1, ... in `rows` (k, h).

    Its own weight is not copied, so a `StreamedModel` can load and release it.
    """
    embedding.padding_idx = None  # only gradients use it, and torch would check it against the number of new rows
    look_up, known = embedding.forward, embedding.num_embeddings

    def forward(ids: Tensor) -> Tensor:
        found, new = look_up(ids.clamp(max=known - 1)), ids >= known
        if new.any():  # with the module, which may scale its output
            weight = rows.to(found.device, embedding.weight.dtype)
            found[new] = torch.func.functional_call(embedding, {"weight": weight}, ids[new] - known)
        return found

    embedding.forward = forward  # type: ignore[method-assign, assignment]
