"""Loading a whole model, as a fine-tune does."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.utils.quantization_config import QuantizationConfigMixin

from quailora.modeling.checkpoint import Checkpoint
from quailora.modeling.model_class import auto_model
from quailora.modeling.transformers_internals import no_progress_bar


def load_model(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    quantization: QuantizationConfigMixin | None = None,
) -> PreTrainedModel:
    """The model of a checkpoint on one device, quantized while it is loaded where `quantization` says so; without that,
    as the checkpoint itself says."""
    options = {} if quantization is None else {"quantization_config": quantization}
    with no_progress_bar():
        model: PreTrainedModel = auto_model(checkpoint.auto_class).from_pretrained(
            checkpoint.name,
            revision=checkpoint.revision,
            trust_remote_code=checkpoint.trust_remote_code,
            dtype=dtype,
            device_map={"": device},
            **options,
        )
    return model
