"""`make demo`: initialize an adapter for a small real model on the command line, and measure what it gains.

    python benchmarks/end_to_end/demo.py [MODEL]     # the folder of a causal language model; default: SmolLM2-135M

The text is the Python reference that ships with Python (`pydoc_data.topics`): the first half calibrates, the second
half measures. It differs slightly between Python releases, and so do the figures.
"""

import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path
from pydoc_data.topics import topics

from benchmarks.common.smollm2 import fetch
from quailora.errors import QuailoraError

OUTPUT = Path("build/demo")
ADAPTER = OUTPUT / "adapter"
CALIBRATE = OUTPUT / "calibrate.txt"
MEASURE = OUTPUT / "measure.txt"


def write_texts() -> None:
    text = "\n".join(topics[name] for name in sorted(topics))
    half = len(text) // 2
    CALIBRATE.write_text(text[:half], encoding="utf-8")
    MEASURE.write_text(text[half:], encoding="utf-8")


def run(*arguments: str | Path | int) -> None:
    """Print a `quailora` command and run it as a user would. If it fails, exit with its status."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ {shlex.join(['quailora', *words])}", flush=True)
    executable = Path(sysconfig.get_path("scripts")) / "quailora"
    status = subprocess.run([executable, *words]).returncode
    if status:
        sys.exit(status)


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else fetch()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir(parents=True)
    write_texts()
    length = ("--sequence-length", 512)
    run("init", model, "--data", CALIBRATE, "--output", ADAPTER, "--rank", 64, "--samples", 64, *length)
    run("eval", model, "--adapter", ADAPTER, "--data", MEASURE, "--samples", 16, *length)
    card = (ADAPTER / "README.md").read_text(encoding="utf-8")
    (use,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    print(f"\nThe adapter is in {ADAPTER}, with report.md (results per layer) and README.md (the model card).")
    print("To train or run it, load it on the base it was made for:\n")
    print(textwrap.indent(use.replace("path/to/this/folder", str(ADAPTER)), "    "))


if __name__ == "__main__":
    try:
        main()
    except QuailoraError as error:
        sys.exit(str(error))
