"""`quailora eval`: perplexity and KL divergence."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from quailora.cli.options import (
    AutoClassOption,
    BatchOption,
    CheckpointArgument,
    ColumnOption,
    ComputeOption,
    DataOption,
    DeviceOption,
    DoubleOption,
    LengthOption,
    RecordedQuantOption,
    RemoteOption,
    RevisionOption,
    check_quantization_options,
    chosen_split,
    quantization_config,
)
from quailora.quantization.registry import Format


def evaluate(
    checkpoint: CheckpointArgument,
    data: DataOption,
    adapter: Annotated[Path | None, typer.Option(help="The adapter's folder.")] = None,
    initial: Annotated[
        Path | None,
        typer.Option(help="The adapter that training started from, if --adapter has no record of its base."),
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="The quantized base's folder, if it is not where the adapter's record says.")
    ] = None,
    quant: RecordedQuantOption = None,
    double_quant: DoubleOption = None,
    compute_dtype: ComputeOption = None,
    samples: Annotated[int, typer.Option(help="Number of sequences to evaluate on.", min=1)] = 64,
    sequence_length: LengthOption = None,
    column: ColumnOption = None,
    split: Annotated[str | None, typer.Option(help="Split of a data set. Default: test.")] = None,
    batch_size: BatchOption = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    device: DeviceOption = None,
    revision: RevisionOption = None,
    trust_remote_code: RemoteOption = False,
    auto_class: AutoClassOption = None,
    json: Annotated[Path | None, typer.Option(help="Also write the results to this file.")] = None,
) -> None:
    """Perplexity and KL divergence of the full-precision model, the quantized model, and the model with the adapter.

    Both models are on the device at the same time.
    """
    from quailora.calibration.data import CalibrationConfig, read_calibration
    from quailora.evaluate import compare
    from quailora.modeling.checkpoint import Checkpoint
    from quailora.modeling.devices import default_device

    if adapter is None:
        quant = quant or Format.nf4
    check_quantization_options(quant, double_quant, compute_dtype)
    split = chosen_split(data, split, "test")
    source = Checkpoint(checkpoint, revision=revision, trust_remote_code=trust_remote_code, auto_class=auto_class)
    quantization = None if quant is None else quantization_config(quant, double_quant, compute_dtype, source.dtype)
    config = CalibrationConfig(samples, sequence_length, seed, split, column)
    calibration = read_calibration(source, data, config)
    for note in calibration.notes():
        typer.echo(note, err=True)
    comparison = compare(
        source,
        adapter,
        calibration,
        initial=initial,
        quantization=quantization,
        base=base,
        device=default_device(device),
        batch_size=batch_size,
    )
    Console().print(comparison.table())
    if json is not None:
        comparison.save(json)
