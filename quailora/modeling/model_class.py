"""The auto class of transformers that a checkpoint is loaded with: a language model, or one that takes images too.

The two differ in the names of their modules (`model.layers.0` against `model.language_model.layers.0`), so an adapter
that was made for one is inactive on the other.
"""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from quailora.errors import CheckpointError

CAUSAL_LM, IMAGE_TEXT_TO_TEXT = "AutoModelForCausalLM", "AutoModelForImageTextToText"
_CLASSES = {
    CAUSAL_LM: MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    IMAGE_TEXT_TO_TEXT: MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}


def check_auto_class(name: str) -> str:
    """The name itself. Raises CheckpointError for one that is not supported."""
    if name not in _CLASSES:
        raise CheckpointError(f"auto_class (--auto-class) {name!r} is not supported: give one of {', '.join(_CLASSES)}")
    return name


def default_auto_class(config: PretrainedConfig) -> str:
    """The one that makes the class in `config.architectures`, which trainers load; AutoModelForCausalLM where both do,
    and where neither does but that one knows the model type."""
    classes = [auto_class for auto_class in _CLASSES if config.model_type in _CLASSES[auto_class]]
    declared = [name for name in classes if _CLASSES[name][config.model_type] in (config.architectures or [])]
    return next(iter(declared or classes), CAUSAL_LM)


def auto_class_of(model: nn.Module, default: str) -> str:
    """The auto class that a loaded model came from; `default` where its class belongs to none of them, as code of its
    own does, or to several."""
    classes = [auto_class for auto_class in _CLASSES if type(model).__name__ in _CLASSES[auto_class].values()]
    return classes[0] if len(classes) == 1 else default


def auto_model(name: str) -> Any:
    """The auto class itself."""
    return getattr(transformers, name)
