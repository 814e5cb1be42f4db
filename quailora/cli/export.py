"""`quailora export`: a written base, for a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    base: Annotated[
        Path, typer.Argument(metavar="BASE", help="The folder of a base that `init --bits` wrote (--base-output).")
    ],
    output: Annotated[Path, typer.Option(help="Where the exported base goes: a new or empty folder.")],
    format: Annotated[str, typer.Option(help="The only one so far: compressed-tensors.")] = "compressed-tensors",
) -> None:
    """Write BASE in the format of a server, such as vLLM at 2 and 3 bits: the same Q, so its adapter fits as it is."""
    from quailora import export as write

    write(base, output, format=format)
    typer.echo(f"base in {format}: {output}")
