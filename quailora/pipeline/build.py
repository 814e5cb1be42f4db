"""The method, end to end: checkpoint -> blocks -> activations -> H -> Q -> factors -> adapter -> report."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase

from quailora import ops
from quailora.adapters import lora as adapters
from quailora.adapters.lora import Target
from quailora.calibration.data import SAMPLES, SEQUENCE_LENGTH, Calibration, load_calibration
from quailora.errors import AdapterError, CalibrationError, CheckpointError, MismatchError, QuailoraError
from quailora.files import check_new_folder, write_files
from quailora.memory.allocator import freed_at_once
from quailora.memory.budget import Meter
from quailora.memory.planner import TOKENS_PER_BATCH
from quailora.modeling.checkpoint import Checkpoint
from quailora.modeling.streamed_model import StreamedModel, linear_weight
from quailora.pipeline.distributed import Crew
from quailora.pipeline.loop import Loop, Solved, Stages
from quailora.pipeline.resume import Workspace
from quailora.quantization.bitsandbytes import Quantization, QuantizedWeight, quantization_of, quantize, read, to_device
from quailora.reporting.model_card import model_card
from quailora.reporting.progress import Progress
from quailora.reporting.record import make_record
from quailora.reporting.report import LayerReport, Report
from quailora.solvers.config import DEFAULT_DAMPING, SolverConfig

RANK, ALPHA = 64, 16


@torch.inference_mode(False)  # a caller's: of its tensors torch does not count the edits, and it has no fake ones
def build_adapter(
    checkpoint: str | Path | Checkpoint,
    lora_config: LoraConfig | None,
    calibration: Any,
    output_dir: str | Path,
    *,
    quantization: BitsAndBytesConfig | None = None,
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
    resume: bool = True,
    distributed: bool = False,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Report:
    """Make a PEFT adapter whose A and B undo most of the quantization error of `checkpoint`; the whole model is never
    in memory.

    Args:
        checkpoint: the full-precision model: a folder with safetensors, or an id on the Hugging Face hub.
        lora_config: any LoRA configuration PEFT takes; None is the paper's (r 64, alpha 16, all linear layers).
        calibration: text file, JSON or JSONL, data set name, strings, records, token tensors, DataLoader: see
            `quailora.calibration.data.load_calibration`.
        output_dir: the adapter's folder, new or empty: adapter, `report.json`, `report.md`, `quailora.json` and a model
            card.
        quantization: how the base will be loaded; None is NF4 with double quantization, computing in the checkpoint's
            dtype.
        tokenizer: None takes the checkpoint's own.
        solver, iterations, damping: see `quailora.solve`.
        samples, sequence_length, seed: how much calibration data is taken, and the seed of the draw.
        split, column: of a data set, where they are not the usual ones.
        batch_size: sequences in one forward pass; None takes as many as make about 8192 tokens, or fewer where the
            memory is short.
        memory_budget: what may be allocated on the device, in bytes or as "12GiB"; on a CPU, by how much the resident
            memory may grow. None is nine tenths of what is free.
        host_memory_budget: on a GPU, what hidden states may take of the host's memory; what is more goes to a file
            beside `output_dir`. None is nine tenths of what is free.
        resume: go on with a run into `output_dir` that did not come to its end; its finished blocks are kept beside
            the folder, and it is refused where its settings differ. False discards it.
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
    crew, settings = Crew(distributed), SolverConfig(solver, iterations, damping, seed)
    meter = Meter(default_device(device), memory_budget, host_memory_budget)
    source = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint)
    dtype = dtype or source.dtype
    config = copy.deepcopy(lora_config) or LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    adapters.check_config(config)
    quantization = quantization or default_quantization(dtype)
    form = Quantization.from_config(quantization)

    with freed_at_once():  # skeletons have each parameter on the CPU for a moment: gaps would grow with the depth
        base = adapters.quantized_skeleton(source, quantization, dtype)
        model = adapters.adapted_skeleton(base, config, source)
        stream = StreamedModel(source, meter.device, dtype)
    targets, left = adapters.find_targets(model)
    if not targets:
        raise AdapterError(f"no quantized linear is targeted: {_enumerate(left)}")
    adapters.check_can_be_saved(model, stream)
    data = read_calibration(
        source,
        calibration,
        tokenizer=tokenizer,
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
        split=split,
        column=column,
    )

    record = make_record(source, dtype, form, settings, data, config)
    workspace = None
    if crew.leads:
        workspace = Workspace(output, _identity(record, targets, meter, crew, batch_size), resume=resume)
    finished, chosen = crew.from_leader((workspace.finished, workspace.chosen) if workspace else ([], {}))
    stages = Stages()

    def finish(index: int, solved: list[Solved]) -> None:
        assert workspace is not None, "only the leader has results"
        for target, factors, _ in solved:
            target.assign(factors, seed)
        rows = [row for _, _, row in solved]
        workspace.save_block(index, adapters.take(model, [target for target, _, _ in solved]), rows)

    try:
        size, shown = chosen.get("batch_size", batch_size), progress and crew.leads
        plan = meter.plan(stream, targets, form, settings, data, crew, size, timed=shown)
        if workspace:
            workspace.choose(batch_size=plan.batch_size)
        known = workspace.layers if workspace else []
        with Progress(enabled=shown, finished=finished, layers=known, estimate=plan.seconds) as bar, meter:
            loop = Loop(
                model=stream,
                plan=plan,
                settings=settings,
                quantized_weight=lambda target, weight: quantize(weight, form),
                finish=finish,
                crew=crew,
                progress=bar,
                stages=stages,
                folder=output.resolve().parent,
            )
            loop.run(targets, list(crew.share(data).batches(plan.batch_size)), finished)
        report = None
        if workspace:
            layers = workspace.layers
            left |= _unreached(targets, layers, stream)
            notes = [*_notes(stream, data, layers), *_resumed(finished)]
            report = Report(layers, left, notes, record, stages.seconds, meter.figures(plan))
            with workspace.finish() as folder, stages("write"):
                made = workspace.tensors()
                adapters.save(model, folder, made | adapters.rest(model, stream, seed, made))
                report.save(folder)
                write_files(folder, {"README.md": model_card(record, report)})
    except KeyboardInterrupt as interruption:
        raise KeyboardInterrupt(f"interrupted{_kept(workspace)}") from interruption
    except QuailoraError as error:
        raise type(error)(f"{error}{_kept(workspace)}") from error
    except Exception:
        _kept(workspace)
        raise
    return crew.from_leader(report)  # type: ignore[return-value]


