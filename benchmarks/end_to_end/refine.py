"""What refinement gives and costs, on text of the calibration's kind and of another.

    python benchmarks/end_to_end/refine.py CALIBRATE MEASURE OTHER [--model PATH] [--bits 4 3 2] [--work FOLDER]

The first 64 x 512 tokens of CALIBRATE calibrate, and 16 sequences of at most 512 tokens of MEASURE, a text of its kind,
and of OTHER measure: perplexity, and the KL divergence from the full-precision model, which a disguised training on the
calibration text would not lower. 4 bits are NF4 with double quantization, base and adapter loaded the ordinary way; 3
and 2 are bases in GPTQ's format with calibrated codes, merged with their adapters, in the checkpoint's dtype; to refine
the whole model of those, gptqmodel must be installed.

Costs are those of the whole run, in bare forward passes over the calibration text: of processor time on a CPU, where
other programs may run, and of time on a GPU. Every adapter is made in a process of its own. Adapters are kept in FOLDER
and not made again. --json is written after each row, and rows of other bases that it has already stay.
"""

import argparse
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPTQConfig

import quailora
from benchmarks.common import tables
from benchmarks.common.smollm2 import fetch
from benchmarks.common.timing import keep
from quailora import ops
from quailora.calibration.data import Calibration, CalibrationConfig, read_calibration
from quailora.evaluate import default_batch_size
from quailora.memory.budget import describe_bytes
from quailora.modeling.checkpoint import Checkpoint
from quailora.modeling.devices import default_device
from quailora.quantization.registry import config_for

BASES = {4: "NF4", 3: "int3 g64", 2: "int2 g64"}


def levels(bits: int) -> dict[str, dict[str, Any]]:
    """Name of a row -> options of `build_adapter`, or the row from which `refine` goes on for the whole model. With
    calibrated codes, all but the first are from quantized inputs."""
    rows: dict[str, dict[str, Any]] = {"layer by layer": {} if bits == 4 else {"inputs": "full"}}
    if bits != 4:
        rows["quantized inputs"] = {}
    start = list(rows)[-1]
    return rows | {
        "blocks": {"refine": "blocks"},
        "model": {"start": start},
        "blocks, then model": {"start": "blocks"},
    }


def seconds(run: Callable[[], object]) -> float:
    device = default_device(None)
    clock = process_time if device.type == "cpu" else perf_counter
    start = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def forward(model: Any, data: Calibration) -> None:
    """A bare pass through the decoder."""
    with torch.no_grad(), ops.half_products(model.device, [model.dtype]):
        for batch in data.batches(default_batch_size(data)):
            model.base_model(batch.input_ids.to(model.device), use_cache=False)


def folder_of(work: Path, bits: int, level: str) -> Path:
    return work / f"{bits}-{re.sub(r'[ ,]+', '-', level)}"


def make(checkpoint: Checkpoint, data: Calibration, bits: int, level: str, work: Path) -> dict[str, Any]:
    """The adapter of a row, and its base where that has to be written, in a folder in `work`. Returns what it cost."""
    options, folder = levels(bits)[level], folder_of(work, bits, level)
    costs = folder / "costs.json"
    if not costs.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        before = 0.0
        if "start" in options:
            start = folder_of(work, bits, options["start"])
            before = json.loads((start / "costs.json").read_text())["seconds"]
            run = partial(quailora.refine, start / "adapter", data, folder / "adapter", checkpoint=checkpoint)
        else:
            base: dict[str, Any] = {}
            if bits != 4:
                quantization = GPTQConfig(bits=bits, group_size=64, sym=True, desc_act=False)
                base = {"quantization": quantization, "base_output": folder / "base"}
            run = partial(quailora.build_adapter, checkpoint, None, data, folder / "adapter", **base, **options)
        with ProcessPoolExecutor(1, get_context("spawn")) as alone:  # for the peak is by how much the process grows
            spent = before + alone.submit(seconds, run).result()
        report = json.loads((folder / "adapter" / "report.json").read_text())
        costs.write_text(json.dumps({"seconds": spent, "memory": report["memory"]}))
    found: dict[str, Any] = json.loads(costs.read_text())
    return found


