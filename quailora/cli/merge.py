"""`quailora merge`: a dense checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quailora.cli.options import (
    AutoClassOption,
    CheckpointArgument,
    ComputeOption,
    DoubleOption,
    Dtype,
    RecordedQuantOption,
    RemoteOption,
    RevisionOption,
    check_quantization_options,
    quantization_config,
    torch_dtype,
)


def merge(
    checkpoint: CheckpointArgument,
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="The trained adapter's folder.")],
    output: Annotated[Path, typer.Option(help="Where the dense checkpoint goes: a new or empty folder.")],
    initial: Annotated[
        Path | None, typer.Option(help="The adapter that training started from, or that was kept frozen and has moved.")
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="The quantized base's folder, if it is not where the adapter's record says.")
    ] = None,
    quant: RecordedQuantOption = None,
    double_quant: DoubleOption = None,
    compute_dtype: ComputeOption = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Dtype of the output. Default: the checkpoint's.")] = None,
    device: Annotated[str, typer.Option(help="Device to compute on.")] = "cpu",
    revision: RevisionOption = None,
    trust_remote_code: RemoteOption = False,
    auto_class: AutoClassOption = None,
) -> None:
    """Write a dense checkpoint W' = Q + scaling B A, for serving: what the quantized base with the adapter computes."""
    from quailora import merge as write
    from quailora.files import check_new_folder
    from quailora.modeling.checkpoint import Checkpoint

    check_new_folder(output)
    check_quantization_options(quant, double_quant, compute_dtype)
    source = Checkpoint(checkpoint, revision=revision, trust_remote_code=trust_remote_code, auto_class=auto_class)
    quantization = None if quant is None else quantization_config(quant, double_quant, compute_dtype, source.dtype)
    write(
        source,
        adapter,
        output,
        initial=initial,
        quantization=quantization,
        base=base,
        dtype=torch_dtype(dtype),
        device=device,
    )
    typer.echo(f"dense checkpoint: {output}")
