"""All uses of private parts of transformers.

Tested with transformers 5.23. If another version changes these parts, tests/unit/modeling and
tests/integration/test_families.py fail, and the fix belongs here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.initialization import no_init_weights
from transformers.modeling_utils import LoadStateDictConfig
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import logging as transformers_logging


@contextmanager
def on_meta_device() -> Iterator[None]:
    """Within it models are created with their parameters on the meta device and their buffers on the CPU."""
    with no_init_weights(), init_empty_weights(include_buffers=False):
        yield


def quantize_skeleton(model: PreTrainedModel, config: Any, dtype: torch.dtype) -> None:
    """Replace the linears of a model on the meta device as `from_pretrained(..., quantization_config=config)` does."""
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    quantizer.preprocess_model(model=model, dtype=dtype, device_map=None, checkpoint_files=None, use_kernels=False)
    quantizer.postprocess_model(model)


def check_libraries(config: Any, device: torch.device) -> None:
    """Raises ImportError or RuntimeError, as `from_pretrained` does, where it takes a library that is missing to load a
    base that is quantized so."""
    AutoHfQuantizer.from_config(config, pre_quantized=True).validate_environment(device_map={"": device})


class NameMap(NamedTuple):
    """Which tensors of a checkpoint the state of a model is made from.

    sources: parameter or buffer of the model -> the checkpoint's tensors that it is made from.
    converted: parameters that are not stored as they are, but made from several tensors or from parts of one.
    landings: tensor of the checkpoint -> the (first) name in the model where it ends up.
    """

    sources: dict[str, list[str]]
    converted: set[str]
    landings: dict[str, str]


class Loader:
    """Loads tensors of a checkpoint into parts of a model as `from_pretrained` does for the whole model: with the same
    renaming, merging, tying and casts.

    Args:
        model: the model, on the meta device.
        dtype: as for `from_pretrained`.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self._model, self._dtype = model, dtype
        self._transforms = get_model_conversion_mapping(model)

    def map_names(self, keys: Iterable[str]) -> NameMap:
        """Where the tensors of a checkpoint end up."""
        renamings = [t for t in self._transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in self._transforms if isinstance(t, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        known, prefix = self._model.state_dict(), self._model.base_model_prefix
        found = NameMap({}, set(), {})
        for key in keys:
            name, pattern = rename_source_key(key, renamings, converters, prefix, known)
            if name not in known and key in known:
                name, pattern = rename_source_key(key, [], [], prefix, known)
            names = [name]
            if pattern is not None:
                targets = by_pattern[pattern].target_patterns
                names = [name.replace(targets[0], target) for target in targets]
                found.converted.update(names)
            found.landings[key] = names[0]
            for name in names:
                found.sources.setdefault(name, []).append(key)
        for target, source in tied_weights(self._model).items():
            present = found.sources.get(source) or found.sources.get(target)
            if present:
                found.sources[source] = found.sources[target] = present
        return found

    def plan_dtypes(self, landings: Mapping[str, str]) -> dict[str, torch.dtype]:
        """Tensor of the checkpoint -> the dtype that the loader casts it to: fp32 if the model's class asks for it,
        else the dtype of the parameter where the tensor ends up."""
        plan, state = self._model._get_dtype_plan(self._dtype), self._model.state_dict(keep_vars=True)
        pattern, globs, _ = build_glob_alternation(list(plan))
        dtypes = {}
        for key, landing in landings.items():
            planned = pattern.search(landing) if plan else None
            if planned:
                dtypes[key] = plan[globs[planned.lastgroup or ""]]
            else:
                dtypes[key] = state[landing].dtype if landing in state else self._dtype
        return dtypes

    def load(self, tensors: Mapping[str, Any], device: torch.device) -> list[str]:
        """Load these tensors, by their names in the checkpoint. Returns the names that transformers could not load."""
        config = LoadStateDictConfig(
            device_map={"": device},
            dtype=self._dtype,
            dtype_plan=self._model._get_dtype_plan(self._dtype),
            weight_mapping=self._transforms,  # type: ignore[arg-type]
        )
        with no_progress_bar():
            info, _ = convert_and_load_state_dict_in_model(self._model, dict(tensors), config)
        return sorted(map(str, info.mismatched_keys)) or sorted(info.conversion_errors)


def tied_weights(model: PreTrainedModel) -> dict[str, str]:
    """Parameter -> the parameter that it shares memory with once the model is loaded."""
    return dict(model.all_tied_weights_keys)


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Within it transformers shows no progress bar. It would otherwise draw one for every call of its loader."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
