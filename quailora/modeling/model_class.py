"""The auto class of transformers that loads a checkpoint: as a language model, or as one that takes images too.

The two name their modules differently (`model.layers.0` and `model.language_model.layers.0`), so an adapter made for
one is inactive on the other.
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
    """The name, if it is supported. Raises CheckpointError otherwise."""
    if name not in _CLASSES:
        raise CheckpointError(f"auto_class (--auto-class) {name!r} is not supported: give one of {', '.join(_CLASSES)}")
    return name


def default_auto_class(config: PretrainedConfig) -> str:
    """The auto class that gives the class in `config.architectures`, which trainers load. If both or neither do:
    AutoModelForCausalLM, unless only the other supports the model type."""
    classes = [auto_class for auto_class in _CLASSES if config.model_type in _CLASSES[auto_class]]
    declared = [name for name in classes if _CLASSES[name][config.model_type] in (config.architectures or [])]
    return next(iter(declared or classes), CAUSAL_LM)


def auto_class_of(model: nn.Module, default: str) -> str:
    """The auto class that a loaded model came from; `default` if its class belongs to several or, as with custom code,
    to none."""
    classes = [auto_class for auto_class in _CLASSES if type(model).__name__ in _CLASSES[auto_class].values()]
    return classes[0] if len(classes) == 1 else default


def auto_model(name: str) -> Any:
    """The auto class itself."""
    return getattr(transformers, name)
