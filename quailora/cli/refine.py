"""`quailora refine`: train an initialized adapter for what the whole model predicts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from quailora.cli.options import (
    ColumnOption,
    DataOption,
    DeviceOption,
    LengthOption,
    MemoryOption,
    RemoteOption,
    RevisionOption,
    SplitOption,
    chosen_split,
)
from quailora.errors import QuailoraError


def refine(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="The initialized adapter's folder.")],
    data: DataOption,
    output: Annotated[Path, typer.Option(help="Where the refined adapter goes: a new or empty folder.")],
    checkpoint: Annotated[
        str | None,
        typer.Option(help="The full-precision model, if it is not where the adapter's record says."),
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="The quantized base's folder, if it is not where the adapter's record says.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of Adam. Default: 48.")] = None,
    rate: Annotated[
        float | None, typer.Option(help="Learning rate, as a share of the factors' size. Default: 1e-3.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Sequences to draw from.", min=1)] = 2000,
    sequence_length: LengthOption = None,
    column: ColumnOption = None,
    split: SplitOption = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Sequences of a micro-batch. Default: a step's, or fewer where memory is short.", min=1),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling and of the order of the data.")] = 0,
    memory_budget: MemoryOption = None,
    device: DeviceOption = None,
    revision: RevisionOption = None,
    trust_remote_code: RemoteOption = False,
    progress: Annotated[bool, typer.Option(help="Show progress on standard error.")] = True,
) -> None:
    """Train an initialized ADAPTER so that the quantized model predicts what the full-precision model does.

    For an adapter that is used without a fine-tune. ADAPTER stays as it is.
    """
    from quailora.files import check_new_folder
    from quailora.memory.budget import MemoryConfig
    from quailora.modeling.checkpoint import Checkpoint
    from quailora.pipeline import refine as pipeline
    from quailora.refinement.config import refine_config

    # Checked first: a typo should not cost a download.
    check_new_folder(output)
    split = chosen_split(data, split)
    refine_config(steps, rate)
    MemoryConfig(memory_budget, None, batch_size)
    if checkpoint is None and (revision is not None or trust_remote_code):
        raise QuailoraError("--revision and --trust-remote-code go with --checkpoint: give that too")
    source = None
    if checkpoint is not None:
        source = Checkpoint(checkpoint, revision=revision, trust_remote_code=trust_remote_code)
    report = pipeline.refine(
        adapter,
        data,
        output,
        checkpoint=source,
        base=base,
        steps=steps,
        rate=rate,
        samples=samples,
        sequence_length=sequence_length,
        split=split,
        column=column,
        batch_size=batch_size,
        memory_budget=memory_budget,
        device=device,
        seed=seed,
        progress=progress,
    )
    Console().print(report.summary())
    typer.echo(f"adapter, report.md and model card: {output}")
