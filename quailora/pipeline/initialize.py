"""`initialize`: the factors of a PEFT model that is already loaded, in place."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quailora.adapters.alpha import check_alpha, match_alpha
from quailora.adapters.base_record import device_of, recorded_base
from quailora.adapters.new_tokens import add_rows
from quailora.adapters.targets import Target, check_config, find_targets
from quailora.calibration.data import SAMPLES, CalibrationConfig, read_calibration
from quailora.calibration.distributed import Processes
from quailora.errors import AdapterError, MismatchError, QuailoraError
from quailora.memory.budget import MemoryConfig, Meter
from quailora.modeling.blocks import linear_shape
from quailora.modeling.checkpoint import Checkpoint
from quailora.modeling.devices import default_device, without_torch_modes
from quailora.modeling.model_class import auto_class_of
from quailora.modeling.streamed_model import StreamedModel
from quailora.pipeline.base_output import base_layer, quantized_linears, unadapted_linears
from quailora.pipeline.quantize import GivenQ
from quailora.pipeline.setup import Run, enumerate_reasons
from quailora.pipeline.solved import Solved
from quailora.quantization.protocol import QuantizedWeight
from quailora.quantization.registry import from_module, read
from quailora.quantization.verify import NEAREST, RELATED, verify
from quailora.refinement.config import by_level, refinement_config
from quailora.reporting.markdown import count
from quailora.reporting.record import make_record
from quailora.reporting.report import BlockReport, Report
from quailora.solvers.config import DEFAULT_DAMPING, SolverConfig


@without_torch_modes()
def initialize(
    peft_model: PeftModel,
    calibration: Any,
    *,
    checkpoint: str | Path | Checkpoint,
    tokenizer: PreTrainedTokenizerBase | None = None,
    solver: str = "krylov",
    iterations: int | None = None,
    damping: float = DEFAULT_DAMPING,
    refine: str | None = None,
    refine_steps: int | None = None,
    refine_rate: float | None = None,
    samples: int = SAMPLES,
    sequence_length: int | None = None,
    split: str = "train",
    column: str | None = None,
    batch_size: int | None = None,
    memory_budget: int | str | None = None,
    host_memory_budget: int | str | None = None,
    adapter: str = "default",
    alpha: str | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Report:
    """Give a PeftModel over a 4-bit or 8-bit base its starting A and B, in place.

    Q is read from the loaded model, so a base that came from an already quantized checkpoint will do; W comes from
    `checkpoint`, block by block. Modules that cannot be initialized keep the LoRA default and are named in the report.
    The model is changed only once all factors are found: an error leaves it as it was. `Report.save(folder)` puts the
    record of the base beside an adapter you save.

    Args:
        peft_model: `get_peft_model(base, LoraConfig(...))`.
        checkpoint: the full-precision checkpoint that the base was quantized from; its `auto_class` is that of the
            loaded model.
        adapter: the name of the adapter within `peft_model`.
        refine: "blocks", as in `build_adapter`. For the whole model, save the adapter and call `quailora.refine`.
        alpha: "matched" changes the adapter's alpha; see `build_adapter`.
        device: where to compute; None is where the model is.
        memory_budget: besides the model that is loaded.
        host_memory_budget: on a GPU, what hidden states may take of the host's memory; what is more goes to a file in
            the system's temporary folder (TMPDIR). None is nine tenths of what is free.
        Others as in `build_adapter`.

    Raises:
        MismatchError: the base is not a quantization of `checkpoint`.
        QuailoraError: other bad input.
    """
    if not isinstance(peft_model, PeftModel):
        raise AdapterError(
            f"initialize takes a PeftModel, got {type(peft_model).__name__}: wrap the model with peft.get_peft_model"
        )
    if adapter not in peft_model.peft_config:
        raise AdapterError(f"the model has no adapter '{adapter}', only {', '.join(peft_model.peft_config)}")
    check_alpha(alpha)
    refinement, of_model = by_level(refinement_config(refine, refine_steps, refine_rate))
    if of_model is not None:
        raise QuailoraError(
            "refine='model' takes an adapter on disk: save the initialized one (save_pretrained, and Report.save into "
            "the same folder), and give its folder to quailora.refine"
        )
    solver_config = SolverConfig(solver, iterations, damping, seed)
    data_config = CalibrationConfig(samples, sequence_length, seed, split, column)
    config = check_config(peft_model.peft_config[adapter])
    targets, left = find_targets(peft_model, adapter)
    if not targets:
        raise AdapterError(
            f"no quantized linear is targeted: {enumerate_reasons(left)}; is the base loaded in 4 or 8 bits?"
        )
    source = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint)
    source = source.loaded_with(auto_class_of(peft_model.get_base_model(), source.auto_class))
    base_config: Any = peft_model.get_base_model().config
    dtype = base_config.dtype or source.dtype
    memory = MemoryConfig(memory_budget, host_memory_budget, batch_size)
    meter = Meter(default_device(device or device_of(targets[0].base)), memory)
    with meter.setting_up():
        stream = StreamedModel(source, meter.device, dtype)
    _check_shapes(peft_model, targets, stream)
    # Tokens that the checkpoint does not have are looked up in the loaded model.
    base_model: Any = peft_model.get_base_model()
    streamed: Any = stream.model.get_input_embeddings()
    rows = base_model.get_input_embeddings().weight
    if len(rows) > streamed.num_embeddings:
        add_rows(streamed, rows[streamed.num_embeddings :].detach())
    data = read_calibration(source, calibration, data_config, tokenizer=tokenizer, vocab_size=len(rows))
    form = from_module(targets[0].base, getattr(base_config, "quantization_config", None))
    known = recorded_base(peft_model.get_base_model()) or {}
    rounding = known.get("rounding", NEAREST)
    by_name = {target.name: target for target in targets}
    quantized = quantized_linears(peft_model, stream)
    unadapted = unadapted_linears(quantized, targets, written=False, refinement=refinement)
    run = Run(stream, targets, left, data, form, solver_config, meter, Processes(), unadapted, refinement)

    def quantized_weight(name: str, weight: Tensor) -> QuantizedWeight:
        module = by_name[name].base if name in by_name else base_layer(peft_model, name)
        quantized = read(module).to(weight.device)  # a base may be spread over several devices
        verify(
            name,
            quantized,
            from_module(module),
            lambda: weight,
            source.name,
            recorded=known.get("digests", {}).get(name),
            rounding=rounding,
            tolerance=RELATED,
            advice=f"; {_GIVE_THE_SAME}",
        )
        return quantized

    plan = run.plan(batch_size, timed=progress)
    found: list[Solved] = []
    blocks: list[BlockReport] = []

    def finish(index: int, solved: list[Solved], shrunk: Any, refined: BlockReport | None) -> None:
        found.extend(replace(each, quantized=None) for each in solved if each.factors is not None)
        blocks.extend([refined] if refined is not None else [])

    with tempfile.TemporaryDirectory(prefix="quailora-") as folder:
        run.solve(
            plan,
            GivenQ(quantized_weight, solver_config, run.stages),
            finish,
            folder=Path(folder),
            progress=progress,
        )
    rows = [each.row for each in found if each.row is not None]
    notes, factor, tuned = [], 1.0, {}
    if alpha is not None:
        tuned = {"alpha_tuned": config.lora_alpha}
        factor, note = match_alpha(peft_model, adapter, rows)
        notes.append(note)
    record = make_record(source, dtype, form, solver_config, data, config, rounding, refinement=refinement)
    record["lora"] |= tuned
    report = run.report(plan, rows, record, *notes, blocks=blocks)
    for each in found:
        assert each.factors is not None
        target = by_name[each.name]
        replace(target, scaling=target.scaling * factor).assign(each.factors, seed)
    return report


_GIVE_THE_SAME = "give the full-precision checkpoint that the base was made from"


def _check_shapes(model: PeftModel, targets: list[Target], stream: StreamedModel) -> None:
    """A base of another depth or width than the checkpoint's model was not made from it, which can be told at once."""
    config: Any = model.get_base_model().config
    depth = config.get_text_config(decoder=True).num_hidden_layers
    if depth != len(stream.blocks):
        raise MismatchError(
            f"the loaded base has {count(depth, 'block')}, and {stream.checkpoint.name} has {len(stream.blocks)}: "
            f"{_GIVE_THE_SAME}"
        )
    linears = {name: linear for block in stream.blocks for name, linear in block.linears().items()}
    for target in targets:
        held = (target.base.out_features, target.base.in_features)
        if target.name in linears and held != (shape := linear_shape(linears[target.name])):
            raise MismatchError(
                f"{target.name} is {held} in the loaded base and {shape} in {stream.checkpoint.name}: {_GIVE_THE_SAME}"
            )
