"""`quailora convert`: what training learned, for the full-precision weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    initial: Annotated[
        Path, typer.Argument(metavar="INITIAL", help="The adapter that training started from, or that was kept frozen.")
    ],
    trained: Annotated[Path, typer.Argument(metavar="TRAINED", help="The adapter after training.")],
    output: Annotated[Path, typer.Option(help="Where the new adapter goes: a new or empty folder.")],
    rank: Annotated[
        int | None, typer.Option(help="Truncate to this rank. Default: the full rank, at most 2 r.", min=1)
    ] = None,
    combine: Annotated[
        bool,
        typer.Option(
            "--combine",
            help="If INITIAL was kept frozen: both as one adapter of the summed rank, for the quantized base.",
        ),
    ] = False,
) -> None:
    """Write what training learned, TRAINED minus INITIAL, as an adapter for the full-precision weights.

    An adapter that was trained over a frozen INITIAL is what training learned, and is copied.
    """
    from quailora import convert as write

    write(initial, trained, output, rank=rank, combine=combine)
    typer.echo(f"adapter for the {'quantized base' if combine else 'full-precision weights'}: {output}")