def _identity(
    record: dict[str, Any], targets: list[Target], meter: Meter, crew: Crew, batch_size: int | None
) -> dict[str, Any]:
    """What decides the factors: a run goes on with those of another only where all of it is the same."""
    return {
        "base": {name: record["base"][name] for name in ("fingerprint", "dtype", "quantization")},
        "calibration": {k: v for k, v in record["calibration"].items() if k not in ("source", "seed")},
        "solver": record["solver"],
        "targets": {target.name: [target.rank, target.scaling] for target in targets},
        "batch_size": batch_size,
        "device": meter.device.type,
        "processes": crew.size,
        "versions": record["versions"] | {"quailora": record["quailora"]},
    }


def _kept(workspace: Workspace | None) -> str:
    kept = workspace.leave() if workspace else ""
    return f"; {kept}" if kept else ""


def _resumed(finished: list[int]) -> list[str]:
    if not finished:
        return []
    return [f"blocks solved by an earlier run, which did not come to its end: {len(finished)}; times are this run's"]


@torch.inference_mode(False)
def initialize(
    peft_model: PeftModel,
    calibration: Any,
    *,
    checkpoint: str | Path | Checkpoint,
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
    adapter: str = "default",
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
        checkpoint: the full-precision checkpoint that the base was quantized from.
        adapter: the name of the adapter within `peft_model`.
        device: where to compute; None is where the model is.
        memory_budget: besides the model that is loaded.
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
    settings = SolverConfig(solver, iterations, damping, seed)
    config = adapters.check_config(peft_model.peft_config[adapter])
    targets, left = adapters.find_targets(peft_model, adapter)
    if not targets:
        raise AdapterError(f"no quantized linear is targeted: {_enumerate(left)}; is the base loaded in 4 or 8 bits?")
    source = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint)
    meter = Meter(default_device(device or targets[0].base.weight.device), memory_budget, host_memory_budget)
    with freed_at_once():
        stream = StreamedModel(source, meter.device, source.dtype)
    _check_shapes(peft_model, targets, stream)
    data = read_calibration(
        source,
        calibration,
        tokenizer=tokenizer,
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
        split=split,
        column=column,
    )

    base_config: Any = peft_model.get_base_model().config
    dtype = base_config.dtype or source.dtype

    def held(target: Target, weight: Tensor) -> QuantizedWeight:
        quantized = to_device(read(target.base), weight.device)  # a base may be spread over several
        _check_belongs(target, weight, quantized, dtype)
        return quantized

    form, stages, crew = quantization_of(targets[0].base), Stages(), Crew()
    plan = meter.plan(stream, targets, form, settings, data, crew, batch_size, timed=progress)
    found: list[Solved] = []
    with (
        Progress(enabled=progress, estimate=plan.seconds) as bar,
        meter,
        tempfile.TemporaryDirectory(prefix="quailora-") as folder,
    ):
        loop = Loop(
            model=stream,
            plan=plan,
            settings=settings,
            quantized_weight=held,
            finish=lambda index, solved: found.extend(solved),
            crew=crew,
            progress=bar,
            stages=stages,
            folder=Path(folder),
        )
        loop.run(targets, list(data.batches(plan.batch_size)), ())
    layers = [row for _, _, row in found]
    left |= _unreached(targets, layers, stream)
    for target, factors, _ in found:
        target.assign(factors, seed)
    whole = getattr(base_config, "quantization_config", None)
    skipped = Quantization.from_config(whole).skip_modules if isinstance(whole, BitsAndBytesConfig) else None
    record = make_record(source, dtype, replace(form, skip_modules=skipped), settings, data, config)
    return Report(layers, left, _notes(stream, data, layers), record, stages.seconds, meter.figures(plan))


