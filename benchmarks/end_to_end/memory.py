"""Whether a memory budget is kept: a model much larger than the budget is initialized within it.

    python benchmarks/end_to_end/memory.py [--size 3b|7b-blocks|tiny] [--budget 1.5GiB ...] [--samples 4]

The model is a Llama with random weights, written block by block, so neither this script nor quailora ever holds all of
it. `quailora.build_adapter` runs once for each budget, in a separate process, on a GPU if there is one. Measured are
the seconds of each stage, and the peak of torch's allocator on a GPU, or else of resident memory above its level after
the imports, which takes Linux's /proc.
"""

import argparse
import json
import multiprocessing
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

import quailora
from benchmarks.common.timing import describe
from quailora.calibration.data import Calibration
from quailora.memory.budget import describe_bytes, peak_resident, reset_peak
from quailora.modeling.devices import default_device
from quailora.pipeline.build import ALPHA, RANK

TARGETS = "all-linear"


@dataclass(frozen=True)
class Size:
    """The shape of a Llama."""

    hidden: int
    inner: int
    blocks: int
    heads: int
    groups: int  # key-value heads
    vocabulary: int


# 3b has the shapes of Llama-3.2-3B, except for a smaller vocabulary; 7b-blocks is four blocks of Llama-2-7B.
SIZES = {
    "3b": Size(3072, 8192, 28, 24, 8, 32000),
    "7b-blocks": Size(4096, 11008, 4, 32, 32, 32000),
    "tiny": Size(256, 768, 4, 4, 2, 512),
}


def write_model(folder: Path, size: Size) -> int:
    """Write a checkpoint of random bf16 weights, one file per block. Returns the number of parameters."""
    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.blocks,
        num_attention_heads=size.heads,
        num_key_value_heads=size.groups,
        vocab_size=size.vocabulary,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
        architectures=["LlamaForCausalLM"],
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    narrow = size.hidden // size.heads * size.groups
    shapes = {
        "self_attn.q_proj": (size.hidden, size.hidden),
        "self_attn.k_proj": (narrow, size.hidden),
        "self_attn.v_proj": (narrow, size.hidden),
        "self_attn.o_proj": (size.hidden, size.hidden),
        "mlp.gate_proj": (size.inner, size.hidden),
        "mlp.up_proj": (size.inner, size.hidden),
        "mlp.down_proj": (size.hidden, size.inner),
    }
    ones = torch.ones(size.hidden, dtype=torch.bfloat16)
    device = default_device(None)  # many times faster than a CPU at drawing
    generator = torch.Generator(device).manual_seed(0)
    places: dict[str, str] = {}
    parameters = 0
    for index in range(size.blocks + 1):
        tensors: dict[str, Tensor] = {}
        if index == size.blocks:
            embeddings = torch.randn(size.vocabulary, size.hidden, generator=generator, device=device)
            tensors = {"model.embed_tokens.weight": embeddings.bfloat16().cpu(), "model.norm.weight": ones.clone()}
        else:
            for name, (rows, columns) in shapes.items():
                weight = torch.randn(rows, columns, generator=generator, device=device).mul_(columns**-0.5)
                tensors[f"model.layers.{index}.{name}.weight"] = weight.bfloat16().cpu()
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"model.layers.{index}.{norm}.weight"] = ones.clone()
        file = f"model-{index + 1:05}-of-{size.blocks + 1:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        parameters += sum(tensor.numel() for tensor in tensors.values())
    index_file = {"metadata": {"total_size": 2 * parameters}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))
    return parameters


def measure(
    model: Path,
    samples: int,
    length: int,
    rank: int,
    targets: str | Sequence[str],
    budget: str,
    batch_size: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Initialize an adapter, with more `options` of `build_adapter`, and discard it. Returns the bytes "measured" (the
    growth of the peak), "planned" and "budget", and the seconds of "stages"."""
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    tokens = torch.randint(0, vocabulary, (samples, length), generator=torch.Generator().manual_seed(0))
    targets = targets if isinstance(targets, str) else list(targets)
    lora = LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM")
    on_gpu = default_device(options.get("device")).type == "cuda"
    with tempfile.TemporaryDirectory(dir=model.parent) as folder:
        if not on_gpu:
            reset_peak()
        start = psutil.Process().memory_info().rss
        data = Calibration(tuple(tokens), "random tokens")
        report = quailora.build_adapter(
            model,
            lora,
            data,
            Path(folder) / "adapter",
            memory_budget=budget,
            batch_size=batch_size,
            progress=False,
            **options,
        )
    measured = report.memory["measured peak"] if on_gpu else peak_resident() - start
    return {
        "measured": measured,
        "planned": report.memory["planned peak"],
        "budget": report.memory["budget"],
        "stages": report.stages,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="3b")
    parser.add_argument("--budget", nargs="+", default=["1.5GiB"])
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--rank", type=int, default=RANK)
    parser.add_argument("--refine", help="blocks, to refine them")
    parser.add_argument("--model", type=Path, help="folder of the model, which is kept there; by default it is deleted")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()

    temporary = None if arguments.model else tempfile.mkdtemp()
    model = arguments.model or Path(temporary or "") / "model"
    try:
        if not (model / "model.safetensors.index.json").exists():
            parameters = write_model(model, SIZES[arguments.size])
            print(f"{parameters / 1e9:.3g} billion parameters, {describe_bytes(2 * parameters)}")
        settings = (arguments.samples, arguments.sequence_length, arguments.rank, TARGETS)
        found = {}
        for budget in arguments.budget:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found[budget] = pool.apply(measure, (model, *settings, budget), {"refine": arguments.refine})
    finally:
        if temporary:
            shutil.rmtree(temporary)

    tokens = f"{arguments.samples} x {arguments.sequence_length} tokens"
    print(f"\n{arguments.size}, {tokens}, rank {arguments.rank}, {describe(default_device(None))}\n")
    stages = list(dict.fromkeys(stage for each in found.values() for stage in each["stages"]))
    print(f"| budget | planned | measured | of the budget | {' | '.join(f'{stage}, s' for stage in stages)} | all, s |")
    print(f"| {' | '.join(['---:'] * (5 + len(stages)))} |")
    for budget, each in found.items():
        seconds = [each["stages"].get(stage, 0.0) for stage in stages]
        cells = [budget, describe_bytes(each["planned"]), describe_bytes(each["measured"])]
        cells += [f"{each['measured'] / each['budget']:.0%}", *(f"{s:.1f}" for s in [*seconds, sum(seconds)])]
        print(f"| {' | '.join(cells)} |")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
