"""The console script `quailora`: its commands, and how errors are shown."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

import quailora
from quailora.cli.convert import convert
from quailora.cli.doctor import doctor
from quailora.cli.eval import evaluate
from quailora.cli.export import export
from quailora.cli.init import init
from quailora.cli.merge import merge
from quailora.cli.plan import plan
from quailora.cli.refine import refine
from quailora.errors import QuailoraError
from quailora.quantization.registry import LIBRARIES

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help=quailora.__doc__,
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(quailora.__version__)
        raise typer.Exit


app.command()(init)
app.command()(plan)
app.command("eval")(evaluate)
app.command()(refine)
app.command()(merge)
app.command()(convert)
app.command()(export)
app.command()(doctor)


def main() -> None:
    """The console script. An error that the user can fix is one line on standard error and exit status 1; a bug keeps
    its traceback."""
    # The user should see one progress bar and our own messages, not the libraries' warnings about our use of them.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read on import, which happens only in commands
    for library in LIBRARIES:
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=rf"({'|'.join(LIBRARIES)}|peft|transformers|torch)\b")
    try:
        app()
    except QuailoraError as error:
        several = os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ
        rank = f" (process {os.environ['RANK']})" if several else ""
        line = Text.assemble((f"error{rank}:", "bold red"), " ", " ".join(str(error).split()))
        Console(stderr=True, highlight=False).print(line, soft_wrap=True)
        sys.exit(1)
