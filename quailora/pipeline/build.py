"""`build_adapter`: an initialized adapter from a checkpoint, without ever loading the model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from transformers import PreTrainedTokenizerBase
from transformers.utils.quantization_config import QuantizationConfigMixin

from quailora.adapters.alpha import check_alpha, match_alpha
from quailora.adapters.merge import obstacle, stored_alone
from quailora.adapters.save_and_load import check_can_be_saved
from quailora.adapters.skeleton import targeted_skeleton
from quailora.adapters.targets import check_config, find_targets
from quailora.calibration.data import SAMPLES, CalibrationConfig, read_calibration
from quailora.calibration.distributed import Processes
from quailora.errors import AdapterError, QuailoraError
from quailora.files import check_new_folder
from quailora.memory.budget import MemoryConfig, Meter
from quailora.memory.sizes import Calibrated
from quailora.modeling.checkpoint import Checkpoint
from quailora.modeling.devices import default_device, without_torch_modes
from quailora.modeling.streamed_model import StreamedModel
from quailora.pipeline.base_output import (
    check_apart,
    check_within_blocks,
    partly,
    quantized_linears,
    unadapted_linears,
)
from quailora.pipeline.outputs import Outputs, saying_what_is_kept
from quailora.pipeline.quantize import CalibratedQ, GivenQ, QuantizeAndSolve
from quailora.pipeline.refine import refine_in_place
from quailora.pipeline.setup import Run, enumerate_reasons
from quailora.pipeline.trainable import check_fits, check_trainable
from quailora.quantization.registry import Format, config_for, from_config
from quailora.quantization.rounding import QUANTIZED, RoundingConfig
from quailora.quantization.verify import CALIBRATED
from quailora.refinement.config import by_level, refinement_config
from quailora.refinement.student import Sequences
from quailora.reporting.markdown import count
from quailora.reporting.record import lora_record, make_record
from quailora.reporting.report import Report
from quailora.solvers.config import DEFAULT_DAMPING, SolverConfig

RANK, ALPHA = 64, 16


@without_torch_modes()
def build_adapter(
    checkpoint: str | Path | Checkpoint,
    lora_config: LoraConfig | None,
    calibration: Any,
    output_dir: str | Path,
    *,
    quantization: QuantizationConfigMixin | None = None,
    base_output: str | Path | None = None,
    rounding: str | None = None,
    rounding_damping: float | None = None,
    alternations: int | None = None,
    magr: float | None = None,
    inputs: str | None = None,
    refine: str | None = None,
    refine_steps: int | None = None,
    refine_rate: float | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    solver: str = "krylov",
    iterations: int | None = None,
    damping: float = DEFAULT_DAMPING,
    samples: int = SAMPLES,
    sequence_length: int | None = None,
    split: str = "train",
    column: str | None = None,
    batch_size: int | None = None,
    memory_budget: int | str | None = None,
    host_memory_budget: int | str | None = None,
    alpha: str | None = None,
    resume: bool = True,
    distributed: bool = False,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Report:
    """Make a PEFT adapter initialized to reduce the quantization error of `checkpoint`. The whole model is never in
    memory.

    Args:
        checkpoint: the full-precision model: a folder with safetensors, or an id on the Hugging Face hub.
        lora_config: any LoRA configuration PEFT takes; None is the paper's (r 64, alpha 16, all linear layers).
        calibration: file of text or records, data set name, strings, records, token tensors, DataLoader: see
            `quailora.calibration.data.load_calibration`.
        output_dir: the adapter's folder, new or empty: adapter, `report.json`, `report.md`, `quailora.json` and a model
            card.
        quantization: how the base will be loaded, a BitsAndBytesConfig, or how it is made, a GPTQConfig, which takes a
            `base_output` (its group_size is 128 by default, the command line's 64); None is NF4 with double
            quantization, computing in the checkpoint's dtype.
        base_output: where to write the quantized base, a new or empty folder: an ordinary checkpoint, which the adapter
            then names as its base. None: the base follows from the checkpoint and `quantization`, by nearest rounding.
        rounding: how the codes of a base that is written are chosen: "calibrated", for the layer's outputs, with the
            factors in turn, or "nearest". None is "calibrated" with a `base_output`.
        rounding_damping, alternations, magr: of calibrated rounding; see
            `quailora.quantization.rounding.RoundingConfig`. None takes its defaults.
        inputs: with calibrated rounding, what each linear is fitted on: "quantized" (None is that too), its inputs once
            earlier layers are quantized, with a target that corrects half of their error, which takes several times as
            long and a second set of hidden states; or "full", its inputs in the full-precision model.
        refine: "blocks" trains the factors of each block together, after they were found layer by layer, for the
            output of the block on what the quantized blocks before it give; some of the data is held out, and what does
            best on it is kept. It takes a second set of hidden states and a second forward pass, and a few dozen steps
            of training for each block. "model" calls `quailora.refine` with the finished adapter and the same data, and
            puts the result in its place: the quantized model is then on the device as a whole. None does neither.
        refine_steps, refine_rate: of Adam; see `quailora.refinement.config.RefinementConfig`.
        tokenizer: None takes the checkpoint's own.
        solver, iterations, damping: see `quailora.solve`; the default damping here is 1e-4.
        samples, sequence_length, seed: how much calibration data is taken, and the seed of the draw.
        split: of a data set.
        column: the field of a record to use, if it is not one of the usual ones.
        batch_size: sequences in one forward pass; None takes as many as make about 8192 tokens, or fewer where the
            memory is short.
        memory_budget: what may be allocated on the device, in bytes or as "12GiB"; on a CPU, by how much the resident
            memory may grow. None is nine tenths of what is free.
        host_memory_budget: on a GPU, what hidden states may take of the host's memory; what is more goes to a file
            beside `output_dir`. None is nine tenths of what is free.
        alpha: "matched" gives the adapter another alpha, with which a learning rate that was tuned for QLoRA at
            `lora_config.lora_alpha` is right for it (`quailora.adapters.alpha`); the initial A Bᵀ is the same. None
            keeps `lora_alpha`.
        resume: continue an unfinished run into `output_dir`. Its finished blocks are kept beside the folder. It is an
            error if its settings differ; False discards it.
        distributed: whether every process of the default group of torch.distributed calls this: samples and solves are
            shared, rank 0 writes, all return the report.
        dtype: what the base's weights are loaded as before they are quantized; None is what transformers takes by
            itself.
        device: where to compute; None is CUDA if there is one, else the CPU.
        progress: whether to show on standard error how far the run is: a bar, or lines where that is not a terminal.

    Returns:
        The report that is also in `output_dir`.

    Raises:
        BudgetError: no plan fits the budget; the least that would do is named.
        QuailoraError: bad input of any kind, before anything is computed where that can be known.
        KeyboardInterrupt: saying what is kept.
    """
    output = Path(output_dir)
    check_new_folder(output)
    check_alpha(alpha)
    if base_output is not None:
        check_apart(output, Path(base_output))
    rounds = RoundingConfig.given(
        rounding,
        written=base_output is not None,
        damping=rounding_damping,
        alternations=alternations,
        magr=magr,
        inputs=inputs,
    )
    refinement, of_model = by_level(refinement_config(refine, refine_steps, refine_rate))
    processes, solver_config = Processes(distributed), SolverConfig(solver, iterations, damping, seed)
    if of_model is not None and processes.distributed:
        raise QuailoraError(
            "refine='model' (--refine model) trains on one device: make the adapter without it, and give its folder to "
            "quailora.refine (quailora refine) in one process"
        )
    data_config = CalibrationConfig(samples, sequence_length, seed, split, column)
    meter = Meter(default_device(device), MemoryConfig(memory_budget, host_memory_budget, batch_size))
    source = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint)
    dtype = dtype or source.dtype
    config = copy.deepcopy(lora_config) or LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    check_config(config)
    quantization = quantization or config_for(Format.nf4, dtype)
    form = from_config(quantization).loaded_in(dtype)
    if form.planned is not None and base_output is None:
        raise AdapterError(f"a base in {form.describe()} has to be written: give base_output (--base-output)")
    if base_output is not None:
        form.checkpoint_config("")  # or an error, before anything is read

    with meter.setting_up():
        model, capped = targeted_skeleton(source, quantization, dtype, config)
        stream = StreamedModel(source, meter.device, dtype)
    targets, left = find_targets(model)
    if not targets:
        raise AdapterError(f"no quantized linear is targeted: {enumerate_reasons(left)}")
    check_can_be_saved(model, stream)
    data = read_calibration(source, calibration, data_config, tokenizer=tokenizer)
    quantized = quantized_linears(model, stream)
    unadapted = unadapted_linears(quantized, targets, written=base_output is not None, refinement=refinement)
    if base_output is not None:
        check_within_blocks(model, quantized)
        form = form.of_modules(partly(quantized, stream))
    calibrated = rounds.rounding == CALIBRATED
    counted = Calibrated(form, magr=rounds.magr > 0) if calibrated else form
    behind = rounds.inputs == QUANTIZED
    run = Run(
        stream, targets, left, data, form, solver_config, meter, processes, unadapted, refinement, counted, behind
    )
    if of_model is not None:  # or an error, before anything is computed
        check_trainable(model, form, meter.device, dtype)
        ranks = {target.name: target.rank for target in targets}
        size, _ = check_fits(
            stream, form, quantized, ranks, data.longest, of_model, meter.device, meter.budget, batch_size
        )
        Sequences.of(data, of_model, size, seed)
    record = make_record(source, dtype, form, solver_config, data, config, rounds, base_output, refinement)
    outputs = None
    if processes.is_main:
        outputs = Outputs(
            run,
            model,
            quantized,
            _identity(run, record, batch_size),
            adapter=output,
            base=None if base_output is None else Path(base_output),
            calibrated=calibrated,
            resume=resume,
        )
    with saying_what_is_kept(outputs, dtype):
        finished, chosen = processes.broadcast((outputs.finished, outputs.workspace.chosen) if outputs else ([], {}))
        plan = run.plan(chosen.get("batch_size", batch_size), timed=progress)
        if outputs:
            outputs.workspace.choose(batch_size=plan.batch_size)
        quantize: QuantizeAndSolve = GivenQ(lambda name, weight: form.quantize(weight), solver_config, run.stages)
        if calibrated:
            quantize = CalibratedQ(form, rounds, solver_config, run.stages)
        run.solve(
            plan,
            quantize,
            outputs.save_block if outputs else lambda *block: None,  # never called there
            folder=output.resolve().parent,
            restore=outputs.restore if outputs else lambda *block: {},
            finished=finished,
            known=outputs.workspace.layers if outputs else [],
            shrunk=_shrunk(chosen, processes.rank, finished),
            progress=progress,
        )
        report = None
        if outputs:
            kept = outputs.workspace
            notes, grow = [*_capped(capped), *_resumed(finished), *_not_mergeable(model, stream)], 1.0
            if alpha is not None:
                tuned = config.lora_alpha
                factor, note = match_alpha(model, "default", kept.layers)
                notes, grow = [*notes, note], factor**-0.5
                record["lora"] = lora_record(config) | {"alpha_tuned": tuned}
            report = run.report(plan, kept.layers, record, *notes, digests=kept.digests, blocks=kept.blocks)
            outputs.publish(report, times=grow)
    if of_model is not None:
        return refine_in_place(
            output,
            data,
            checkpoint=source,
            steps=of_model.steps,
            rate=of_model.rate,
            batch_size=batch_size,
            memory_budget=memory_budget,
            device=device,
            seed=seed,
            progress=progress,
        )
    return processes.broadcast(report)  # type: ignore[return-value]


def _identity(run: Run, record: dict[str, Any], batch_size: int | None) -> dict[str, Any]:
    """What decides the factors: a run resumes another only where all of it is the same."""
    return {
        "base": {name: record["base"][name] for name in ("fingerprint", "dtype", "quantization")},
        "calibration": {k: v for k, v in record["calibration"].items() if k not in ("source", "seed")},
        "solver": record["solver"],
        "targets": {target.name: [target.rank, target.scaling] for target in run.targets},
        "rounding": {name: record["base"].get(name) for name in ("rounding", "rounding_settings", "path")},
        "refinement": record.get("refinement"),
        "batch_size": batch_size,
        "device": run.meter.device.type,
        "processes": run.processes.size,
        "versions": record["versions"] | {"quailora": record["quailora"]},
    }


def _shrunk(chosen: dict[str, Any], rank: int, finished: list[int]) -> dict[int, int]:
    """Block -> the size of the micro-batches from it on, as far as finished blocks were computed with it."""
    of_ranks = chosen.get("shrunk")
    return {block: size for block, size in of_ranks[rank] if block <= max(finished, default=-1)} if of_ranks else {}


def _capped(names: list[str]) -> list[str]:
    if not names:
        return []
    linears = count(len(names), "linear")
    return [f"{linears} narrower than r ({names[0]} for one): the rank is that of the smaller side, by rank_pattern"]


def _not_mergeable(model: PeftModel, stream: StreamedModel) -> list[str]:
    why = obstacle(model.get_base_model(), stored_alone(stream))
    if why is None:
        return []
    return [
        f"this adapter cannot be merged into the checkpoint (quailora merge): {why}. For one that can, name linears in "
        "target_modules (--target-modules), such as q_proj, and nothing that is tied in modules_to_save"
    ]


def _resumed(finished: list[int]) -> list[str]:
    if not finished:
        return []
    blocks = count(len(finished), "block was", "blocks were")
    return [f"{blocks} solved by an earlier run that did not finish; the times are this run's"]
