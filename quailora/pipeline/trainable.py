"""Whether the quantized model can be refined as a whole on a device: told before anything is computed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel

from quailora.adapters.targets import find_targets
from quailora.calibration.distributed import launched_by_torchrun
from quailora.errors import AdapterError, BudgetError, QuailoraError
from quailora.memory.allocator import overhead
from quailora.memory.budget import describe_bytes
from quailora.memory.sizes import block_sizes
from quailora.memory.training import Training, training_memory
from quailora.modeling.streamed_model import StreamedModel
from quailora.modeling.transformers_internals import check_libraries
from quailora.quantization.protocol import QuantizedBase
from quailora.quantization.registry import is_quantized
from quailora.refinement.config import BLOCKS_INSTEAD, RefinementConfig
from quailora.refinement.student import gradient_errors


def check_trainable(skeleton: PeftModel, form: QuantizedBase, device: torch.device, dtype: torch.dtype) -> None:
    """Whether a base like `skeleton`, with weights loaded in `dtype`, can be loaded and trained here.

    Raises:
        QuailoraError: a library is missing, or a Trainer would train elsewhere or on several devices.
        AdapterError: the head is quantized, or no gradient passes through a quantized linear on `device`.
    """
    if launched_by_torchrun():
        raise QuailoraError("the whole model is refined on one device: run it in one process, without torchrun")
    if device.index:  # neither None nor 0
        raise QuailoraError(
            f"the whole model is refined on the first GPU, and device (--device) is {device}: choose the GPU with "
            f"CUDA_VISIBLE_DEVICES={device.index}"
        )
    base: Any = skeleton.get_base_model()
    if is_quantized(base.get_output_embeddings()):
        raise AdapterError(
            "refining the whole model takes the base's head, to turn hidden states of the full-precision model into "
            f"logits, and this one is quantized: leave lm_head in full precision, or {BLOCKS_INSTEAD}"
        )
    try:
        check_libraries(form.to_config(), device)
    except (ImportError, RuntimeError) as error:
        raise QuailoraError(
            f"a base in {form.describe()} cannot be loaded here: {' '.join(str(error).split())}. Or "
            f"{BLOCKS_INSTEAD}, which does not load it"
        ) from error
    with torch.random.fork_rng(devices=[]):
        linear = form.linear(device)
    if linear is not None:
        name = find_targets(skeleton)[0][0].name
        with torch.enable_grad(), gradient_errors(name, linear, device):
            inputs = torch.ones(1, linear.in_features, dtype=dtype, device=device, requires_grad=True)
            linear(inputs).sum().backward()


def check_fits(
    stream: StreamedModel,
    form: QuantizedBase,
    quantized: Collection[str],
    ranks: Mapping[str, int],
    longest: int,
    config: RefinementConfig,
    device: torch.device,
    budget: int,
    batch_size: int | None,
) -> tuple[int, Training]:
    """The largest micro-batch, of a step at most, with which training the quantized model fits the budget; and what it
    takes.

    quantized: the names of all quantized linears. ranks: those that are adapted, with their ranks.
    Raises BudgetError where none does.
    """
    sizes = block_sizes(stream, {})
    size = batch_size or max(1, config.tokens // longest)
    while True:
        memory = training_memory(
            stream, sizes, form, quantized, ranks, batch_size=size, sequence_length=longest, device=device.type
        )
        memory = replace(memory, overhead=overhead(memory.total, device))
        if memory.total <= budget:
            return size, memory
        if batch_size is not None or size == 1:
            break
        size //= 2
    smaller = "" if size == 1 else " or batch_size (--batch-size 1)"
    raise BudgetError(
        f"refining the whole model takes {describe_bytes(memory.total)} ({memory.parts()}), and a memory_budget "
        f"(--memory-budget) of {describe_bytes(budget)} is too small: lower sequence_length (--sequence-length)"
        f"{smaller}, or {BLOCKS_INSTEAD}, which has one block in memory at a time"
    )