def default_quantization(dtype: torch.dtype) -> BitsAndBytesConfig:
    """The paper's: NF4 with double quantization; computing in the dtype of the checkpoint, bf16 where that is fp32."""
    compute = torch.bfloat16 if dtype == torch.float32 else dtype
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )


def default_device(device: str | torch.device | None) -> torch.device:
    """The device named; None is CUDA if there is one, else the CPU. Raises QuailoraError where it cannot be used, or
    has no fp64."""
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, dtype=torch.float64, device=chosen).device
    except (RuntimeError, AssertionError, TypeError) as error:  # torch built without CUDA asserts; MPS has no fp64
        reason = str(error).partition("\n")[0]
        raise QuailoraError(f"device '{chosen}' cannot be used here: {reason}; name another, such as cpu") from error


def default_batch_size(calibration: Calibration) -> int:
    """As many sequences as make about 8192 tokens: enough for matrix products to be efficient, little beside a block's
    weights."""
    return max(1, TOKENS_PER_BATCH // calibration.longest)


def read_calibration(
    source: Checkpoint,
    data: Any,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    samples: int = SAMPLES,
    sequence_length: int | None = None,
    seed: int = 0,
    split: str = "train",
    column: str | None = None,
) -> Calibration:
    """`load_calibration` with the checkpoint's own tokenizer and limits; by default sequences are as long as the model
    has positions, 2048 at most. Raises CalibrationError for sequences it has no positions for."""
    text = source.config.get_text_config(decoder=True)
    positions = getattr(text, "max_position_embeddings", None)
    if sequence_length is None:
        sequence_length = min(SEQUENCE_LENGTH, positions or SEQUENCE_LENGTH)
    if tokenizer is None and not isinstance(data, Calibration | Tensor):
        tokenizer = load_tokenizer(source)
    loaded = load_calibration(
        data,
        tokenizer,
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
        split=split,
        column=column,
        vocab_size=text.vocab_size,
    )
    if positions is not None and loaded.longest > positions:
        raise CalibrationError(
            f"sequences of {loaded.longest} tokens, and the model has {positions} positions: lower sequence_length"
        )
    return loaded


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_tokenizer(source: Checkpoint, adapter: Path | None = None) -> PreTrainedTokenizerBase | None:
    """The tokenizer in the folder `adapter`, where training has saved one, or else the checkpoint's; None where there
    is none. Raises CheckpointError, with the reason, for one that cannot be read: it is damaged, or takes a package
    that is not here, or code of its own."""
    saved = adapter is not None and any((adapter / name).is_file() for name in _TOKENIZER_FILES)
    name, revision = (str(adapter), None) if saved else (source.name, source.revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=source.trust_remote_code)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError) as error:
        if not saved and not any(source.has(each) for each in _TOKENIZER_FILES):
            return None
        raise CheckpointError(
            f"the tokenizer of {name} cannot be read: {type(error).__name__}: {' '.join(str(error).split())[:600]}"
        ) from error
    return tokenizer if len(tokenizer) else None  # transformers makes an empty one where a kind is known but no file


