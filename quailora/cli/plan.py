"""`quailora plan`: the memory, FLOPs and time of a run; and the memory of a fine-tune, by the bits of its base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from quailora.cli.options import (
    GROUP_SIZE,
    AutoClassOption,
    CheckpointArgument,
    ComputeOption,
    DoubleOption,
    HostMemoryOption,
    InputsOption,
    IterationsOption,
    LengthOption,
    LoadedOption,
    MemoryOption,
    QuantOption,
    RefineOption,
    RemoteOption,
    RevisionOption,
    check_bits,
    gptq_config,
    parse_target_modules,
    quantization_config,
    torch_dtype,
)
from quailora.errors import AdapterError, QuailoraError
from quailora.quantization.registry import Format

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig

    from quailora.memory.training import Training
    from quailora.modeling.checkpoint import Checkpoint

_CAPTION = """\
LoRA of rank {rank}, its gradients and AdamW's moments (8 bytes a parameter) are in fp32. Activations are those of \
{batch} x {length} tokens with gradient checkpointing: the hidden states that enter each block, and the larger of what \
one block's backward pass takes, with the weights that it de-quantizes, and the logits with their gradient. int3 and \
int2 are GPTQ's, with groups of {group}. Not counted: CUDA itself, gaps that the allocator leaves, and what a trainer \
casts to fp32, as PEFT's prepare_model_for_kbit_training does with embeddings, norms and the head."""


def plan(
    checkpoint: CheckpointArgument,
    memory_budget: MemoryOption = None,
    host_memory_budget: HostMemoryOption = None,
    rank: Annotated[int, typer.Option(help="LoRA's r.", min=1)] = 64,
    target_modules: Annotated[
        str, typer.Option(help="all-linear, names separated by commas, or one regular expression.")
    ] = "all-linear",
    quant: QuantOption = None,
    bits: Annotated[
        int | None, typer.Option(help="For a run that writes a base in GPTQ's format: 2, 3, 4 or 8 bits, as in init.")
    ] = None,
    rounding: Annotated[
        str | None,
        typer.Option(help="For a run that writes its base: calibrated or nearest. Default: calibrated with --bits."),
    ] = None,
    magr: Annotated[float | None, typer.Option(help="With calibrated rounding, as in init.")] = None,
    double_quant: DoubleOption = None,
    compute_dtype: ComputeOption = None,
    dtype: LoadedOption = None,
    solver: Annotated[str, typer.Option(help="krylov, als (the paper's), eigh or svd.")] = "krylov",
    iterations: IterationsOption = None,
    samples: Annotated[int, typer.Option(help="Calibration sequences.", min=1)] = 2000,
    sequence_length: LengthOption = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Sequences in one forward pass. Default: about 8192 tokens; of a fine-tune, one sequence.", min=1
        ),
    ] = None,
    inputs: InputsOption = None,
    refine: RefineOption = None,
    training: Annotated[
        bool, typer.Option("--training", help="Show what the fine-tune will hold on the device, by bits, not `init`.")
    ] = False,
    group_size: Annotated[
        int | None,
        typer.Option(
            help=f"With --bits or --training: how many weights share a scale, as in init. Default: {GROUP_SIZE}."
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="Device of the run; cuda may be absent here. Default: CUDA if there is a GPU, else cpu."),
    ] = None,
    revision: RevisionOption = None,
    trust_remote_code: RemoteOption = False,
    auto_class: AutoClassOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Show what `init` would need: memory by use, FLOPs, and an estimate of the time. With --training, show what the
    fine-tune will need.

    No weights are read or downloaded; for a model on the hub, the headers of its files are enough.
    """
    from json import dumps

    import torch
    from peft import LoraConfig

    from quailora.adapters.skeleton import targeted_skeleton
    from quailora.adapters.targets import find_targets
    from quailora.calibration.data import SEQUENCE_LENGTH
    from quailora.memory.budget import MemoryConfig, describe_bytes
    from quailora.memory.planner import make_plan
    from quailora.memory.sizes import Calibrated
    from quailora.memory.training import training_table
    from quailora.modeling.checkpoint import Checkpoint
    from quailora.modeling.devices import default_device
    from quailora.modeling.streamed_model import StreamedModel
    from quailora.pipeline.base_output import quantized_linears, unadapted_linears
    from quailora.pipeline.trainable import check_fits
    from quailora.quantization.registry import from_config
    from quailora.quantization.rounding import QUANTIZED, RoundingConfig
    from quailora.quantization.verify import CALIBRATED
    from quailora.refinement.config import by_level, refinement_config
    from quailora.reporting.markdown import count
    from quailora.solvers.config import SolverConfig

    settings = SolverConfig(solver, iterations)
    refinement, of_model = by_level(refinement_config(refine, None, None))
    given = {"--quant": quant, "--bits": bits, "--rounding": rounding, "--magr": magr, "--refine": refine}
    given |= {"--inputs": inputs, "--host-memory-budget": host_memory_budget}
    if training and (odd := next((name for name, value in given.items() if value is not None), None)):
        raise QuailoraError(f"{odd} is not for --training, which shows every format on one device: leave it out")
    check_bits(bits, quant, double_quant, compute_dtype, group_size if not training else None)
    written = bits is not None or rounding is not None
    rounds = RoundingConfig.given(rounding, written=written, magr=magr, inputs=inputs)
    group_size = GROUP_SIZE if group_size is None else group_size
    memory = MemoryConfig(memory_budget, host_memory_budget, batch_size)  # checked first: a typo costs no download
    absent = (device or "").partition(":")[0] == "cuda" and not torch.cuda.is_available()
    place = torch.device("cuda") if absent else default_device(device)
    source = Checkpoint(
        checkpoint, revision=revision, trust_remote_code=trust_remote_code, auto_class=auto_class, headers_only=True
    )
    loaded_as = torch_dtype(dtype) or source.dtype
    positions = getattr(source.config.get_text_config(decoder=True), "max_position_embeddings", None)
    length = sequence_length or min(SEQUENCE_LENGTH, positions or SEQUENCE_LENGTH)
    config = LoraConfig(r=rank, target_modules=parse_target_modules(target_modules), task_type="CAUSAL_LM")
    if training:
        formats: list[tuple[int, Any]] = [
            (8, quantization_config(Format.int8, double_quant, None, loaded_as)),
            (4, quantization_config(Format.nf4, double_quant, compute_dtype, loaded_as)),
            *((bits, gptq_config(bits, group_size, symmetric=True)) for bits in (3, 2)),
        ]
        rows, notes = _fine_tunes(source, loaded_as, config, formats, batch_size or 1, length)
        if json:
            typer.echo(dumps([{"bits": bits} | row.to_dict() for bits, row in rows.items()], indent=2))
            return
        caption = _CAPTION.format(rank=rank, batch=batch_size or 1, length=length, group=group_size)
        Console().print(training_table(rows, caption, memory.device_bytes))
        typer.echo("".join(f"{note}\n" for note in notes), nl=False)
        return
    quantization = (
        quantization_config(quant or Format.nf4, double_quant, compute_dtype, loaded_as)
        if bits is None
        else gptq_config(bits, group_size, symmetric=True)
    )
    model, _ = targeted_skeleton(source, quantization, loaded_as, config)
    targets, _ = find_targets(model)
    stream = StreamedModel(source, torch.device("cpu") if absent else place, loaded_as)
    ranks = {target.name: target.rank for target in targets}
    form: Any = from_config(quantization).loaded_in(loaded_as)
    if written:
        form.checkpoint_config("")  # or an error, as in init
    quantized = quantized_linears(model, stream)
    unadapted = unadapted_linears(quantized, targets, written=written, refinement=refinement)
    found = make_plan(
        stream,
        ranks | dict.fromkeys(unadapted or (), 0),
        Calibrated(form, magr=rounds.magr > 0) if rounds.rounding == CALIBRATED else form,
        settings,
        samples=samples,
        sequence_length=length,
        memory_budget=memory.device_bytes,
        host_memory_budget=memory.host_bytes,
        batch_size=memory.batch_size,
        device=place,
        timed=True,
        refinement=refinement,
        quantized_inputs=rounds.inputs == QUANTIZED,
    )
    values, text = found.to_dict(), found.text()
    if of_model is not None:
        size, trained = check_fits(
            stream, form, quantized, ranks, length, of_model, place, found.budget, memory.batch_size
        )
        values["model"] = trained.to_dict() | {"bits": bits or (8 if quant is Format.int8 else 4), "batch_size": size}
        text += (
            f"\nthen the quantized model is refined as a whole, in micro-batches of {count(size, 'sequence')}: "
            f"{describe_bytes(trained.total)} on the device ({trained.parts()})"
        )
    typer.echo(dumps(values, indent=2) if json else text)


