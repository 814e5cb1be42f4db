"""Other initializations as baselines, on the same NF4 base, rank, calibration data and test text.

    python benchmarks/paper/baselines.py --scale small --data roleplay=FILE [...]

QLoRA's zero, PEFT's LoftQ as it is and with its scaling fixed, the SVD of E, EVA and CorDA where they accept the model,
the closed form of CLoQ and QERA (exact), the paper's alternation, and this project's default. Each is computed in its
own process, which measures its time, the time of a bare forward pass over the same data, and its peak memory beyond the
imports. Then it is fine-tuned by study.py, with the same learning rate for all. The options are those of paper.py, and
results are kept in the same way. What fails is shown as failed, with the reason.
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
from benchmarks.paper.initializations import kept, load, lora, making, prepare
from benchmarks.paper.paper import add_arguments, read_study
from benchmarks.paper.study import LORA_ALPHA, Run, Study, settled
from quailora import ops
from quailora.files import to_json, write_files
from quailora.modeling.devices import default_device

BASELINES = ("zero", "loftq", "loftq-scaled", "svd", "eva", "corda", "closed-form", "als", "quailora")


def baselines(study: Study) -> list[Run]:
    (model, *_), name = study.scale.models, study.trained[0]
    return [study.run(model, name, "nf4", kind, name, study.scale.seeds[0]) for kind in BASELINES]


def cost(study: Study, run: Run) -> dict[str, Any]:
    """Compute an initialization. bytes: peak resident memory, less what was resident after the imports."""
    checkpoint = study.checkpoint(run.model)
    calibration = study.calibration(run)
    before = psutil.Process().memory_info().rss
    started = time.perf_counter()
    place = kept(study.work, checkpoint, run.base, run.initialization, calibration, run.rank)
    with making(place) as made:  # again, even if a study has already made it
        prepare(run.initialization, checkpoint, run.base, calibration, lora(run.rank, LORA_ALPHA), run.seed, made)
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    model = load(checkpoint, "bf16")
    batches = list(calibration.batches(max(1, 8192 // run.length)))
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


def costs(study: Study, runs: list[Run], arguments: list[str], retry: bool) -> None:
    """Compute each initialization that needs computing in its own process, unless its cost is recorded."""
    for run in runs:
        found = read_cost(study, run)
        if run.calibrate is None or settled(found, retry):
            continue
        command = [sys.executable, __file__, *arguments, "--make", run.initialization]
        try:
            child = subprocess.run(command, capture_output=True, text=True, timeout=study.scale.patience)
        except subprocess.TimeoutExpired:
            found = {"error": f"not made within {study.scale.patience} s"}
        else:
            said = (child.stderr if child.returncode else child.stdout).strip().splitlines()
            lines = said or [f"ended with status {child.returncode}"]  # killed, perhaps for its memory
            found = {"error": lines[-1][:300]} if child.returncode else json.loads(lines[-1])
        write_files(study.results / "costs", {f"{run.slug}.json": to_json({"run": asdict(run), **found})})
        print(f"{run.initialization}: {found.get('error') or 'made'}", flush=True)


def read_cost(study: Study, run: Run) -> dict[str, Any]:
    """Empty if it has not been measured."""
    return tables.read_json(study.results / "costs" / f"{run.slug}.json") or {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--make", choices=BASELINES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    study = read_study(arguments)
    runs = baselines(study)
    if arguments.make:
        with ops.half_products(default_device(None), [torch.bfloat16]):
            print(json.dumps(cost(study, runs[BASELINES.index(arguments.make)])))
        return
    study.save_index("baselines", runs)
    costs(study, runs, sys.argv[1:], arguments.retry)
    study.run_all([run for run in runs if "error" not in read_cost(study, run)], retry=arguments.retry)
    print(tables.draw("baselines", study.results))


if __name__ == "__main__":
    main()
