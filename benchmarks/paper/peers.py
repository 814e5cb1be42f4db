"""The starts that people have today, side by side: on the same NF4 base, rank, calibration data and test text.

    python benchmarks/paper/peers.py --scale small --data roleplay=FILE [...]

QLoRA's zero, PEFT's LoftQ as it is and with its scaling put right, the SVD of E, EVA and CorDA where they accept the
model, the closed form of CLoQ and QERA (exact), the paper's alternation, and this project's default. Each is made in a
process of its own, which tells its time, that beside a bare forward pass over the same data, and its peak memory over
what the imports take; then it is fine-tuned by study.py, at one learning rate for all. The options are those of
paper.py, and what has run is kept in the same way. What fails is shown as failed, with its reason.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import asdict
from typing import Any

import psutil
import torch

from benchmarks.common import tables
from benchmarks.common.timing import circumstances
from benchmarks.paper.paper import add_arguments, read_study
from benchmarks.paper.starts import kept, load, lora, making, prepare
from benchmarks.paper.study import LORA_ALPHA, Cell, Study, settled
from quailora import ops
from quailora.files import to_json, write_files
from quailora.pipeline.setup import default_device

PEERS = ("zero", "loftq", "loftq-scaled", "svd", "eva", "corda", "closed-form", "als", "quailora")


def peers(study: Study) -> list[Cell]:
    (model, *_), name = study.scale.models, study.trained[0]
    return [study.cell(model, name, "nf4", start, name, study.scale.seeds[0]) for start in PEERS]


def cost(study: Study, cell: Cell) -> dict[str, Any]:
    """Make a start anew. bytes: the peak of resident memory above that after the imports."""
    checkpoint = study.checkpoint(cell.model)
    calibration = study.calibration(cell)
    before = psutil.Process().memory_info().rss
    started = time.perf_counter()
    place = kept(study.work, checkpoint, cell.base, cell.start, calibration, cell.rank)
    with making(place) as made:  # anew, also where a study has made it before
        prepare(cell.start, checkpoint, cell.base, calibration, lora(cell.rank, LORA_ALPHA), cell.seed, made)
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    model = load(checkpoint, "bf16")
    batches = list(calibration.batches(max(1, 8192 // cell.length)))
    passes = []
    with torch.no_grad():
        for _ in range(2):  # the first warms up
            started = time.perf_counter()
            for batch in batches:
                model.base_model(batch.input_ids.to(model.device), use_cache=False)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            passes.append(time.perf_counter() - started)
    return {"seconds": seconds, "forward_seconds": passes[-1], "bytes": peak, "made_with": circumstances()}


def costs(study: Study, cells: list[Cell], arguments: list[str], retry: bool) -> None:
    """Each start that takes any making, in a process of its own, if that has not been done."""
    for cell in cells:
        found = read_cost(study, cell)
        if cell.calibrate is None or settled(found, retry):
            continue
        command = [sys.executable, __file__, *arguments, "--make", cell.start]
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=study.scale.patience)
        except subprocess.TimeoutExpired:
            found = {"error": f"not made within {study.scale.patience} s"}
        else:
            said = (run.stderr if run.returncode else run.stdout).strip().splitlines()
            lines = said or [f"ended with status {run.returncode}"]  # killed, perhaps for its memory
            found = {"error": lines[-1][:300]} if run.returncode else json.loads(lines[-1])
        write_files(study.results / "costs", {f"{cell.slug}.json": to_json({"cell": asdict(cell), **found})})
        print(f"{cell.start}: {found.get('error') or 'made'}", flush=True)


def read_cost(study: Study, cell: Cell) -> dict[str, Any]:
    """Empty where the start was not made yet."""
    return tables.read_json(study.results / "costs" / f"{cell.slug}.json") or {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--make", choices=PEERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    study = read_study(arguments)
    cells = peers(study)
    if arguments.make:
        with ops.half_products(default_device(None), [torch.bfloat16]):
            print(json.dumps(cost(study, cells[PEERS.index(arguments.make)])))
        return
    study.save_index("peers", cells)
    costs(study, cells, sys.argv[1:], arguments.retry)
    study.run([cell for cell in cells if "error" not in read_cost(study, cell)], retry=arguments.retry)
    print(tables.draw("peers", study.results))


if __name__ == "__main__":
    main()
