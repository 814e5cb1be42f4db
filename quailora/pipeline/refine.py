"""`refine`: the factors of an adapter that exists, trained further for what the whole model predicts."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from quailora import ops
from quailora.adapters.base_record import as_recorded, check_base, for_full_precision, loading
from quailora.adapters.correction import Correction
from quailora.adapters.new_tokens import resize_to
from quailora.adapters.quantized_checkpoint import QuantizedCheckpoint
from quailora.adapters.save_and_load import loading_by_peft
from quailora.adapters.saved_adapter import SavedAdapter
from quailora.adapters.skeleton import targeted_skeleton
from quailora.adapters.targets import Target, find_targets
from quailora.calibration.block import BlockRun
from quailora.calibration.calls import Calls
from quailora.calibration.data import SAMPLES, Calibration, CalibrationConfig, read_calibration
from quailora.calibration.hidden_states import HiddenStates
from quailora.errors import AdapterError, CheckpointError, QuailoraError
from quailora.files import check_new_folder, new_folder, read_json, to_json, write_files
from quailora.memory.budget import MemoryConfig, Meter, memory_errors
from quailora.modeling.checkpoint import Checkpoint
from quailora.modeling.devices import default_device, without_torch_modes
from quailora.modeling.loading import load_model
from quailora.modeling.streamed_model import StreamedModel
from quailora.pipeline.base_output import quantized_linears
from quailora.pipeline.stages import Stages
from quailora.pipeline.trainable import check_fits, check_trainable
from quailora.quantization.registry import from_dict
from quailora.refinement.config import BLOCKS_INSTEAD, refine_config
from quailora.refinement.model import global_states_kept, refine_model
from quailora.refinement.student import Sequences, Teacher
from quailora.reporting.markdown import count
from quailora.reporting.model_card import model_card
from quailora.reporting.record import RECORD, read_record, was_trained
from quailora.reporting.report import ModelReport, Report


@without_torch_modes()
def refine(
    adapter: str | Path,
    data: Any,
    output_dir: str | Path,
    *,
    checkpoint: str | Path | Checkpoint | None = None,
    base: str | Path | None = None,
    steps: int | None = None,
    rate: float | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    samples: int = SAMPLES,
    sequence_length: int | None = None,
    split: str = "train",
    column: str | None = None,
    batch_size: int | None = None,
    memory_budget: int | str | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Report:
    """Train A and B of an initialized adapter so that the quantized model predicts what the full-precision one does.

    For an adapter that is used as it is, without a fine-tune. (Blocks are refined while they are solved:
    `build_adapter(..., refine="blocks")`.) The two models are never in memory together: hidden states of the
    full-precision one, computed block by block, are kept in a file beside `output_dir` while the quantized one is
    trained. Some of the data is held out, and the factors that do best on it are kept.

    Args:
        adapter: the folder of the initialized adapter. It stays as it is.
        data: texts, as `calibration` of `build_adapter`.
        output_dir: the folder of the refined adapter, new or empty.
        checkpoint: the full-precision checkpoint; None is what the adapter's record names.
        base: the folder of the quantized base, if it was written and is not where the adapter's record says.
        steps, rate: of Adam; see `quailora.refinement.config.RefinementConfig`.
        batch_size: sequences of a micro-batch; None takes as many as a step has, or fewer where memory is short.
        memory_budget: what may be allocated on the device, for the quantized model and its training. None is nine
            tenths of what is free.
        Others as in `build_adapter`.

    Returns:
        The report that is also in `output_dir`: that of the adapter, with `Report.model`.

    Raises:
        BudgetError: the quantized model cannot be trained within the budget.
        MismatchError: the checkpoint or the base is not the recorded one.
        QuailoraError: other bad input.
    """
    folder, output = Path(adapter), Path(output_dir)
    check_new_folder(output)
    if folder.resolve() in output.resolve().parents:
        raise QuailoraError(
            f"output_dir (--output) {output} is inside the adapter's folder {folder}, which stays as it is: give a "
            "folder outside"
        )
    config = refine_config(steps, rate)
    memory = MemoryConfig(memory_budget, None, batch_size)
    record = _initialized(folder)
    made_for = record["base"]
    saved, report = SavedAdapter(folder), Report.load(folder)
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = _checkpoint(checkpoint, made_for)
    source = as_recorded(checkpoint, made_for)
    quantization, dtype = loading(made_for, source, None, folder)
    written = QuantizedCheckpoint.recorded(made_for, base, trust_remote_code=source.trust_remote_code)
    if base is not None and "path" in made_for:
        made_for["path"] = str(Path(base).resolve())
    calibration = read_calibration(
        source, data, CalibrationConfig(samples, sequence_length, seed, split, column), tokenizer=tokenizer
    )
    meter, stages = Meter(default_device(device), memory), Stages()
    with meter.setting_up():
        form = from_dict(made_for["quantization"])
        skeleton, _ = targeted_skeleton(source, form.to_config(), dtype, saved.config)
        stream = StreamedModel(source, meter.device, dtype)
    check_trainable(skeleton, form, meter.device, dtype)
    ranks = {target.name: target.rank for target in find_targets(skeleton)[0]}
    quantized, longest = quantized_linears(skeleton, stream), calibration.longest
    size, planned = check_fits(stream, form, quantized, ranks, longest, config, meter.device, meter.budget, batch_size)
    sequences = Sequences.of(calibration, config, size, seed)
    drawn = count(sum(len(batch.input_ids) for batch in sequences.batches), "sequence")
    _say(progress, f"the full-precision model runs over {drawn}")
    output.resolve().parent.mkdir(parents=True, exist_ok=True)
    with (
        meter,
        memory_errors(meter.device, _SMALLER),
        global_states_kept(),
        HiddenStates(meter.device, output.resolve().parent) as hidden,
    ):
        with stages("full precision"):
            teacher = _teacher(stream, sequences, hidden)
        del stream
        with stages("load the base"):
            loaded = source if written is None else as_recorded(written.checkpoint, made_for)
            # A base that was written says how it is quantized. Of one that transformers cannot quantize itself, the
            # configuration also asks for layers that can be trained.
            given = quantization if written is None or form.planned is not None else None
            model = load_model(loaded, meter.device, dtype, given)
            resize_to(model, folder)
            check_base(model, folder, checkpoint=source)
            with loading_by_peft():
                adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
        targets, _ = find_targets(adapted)
        with stages("refine the model"):
            row = refine_model(
                adapted, targets, teacher, sequences, config, seed=seed, progress=partial(_say, progress)
            )
    record["model_refinement"] = asdict(config) | {
        "data": calibration.source,
        "sequences": len(calibration),
        "data_tokens": calibration.tokens,
        "drawn_tokens": sequences.tokens,
    }
    record.pop("weights", None)  # of the adapter as it was
    row = replace(row, seconds=sum(stages.seconds.values()))
    report = replace(
        report,
        record=record,
        model=row,
        notes=list(dict.fromkeys([*report.notes, *calibration.notes(), *_notes(row)])),
        stages=report.stages | stages.seconds,
        memory=report.memory
        | {name: max(used, report.memory.get(name, 0)) for name, used in meter.figures(planned.total).items()},
    )
    _write(output, folder, saved, targets, report)
    return report


def refine_in_place(adapter: Path, data: Calibration, **options: Any) -> Report:
    """`refine` with its result in the place of the adapter, which stays as it was if anything fails."""
    place = adapter.resolve()
    with tempfile.TemporaryDirectory(prefix=f".{place.name}.", dir=place.parent) as folder:
        refined, before = Path(folder) / "refined", Path(folder) / "before"
        try:
            report = refine(adapter, data, refined, **options)
            place.rename(before)
            refined.rename(place)
        except KeyboardInterrupt as interruption:
            raise KeyboardInterrupt(f"interrupted; {_left(adapter)}") from interruption
        except QuailoraError as error:
            raise type(error)(f"{error}; {_left(adapter)}") from error
        finally:
            if not place.exists():
                before.rename(place)
    return report


def _initialized(folder: Path) -> dict[str, Any]:
    """The record of an adapter. Raises AdapterError unless it is as quailora made it."""
    if not folder.is_dir():
        raise AdapterError(f"{folder} does not exist or is not a folder: give an adapter's folder")
    record = read_record(folder)
    if record is None or was_trained(folder, record) or Correction.read(folder) is not None:
        why = f"has no {RECORD}" if record is None else "was trained since quailora made it"
        raise AdapterError(
            f"{folder} {why}: refine takes an adapter as quailora made it, for it would undo a fine-tune. Give the "
            "initialized adapter, or make it again (quailora init); fine-tune it after refining"
        )
    if for_full_precision(record["base"]):
        raise AdapterError(f"{folder} is for the full-precision weights: there is no quantization error to undo")
    return record


def _checkpoint(given: str | Path | None, base: dict[str, Any]) -> Checkpoint:
    """The full-precision one, where it is given to be or where the adapter's record has it. Raises CheckpointError."""
    try:
        return Checkpoint(given or base["checkpoint"], revision=base["revision"])
    except CheckpointError as error:
        if given is not None:
            raise
        raise CheckpointError(
            f"{error}. That is where the adapter's record has the full-precision model: if it is elsewhere, give "
            "checkpoint (--checkpoint)"
        ) from error


