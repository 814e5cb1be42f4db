"""Whether linears should be fitted on the inputs that they have behind quantized layers.

    python benchmarks/end_to_end/inputs.py CALIBRATE MEASURE OTHER [--model PATH] [--bits 4] [--arms NAME ...]

Every linear is fitted on X, its inputs in the full-precision model ("full"), or on X̂, those that it has where every
linear before it is Q + A Bᵀ already ("quantized"). With X̂ the target may be corrected too, so that the linear undoes
what those before it left (GPTAQ, arXiv 2504.02692; QEP, arXiv 2504.09629): with H = X̂ X̂ᵀ and C = X X̂ᵀ,

    W + α · W (C - H) (H + λ · mean(diag H) · I)⁻¹

takes the place of W. α = 1 is the least squares fit of W X. A Q of integers is rounded from it; NF4 is nearest to W.

The first --samples x 512 tokens of CALIBRATE calibrate. --held-out sequences of at most 512 tokens of MEASURE, a text
of its kind, and of OTHER measure: after each block, the error of its output, relative for each token; and at the end,
perplexity and the KL divergence from the full-precision model. With --depth, the blocks from there on stay in full
precision. Products of A and B are in the model's dtype, as under autocast. It works with blocks like Llama's.

All arms go through a block before the next block, and --json is written after each. Rows of other bases and arms that
it has already stay.
"""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import process_time
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPTQConfig

from benchmarks.common import tables
from benchmarks.common.smollm2 import fetch
from benchmarks.common.timing import keep
from quailora import ops
from quailora.calibration.block import BlockRun, DeployedLinear, in_place
from quailora.calibration.calls import Call
from quailora.calibration.data import Batch, CalibrationConfig, read_calibration
from quailora.calibration.distributed import Processes
from quailora.calibration.hidden_states import HiddenStates
from quailora.calibration.inputs import InputPair
from quailora.modeling.checkpoint import Checkpoint
from quailora.pipeline.quantize import CalibratedQ, solve
from quailora.pipeline.stages import Stages
from quailora.quantization.protocol import QuantizedBase
from quailora.quantization.registry import config_for, from_config
from quailora.quantization.rounding import RoundingConfig
from quailora.refinement.blocks import refine_block
from quailora.refinement.config import RefinementConfig
from quailora.solvers.config import SolverConfig

CPU = torch.device("cpu")
LENGTH = 512
# The linears of a block that share an input, in the order in which they run.
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GROUPS = (ATTENTION, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))


@dataclass(frozen=True)
class Arm:
    """correction: α; None for the inputs of the full-precision model. refine: whether blocks are refined then."""

    correction: float | None = None
    damping: float = 0.1  # λ
    refine: bool = False


ARMS = {
    "full": Arm(),
    "quantized": Arm(0.0),
    "quantized, α = 0.5": Arm(0.5),
    "quantized, α = 1": Arm(1.0),
    "quantized, α = 1, λ = 0.3": Arm(1.0, 0.3),
    "quantized, α = 1, λ = 0.01": Arm(1.0, 0.01),
    "full, then blocks": Arm(refine=True),
    "quantized, α = 0.5, then blocks": Arm(0.5, refine=True),
}

Hidden = list[Tensor]  # (b, t, d), by batch
Inputs = Callable[[int, Hidden], None]  # called with each group and its inputs, before it runs


@dataclass(eq=False)
class Run:
    """An arm on its way: its hidden states of the calibration text and of those measured, and what was found."""

    arm: Arm
    states: Hidden
    held_out: dict[str, Hidden]
    errors: dict[str, list[float]]
    seconds: float = 0.0
    deployed: dict[str, DeployedLinear] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Fit:
    """How W becomes Q + A Bᵀ."""

    base: QuantizedBase
    rank: int

    def __call__(self, weights: dict[str, Tensor], inputs: Hidden, full: Hidden, arm: Arm) -> dict[str, DeployedLinear]:
        """Of linears that share an input X̂ (`inputs`), which is X (`full`) in the full-precision model."""
        pair = InputPair(inputs[0].shape[-1])
        for x, of_full in zip(inputs, full, strict=True):
            pair.update(of_full, x)
        gram, targets = pair.gram, weights
        if arm.correction:
            targets = pair.targets(weights, arm.correction, arm.damping)
        ranks = dict.fromkeys(weights, self.rank)
        if self.base.nearest:
            quantized = {name: self.base.quantize(weight) for name, weight in weights.items()}
            factors = solve(targets, quantized, ranks, gram, SolverConfig(), overwrite=False)
        else:
            found = CalibratedQ(self.base, RoundingConfig(), SolverConfig(), Stages())(
                targets, ranks, gram, overwrite=False
            )
            quantized = {name: each.quantized for name, each in found.items()}
            factors = {name: each.factors for name, each in found.items() if each.factors is not None}
        return {name: DeployedLinear(q.dequantize(), factors[name].A, factors[name].B) for name, q in quantized.items()}