@contextmanager
def deployed(checkpoint: Checkpoint, bits: int, folder: Path, device: torch.device) -> Iterator[Any]:
    """Base and adapter."""
    load = partial(AutoModelForCausalLM.from_pretrained, dtype=checkpoint.dtype, device_map=device)
    if bits == 4:
        base: Any = load(checkpoint.name, quantization_config=config_for("nf4", checkpoint.dtype))
        yield PeftModel.from_pretrained(base, str(folder / "adapter"))
    else:
        with tempfile.TemporaryDirectory() as merged:
            quailora.merge(checkpoint, folder / "adapter", Path(merged) / "model")
            yield load(Path(merged) / "model")


def table(record: Mapping[str, Any]) -> str:
    """Of what --json has written."""
    names = list(record["texts"])
    heads = ["base", "factors", *(f"{name}: {what}" for name in names for what in ("perplexity", "KL"))]
    full = ["full precision", "", *(part for name in names for part in (f"{record['texts'][name]:.2f}", "0"))]
    rows = [(*full, "", "")]
    for row in sorted(record["rows"], key=lambda row: list(BASES.values()).index(row["base"])):
        scores = [text for name in names for text in (f"{row[name][0]:.2f}", f"{row[name][1]:.4f}")]
        memory = describe_bytes(row["memory"]) if "memory" in row else ""
        cost = (f"{row['passes']:.1f}" if "passes" in row else "", memory)
        rows.append((row["base"], row["factors"], *scores, *cost))
    return tables.table((*heads, "forward passes", "peak memory"), rows, left=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calibrate", type=Path)
    parser.add_argument("measure", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 3, 2], choices=(4, 3, 2))
    parser.add_argument("--work", type=Path, help="where adapters are kept; by default they are not")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    checkpoint, device = Checkpoint(arguments.model or fetch()), default_device(None)
    data = read_calibration(checkpoint, arguments.calibrate, CalibrationConfig(samples=64, sequence_length=512))
    texts = {
        path.stem: read_calibration(checkpoint, path, CalibrationConfig(samples=16, sequence_length=512))
        for path in (arguments.measure, arguments.other)
    }
    full: Any = AutoModelForCausalLM.from_pretrained(checkpoint.name, dtype=checkpoint.dtype, device_map=device)
    bare = min(seconds(partial(forward, full, data)) for _ in range(2))
    found = {name: quailora.evaluate.perplexity(full, text.batches(2)) for name, text in texts.items()}
    names = {bits: BASES[bits] for bits in arguments.bits}
    known = tables.read_json(arguments.json) if arguments.json else None
    others = [row for row in (known or {"rows": []})["rows"] if row["base"] not in names.values()]
    record: dict[str, Any] = {"tokens": data.tokens, "forward": bare, "texts": found, "rows": others}

    def score(base: str, factors: str, model: Any, costs: dict[str, Any] | None) -> None:
        row: dict[str, Any] = {"base": base, "factors": factors}
        for name, text in texts.items():
            perplexity = quailora.evaluate.perplexity(model, text.batches(2))
            row[name] = [perplexity, quailora.evaluate.kl_divergence(model, full, text.batches(2))]
        if costs is not None:
            row |= {"passes": costs["seconds"] / bare, "memory": costs["memory"]["measured peak"]}
        record["rows"].append(row)
        print(row, flush=True)

    with ExitStack() as stack:
        work = arguments.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for bits, name in names.items():
            for level, options in levels(bits).items():
                if "start" in options and bits != 4 and find_spec("gptqmodel") is None:
                    print(f"{name}, {level}: gptqmodel is not installed")
                    continue
                costs = make(checkpoint, data, bits, level, work)
                with deployed(checkpoint, bits, folder_of(work, bits, level), device) as model:
                    if bits == 4 and not options:
                        with model.disable_adapter():
                            score(name, "none", model, None)
                    score(name, level, model, costs)
                keep(arguments.json, device, record)
    print(f"\n{table(record)}")


if __name__ == "__main__":
    main()