@torch.no_grad()
def _teacher(stream: StreamedModel, sequences: Sequences, hidden: HiddenStates) -> Teacher:
    """`hidden` gets what comes out of the last block, with one block in memory at a time."""
    calls, recorder = [], Calls(stream)
    with torch.autocast(stream.device.type, enabled=False):
        with stream.resident(*stream.outside_blocks()), ops.half_products(stream.device, [stream.dtype]):
            for number, batch in enumerate(sequences.batches):
                hidden[number], of_batch = recorder.record(batch)
                calls.append(of_batch)
        for index, block in enumerate(stream.blocks):
            with stream.resident(f"{block.name}."):
                of_block = [of_batch[index] for of_batch in calls]
                BlockRun(block.module, stream.device, stream.dtype, sequences.batches, of_block).propagate(hidden)
    return Teacher(hidden, recorder.tuples)


def _notes(row: ModelReport) -> Iterator[str]:
    kept = f"those of step {row.steps}" if row.steps else "those from before refinement"
    if row.stopped:
        yield f"{row.stopped}, and the factors are {kept}"
    elif not row.steps:
        yield "no step of refinement did better on held-out tokens, so the factors are unchanged: more data may help"


def _write(output: Path, adapter: Path, saved: SavedAdapter, targets: list[Target], report: Report) -> None:
    tensors = dict(saved.tensors)
    for target in targets:
        for side, weight in zip("AB", target.parameters(), strict=True):
            name = f"base_model.model.{target.name}.lora_{side}.weight"
            tensors[name] = weight.detach().to("cpu", saved.tensors[name].dtype).contiguous()
    config = read_json(adapter / "adapter_config.json") or {}
    if (base := report.record["base"].get("path")) is not None:
        config["base_model_name_or_path"] = base
    with new_folder(output) as folder:
        write_files(folder, {"adapter_config.json": to_json(config)})
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        report.save(folder)
        write_files(folder, {"README.md": model_card(report.record, report)})


def _say(shown: bool, line: str) -> None:
    if shown:
        print(f"QuAILoRA: {line}", file=sys.stderr, flush=True)


def _left(adapter: Path) -> str:
    return (
        f"{adapter} has the adapter as it was found layer by layer, and quailora.refine (quailora refine) goes on from "
        "there"
    )


_SMALLER = (
    "lower memory_budget (--memory-budget), batch_size (--batch-size 1) or sequence_length (--sequence-length), or "
    f"{BLOCKS_INSTEAD}"
)