def _fine_tunes(
    source: Checkpoint,
    dtype: torch.dtype,
    config: LoraConfig,
    formats: list[tuple[int, Any]],
    batch_size: int,
    sequence_length: int,
) -> tuple[dict[int, Training], list[str]]:
    """By bits, what a fine-tune holds: on the base in full precision, and in each format (bits, quantization config).
    And a line for each format that does not hold this model."""
    from copy import deepcopy
    from functools import partial

    import torch
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    from quailora.adapters.skeleton import targeted_skeleton
    from quailora.memory.sizes import block_sizes
    from quailora.memory.training import training_memory
    from quailora.modeling.streamed_model import StreamedModel
    from quailora.quantization.registry import from_config, is_quantized

    stream = StreamedModel(source, torch.device("cpu"), dtype)
    memory = partial(
        training_memory, stream, block_sizes(stream, {}), batch_size=batch_size, sequence_length=sequence_length
    )
    rows: dict[int, Training] = {}
    notes = []
    for bits, quantization in formats:
        try:
            model, _ = targeted_skeleton(source, quantization, dtype, deepcopy(config))
        except AdapterError as error:
            if not rows:  # it is about the adapter
                raise
            notes.append(f"{bits} bits: {error}")
            continue
        plain: Any = model.get_base_model()
        modules = dict(plain.named_modules())
        quantized = {name.removesuffix(".base_layer") for name, module in modules.items() if is_quantized(module)}
        ranks = {
            name: module.r["default"]
            for name, module in modules.items()
            if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper)  # of fused experts
        }
        if not rows:
            rows[8 * dtype.itemsize] = memory(None, (), ranks)
        rows[bits] = memory(from_config(quantization), quantized, ranks)
    return rows, notes
