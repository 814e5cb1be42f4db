"""`quailora init`: make an adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from quailora.cli.options import (
    GROUP_SIZE,
    AutoClassOption,
    BatchOption,
    CheckpointArgument,
    ColumnOption,
    ComputeOption,
    DataOption,
    DeviceOption,
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
    SplitOption,
    check_bits,
    chosen_split,
    gptq_config,
    parse_alpha,
    parse_names,
    parse_pattern,
    parse_target_modules,
    quantization_config,
    torch_dtype,
)
from quailora.errors import QuailoraError
from quailora.quantization.registry import Format


def init(
    checkpoint: CheckpointArgument,
    data: DataOption,
    output: Annotated[Path, typer.Option(help="Where the adapter goes: a new or empty folder.")],
    rank: Annotated[int, typer.Option(help="LoRA's r.", min=1)] = 64,
    alpha: Annotated[
        str,
        typer.Option(
            help="LoRA's alpha; or matched, or matched:16: one with which a learning rate tuned for QLoRA at alpha 16 "
            "suits this adapter. The initial A Bᵀ does not depend on it."
        ),
    ] = "16",
    rslora: Annotated[bool, typer.Option("--rslora", help="Scale by alpha / sqrt(r).")] = False,
    dropout: Annotated[float, typer.Option(help="LoRA's dropout in training.", min=0, max=1)] = 0.0,
    target_modules: Annotated[
        str, typer.Option(help="all-linear, names separated by commas, or one regular expression.")
    ] = "all-linear",
    exclude_modules: Annotated[
        str | None, typer.Option(help="Modules to leave out: names separated by commas, or one regular expression.")
    ] = None,
    rank_pattern: Annotated[
        str | None,
        typer.Option(help="Ranks that differ from --rank, such as q_proj=8,down_proj=128; names may be regexes."),
    ] = None,
    alpha_pattern: Annotated[
        str | None, typer.Option(help="Alphas that differ from --alpha, in the same form.")
    ] = None,
    modules_to_save: Annotated[
        str | None, typer.Option(help="Modules to train in full, such as embed_tokens,lm_head, separated by commas.")
    ] = None,
    bits: Annotated[
        int | None,
        typer.Option(help="Write a base of this many bits, 2, 3, 4 or 8, in GPTQ's format; requires --base-output."),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            help=f"With --bits: weights that share a scale: 32, 64, 128, or -1 for a whole row. Default: {GROUP_SIZE}."
        ),
    ] = None,
    symmetric: Annotated[
        bool, typer.Option("--symmetric/--asymmetric", help="With --bits: whether 0 is the same code everywhere.")
    ] = True,
    base_output: Annotated[
        Path | None,
        typer.Option(help="Write the quantized base here too, a new or empty folder; the adapter names it."),
    ] = None,
    rounding: Annotated[
        str | None,
        typer.Option(
            help="How codes of a base that is written are chosen: calibrated or nearest. Default: calibrated."
        ),
    ] = None,
    rounding_damping: Annotated[
        float | None,
        typer.Option(help="With calibrated rounding: added to H's diagonal, as a fraction of its mean. Default: 0.1."),
    ] = None,
    alternations: Annotated[
        int | None,
        typer.Option(help="With calibrated rounding: how often Q and the factors are found anew. Default: 2."),
    ] = None,
    magr: Annotated[
        float | None,
        typer.Option(help="With calibrated rounding: strength of MagR before it, such as 7e-4. Default: 0, without."),
    ] = None,
    inputs: InputsOption = None,
    refine: RefineOption = None,
    refine_steps: Annotated[
        int | None,
        typer.Option(help="With --refine: number of Adam steps, for each block or for the model. Default: 48."),
    ] = None,
    refine_rate: Annotated[
        float | None,
        typer.Option(
            help="With --refine: learning rate; for the model, as a share of the factors' size. Default: 1e-3."
        ),
    ] = None,
    quant: QuantOption = None,
    double_quant: DoubleOption = None,
    compute_dtype: ComputeOption = None,
    dtype: LoadedOption = None,
    solver: Annotated[str, typer.Option(help="krylov, als (the paper's), eigh or svd.")] = "krylov",
    iterations: IterationsOption = None,
    damping: Annotated[
        float | None, typer.Option(help="Added to H's diagonal, as a fraction of its mean. Default: 1e-4.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration sequences.", min=1)] = 2000,
    sequence_length: LengthOption = None,
    column: ColumnOption = None,
    split: SplitOption = None,
    batch_size: BatchOption = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling and of the solver.")] = 0,
    memory_budget: MemoryOption = None,
    host_memory_budget: HostMemoryOption = None,
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="Continue an unfinished run.")] = True,
    device: DeviceOption = None,
    revision: RevisionOption = None,
    trust_remote_code: RemoteOption = False,
    auto_class: AutoClassOption = None,
    progress: Annotated[bool, typer.Option(help="Show progress on standard error.")] = True,
) -> None:
    """Make an adapter initialized to reduce the quantization error of CHECKPOINT.

    Under torchrun, the processes share the work, each on its own GPU.
    """
    from peft import LoraConfig

    from quailora.calibration import distributed
    from quailora.files import check_new_folder
    from quailora.memory.budget import MemoryConfig
    from quailora.modeling.checkpoint import Checkpoint
    from quailora.pipeline import build as pipeline
    from quailora.pipeline.resume import workspace_of
    from quailora.quantization.rounding import RoundingConfig
    from quailora.refinement.config import refinement_config
    from quailora.solvers.config import DEFAULT_DAMPING, SolverConfig

    # Checked first: a typo should not cost a download.
    check_new_folder(output)
    split = chosen_split(data, split)
    tuned_alpha, matched = parse_alpha(alpha)
    damping = DEFAULT_DAMPING if damping is None else damping
    if base_output is not None and not workspace_of(output).exists():  # that run may have given the base its name
        check_new_folder(base_output)
    SolverConfig(solver, iterations, damping)
    refinement_config(refine, refine_steps, refine_rate)
    written = base_output is not None
    RoundingConfig.given(
        rounding, written=written, damping=rounding_damping, alternations=alternations, magr=magr, inputs=inputs
    )
    check_bits(bits, quant, double_quant, compute_dtype, group_size, symmetric)
    gptq = None if bits is None else gptq_config(bits, GROUP_SIZE if group_size is None else group_size, symmetric)
    if bits is not None and base_output is None:
        raise QuailoraError(f"a base of {bits} bits has to be written: give base_output (--base-output)")
    MemoryConfig(memory_budget, host_memory_budget, batch_size)
    config = LoraConfig(
        r=rank,
        lora_alpha=tuned_alpha,
        use_rslora=rslora,
        lora_dropout=dropout,
        target_modules=parse_target_modules(target_modules),
        exclude_modules=None if exclude_modules is None else parse_target_modules(exclude_modules),
        rank_pattern=parse_pattern("--rank-pattern", rank_pattern),
        alpha_pattern=parse_pattern("--alpha-pattern", alpha_pattern),
        modules_to_save=None if modules_to_save is None else parse_names(modules_to_save),
        task_type="CAUSAL_LM",
    )
    source = Checkpoint(checkpoint, revision=revision, trust_remote_code=trust_remote_code, auto_class=auto_class)
    loaded_as = torch_dtype(dtype) or source.dtype
    quantization = gptq or quantization_config(quant or Format.nf4, double_quant, compute_dtype, loaded_as)
    with distributed.process_group(device) as place, _interruptible():
        report = pipeline.build_adapter(
            source,
            config,
            data,
            output,
            quantization=quantization,
            base_output=base_output,
            rounding=rounding,
            rounding_damping=rounding_damping,
            alternations=alternations,
            magr=magr,
            inputs=inputs,
            dtype=loaded_as,
            solver=solver,
            iterations=iterations,
            damping=damping,
            refine=refine,
            refine_steps=refine_steps,
            refine_rate=refine_rate,
            samples=samples,
            sequence_length=sequence_length,
            split=split,
            column=column,
            batch_size=batch_size,
            memory_budget=memory_budget,
            host_memory_budget=host_memory_budget,
            alpha=matched,
            resume=resume,
            distributed=distributed.launched_by_torchrun(),
            device=place,
            seed=seed,
            progress=progress,
        )
    if distributed.rank() == 0:
        Console().print(report.summary())
        typer.echo(f"adapter, report.md and model card: {output}")
        if base_output is not None:
            typer.echo(f"quantized base: {base_output}")


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C ends the command with one line that says what is kept, and the usual exit status 130."""
    try:
        yield
    except KeyboardInterrupt as interruption:
        typer.echo(str(interruption) or "interrupted", err=True)
        raise typer.Exit(130) from interruption