_GIVE_THE_SAME = "give the full-precision checkpoint that the base was made from"


def _check_shapes(model: PeftModel, targets: list[Target], stream: StreamedModel) -> None:
    """A base of another depth or width than the checkpoint's model was not made from it, which can be told at once."""
    config: Any = model.get_base_model().config
    depth = config.get_text_config(decoder=True).num_hidden_layers
    if depth != len(stream.blocks):
        raise MismatchError(
            f"the loaded base has {depth} blocks, and {stream.checkpoint.name} has {len(stream.blocks)}: "
            f"{_GIVE_THE_SAME}"
        )
    linears = {name: linear for block in stream.blocks for name, linear in block.linears().items()}
    for target in targets:
        held = (target.base.out_features, target.base.in_features)
        if target.name in linears and held != (shape := tuple(linear_weight(linears[target.name]).shape)):
            raise MismatchError(
                f"{target.name} is {held} in the loaded base and {shape} in {stream.checkpoint.name}: {_GIVE_THE_SAME}"
            )


def _check_belongs(target: Target, weight: Tensor, quantized: QuantizedWeight, dtype: torch.dtype) -> None:
    """The codes of the loaded base are those of the checkpoint's own weight, but for ties that devices round apart. A
    fine-tune of the same model, and a base model against its instruct version, differ in many."""
    expected = quantize(weight.to(dtype), quantization_of(target.base)).codes
    same = float((expected == quantized.codes).float().mean())
    if same < 0.99:
        raise MismatchError(
            f"the loaded base is not a quantization of this checkpoint: {same:.1%} of the codes of {target.name} are "
            f"those of its weight; {_GIVE_THE_SAME}"
        )


def _unreached(targets: list[Target], layers: list[LayerReport], stream: StreamedModel) -> dict[str, str]:
    """The targets that no factors were found for, with why. Raises AdapterError where none were found at all."""
    inside = {name for block in stream.blocks for name in block.linears()}
    solved = {row.name for row in layers}
    unreached = {
        target.name: "no calibration token reached it"
        if target.name in inside
        else "it stands outside the decoder's blocks"
        for target in targets
        if target.name not in solved
    }
    if not layers:
        raise AdapterError(f"no targeted linear received calibration tokens: {_enumerate(unreached)}")
    return unreached


# A choice. Factors fit what is particular to their tokens too, the more so the fewer there are.
_TOKENS_PER_INPUT = 8


def _notes(stream: StreamedModel, data: Calibration, layers: list[LayerReport]) -> list[str]:
    """What is worth saying once: data that was passed over, or is little; that H took the slow path; and of fused
    expert weights, parameters of three dimensions which bitsandbytes does not quantize."""
    notes = []
    if data.empty:
        notes.append(f"{data.empty} records of {data.source} had no tokens, and were passed over")
    if few := [layer for layer in layers if layer.tokens < _TOKENS_PER_INPUT * layer.inputs]:
        least = min(few, key=lambda layer: layer.tokens / layer.inputs)
        notes.append(
            f"{len(few)} linears saw fewer than {_TOKENS_PER_INPUT} tokens for each of their inputs ({least.name}: "
            f"{least.tokens} tokens, {least.inputs} inputs): on other text more of their error is left than is "
            "reported here; more data would do better"
        )
    gram = ops.backends(stream.device)["gram_"]
    if gram.backend == "reference":
        notes.append(f"H was added up by plain PyTorch, not by the compiled extension: {gram.others['extension']}")
    fused = [
        (name, tuple(parameter.shape))
        for name, parameter in stream.model.named_parameters()
        if parameter.dim() == 3 and any(name.startswith(f"{block.name}.") for block in stream.blocks)
    ]
    if fused:
        name, shape = fused[0]
        notes.append(
            f"{len(fused)} fused expert weights (the first is {name}, {shape}) stay in full precision when "
            "bitsandbytes loads this model: there is no error of theirs to undo, and they are left alone"
        )
    return notes


def _enumerate(reasons: dict[str, str]) -> str:
    if not reasons:
        return "the configuration matches no module"
    name, why = next(iter(reasons.items()))
    return f"{name}: {why}" + (f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else "")