@dataclass(frozen=True, eq=False)
class Block:
    """A decoder block of Llama's kind. rotary: cos and sin (1, t, d) for the longest sequence."""

    module: Any
    rotary: tuple[Tensor, Tensor]

    @property
    def linears(self) -> dict[str, nn.Module]:
        return {name: self.module.get_submodule(name) for names in GROUPS for name in names}

    def run(self, states: Hidden, deployed: Mapping[str, DeployedLinear], inputs: Inputs = lambda *_: None) -> Hidden:
        """The block's outputs with what is `deployed` of its linears; `inputs` may add to it for the group to come."""
        block = self.module
        normed = [block.input_layernorm(hidden) for hidden in states]
        inputs(0, normed)
        before = [self._attention(x, deployed) for x in normed]
        inputs(1, before)
        states = [hidden + self._linear(GROUPS[1][0], x, deployed) for hidden, x in zip(states, before, strict=True)]
        normed = [block.post_attention_layernorm(hidden) for hidden in states]
        inputs(2, normed)
        gate, up = (partial(self._linear, name, deployed=deployed) for name in GROUPS[2])
        before = [block.mlp.act_fn(gate(x)) * up(x) for x in normed]
        inputs(3, before)
        return [hidden + self._linear(GROUPS[3][0], x, deployed) for hidden, x in zip(states, before, strict=True)]

    def _attention(self, x: Tensor, deployed: Mapping[str, DeployedLinear]) -> Tensor:
        """What goes into o_proj."""
        attention, seen = self.module.self_attn, []
        hook = attention.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        some = {name: each.computing_in(x.dtype) for name, each in deployed.items() if name in ATTENTION}
        with in_place(self.linears, some):
            attention(hidden_states=x, position_embeddings=self._rotary(x), attention_mask=None)
        hook.remove()
        return seen[0]

    def _rotary(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(part[:, : x.shape[1]] for part in self.rotary)

    def _linear(self, name: str, x: Tensor, deployed: Mapping[str, DeployedLinear]) -> Tensor:
        if name in deployed:
            return deployed[name].computing_in(x.dtype).forward(x, None)
        output: Tensor = self.module.get_submodule(name)(x)
        return output

    def refined(
        self, deployed: dict[str, DeployedLinear], batches: Sequence[Batch], states: Hidden, targets: Hidden, index: int
    ) -> dict[str, DeployedLinear]:
        inputs, outputs = HiddenStates(CPU), HiddenStates(CPU)
        for number, pair in enumerate(zip(states, targets, strict=True)):
            inputs[number], outputs[number] = pair
        calls = [Call((), {"position_embeddings": self._rotary(x), "attention_mask": None}) for x in states]
        run = BlockRun(self.module, CPU, states[0].dtype, batches, calls)
        settings = RefinementConfig(), Processes()
        return refine_block(run, self.linears, deployed, inputs, outputs, *settings, name=str(index), seed=index)[0]


def advance(
    run: Run, block: Block, fit: Fit, full: list[Hidden], batches: Sequence[Batch], targets: Hidden, index: int
) -> None:
    """Fit a block, and move on to the next. full: the inputs of each group in the full-precision model. targets: what
    the full-precision block gives."""
    deployed: dict[str, DeployedLinear] = {}
    weights = {name: module.get_parameter("weight").data for name, module in block.linears.items()}

    def inputs(group: int, xs: Hidden) -> None:
        deployed.update(fit({name: weights[name] for name in GROUPS[group]}, xs, full[group], run.arm))

    after = run.states
    if run.arm.correction is not None:
        after = block.run(run.states, deployed, inputs)
    else:
        for group, xs in enumerate(full):
            inputs(group, xs)
    if run.arm.refine:
        deployed = block.refined(deployed, batches, run.states, targets, index)
        after = block.run(run.states, deployed)
    run.states, run.deployed = after, deployed


def error(outputs: Hidden, full: Hidden) -> float:
    """The root of the mean over tokens of the relative squared error."""
    parts = []
    for output, target in zip(outputs, full, strict=True):
        sizes = target.float().square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
        squares = (output.float() - target.float()).square().sum(-1) / sizes
        parts.append(squares.flatten())
    return math.sqrt(torch.cat(parts).mean().item())


def score(model: Any, batches: Sequence[Batch], hidden: Hidden, full: Hidden) -> tuple[float, float]:
    """Perplexity, and KL from the full-precision model, from the hidden states after the last block."""
    loss = divergence = count = 0.0
    for batch, states in zip(batches, zip(hidden, full, strict=True), strict=True):
        found, reference = (model.lm_head(model.model.norm(each))[0, :-1].float().log_softmax(-1) for each in states)
        loss -= found.gather(1, batch.input_ids[0, 1:, None]).double().sum().item()
        divergence += (reference.exp() * (reference - found)).sum(-1).double().sum().item()
        count += len(found)
    return math.exp(loss / count), divergence / count


def table(record: Mapping[str, Any]) -> str:
    """Of what --json has written: errors after as many blocks as a row has, and scores of those with the most."""
    names = record["texts"]
    depths = sorted({len(row["errors"][names[0]]) for row in record["rows"]})
    rows = []
    for row in record["rows"]:
        cells = []
        for name in names:
            errors = row["errors"][name]
            cells += [f"{errors[depth - 1]:.4f}" if depth <= len(errors) else "" for depth in depths]
            scored = row["scores"] and len(errors) == depths[-1]
            cells += [f"{row['scores'][name][i]:.{2 + 2 * i}f}" if scored else "" for i in (0, 1)]
        rows.append((row["base"], row["inputs"], *cells))
    figures = (*(f"error after {depth} blocks" for depth in depths), "perplexity", "KL")
    return tables.table(
        ("base", "inputs", *(f"{name}: {figure}" for name in names for figure in figures)), rows, left=2
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calibrate", type=Path)
    parser.add_argument("measure", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--bits", type=int, default=4, choices=(4, 3, 2))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--held-out", type=int, default=16)
    parser.add_argument("--depth", type=int, help="how many blocks are quantized; by default all")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    checkpoint = Checkpoint(arguments.model or fetch())
    read = partial(read_calibration, checkpoint)
    data = read(arguments.calibrate, CalibrationConfig(samples=arguments.samples, sequence_length=LENGTH))
    batches = [batch for batch in data.batches(4) if batch.keep is None]
    held_out = CalibrationConfig(samples=arguments.held_out, sequence_length=LENGTH)
    texts = {path.stem: list(read(path, held_out).batches(1)) for path in (arguments.measure, arguments.other)}
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint.name, dtype=checkpoint.dtype).eval()
    model.requires_grad_(False)
    if arguments.bits == 4:
        name, base = "NF4", from_config(config_for("nf4", checkpoint.dtype))
    else:
        name = f"int{arguments.bits} g64"
        base = from_config(GPTQConfig(bits=arguments.bits, group_size=64, sym=True, desc_act=False))
        base = base.loaded_in(checkpoint.dtype)
    fit = Fit(base, arguments.rank)
    layers = model.model.layers
    depth = min(arguments.depth or len(layers), len(layers))

    def embed(some: Sequence[Batch]) -> Hidden:
        return [model.model.embed_tokens(batch.input_ids) for batch in some]

    states, outputs = embed(batches), {text: embed(some) for text, some in texts.items()}
    rotary = model.model.rotary_emb(states[0][:1], torch.arange(LENGTH)[None])
    runs = {
        each: Run(
            ARMS[each],
            list(states),
            {text: list(hidden) for text, hidden in outputs.items()},
            {text: [] for text in texts},
        )
        for each in arguments.arms
    }
    known = tables.read_json(arguments.json) if arguments.json else None
    others = [
        row
        for row in (known or {"rows": []})["rows"]
        if (row["base"], row["inputs"]) not in {(name, each) for each in runs}
    ]

    def write(scores: dict[str, Any]) -> dict[str, Any]:
        rows = [
            {"base": name, "inputs": each, "seconds": run.seconds, "errors": run.errors, "scores": scores.get(each)}
            for each, run in runs.items()
        ]
        record = {"tokens": data.tokens, "texts": list(texts), "rows": [*others, *rows]}
        keep(arguments.json, CPU, record)
        return record

    with ops.half_products(CPU, [checkpoint.dtype]):
        for index, layer in enumerate(layers[:depth]):
            block = Block(layer, rotary)
            full: list[Hidden] = []
            states = block.run(states, {}, lambda _, xs, full=full: full.append(xs))  # type: ignore[misc]
            outputs = {text: block.run(hidden, {}) for text, hidden in outputs.items()}
            for each, run in runs.items():
                start = process_time()
                advance(run, block, fit, full, batches, states, index)
                run.seconds += process_time() - start
                for text, target in outputs.items():
                    run.held_out[text] = block.run(run.held_out[text], run.deployed)
                    run.errors[text].append(error(run.held_out[text], target))
                print(
                    index,
                    each,
                    *(f"{errors[-1]:.5f}" for errors in run.errors.values()),
                    f"{run.seconds:.0f} s",
                    flush=True,
                )
            write({})
        for layer in layers[depth:]:
            block = Block(layer, rotary)
            outputs = {text: block.run(hidden, {}) for text, hidden in outputs.items()}
            for run in runs.values():
                run.held_out = {text: block.run(hidden, {}) for text, hidden in run.held_out.items()}
        scores = {
            each: {text: score(model, texts[text], run.held_out[text], outputs[text]) for text in texts}
            for each, run in runs.items()
        }
    print(f"\n{table(write(scores))}")


if __name__ == "__main__":
    main()
