"""What `build_adapter` and `initialize` share: the run that both make, the data they read, and the report."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase

from quailora import ops
from quailora.adapters.lora import Target
from quailora.calibration.data import SAMPLES, SEQUENCE_LENGTH, Calibration, load_calibration
from quailora.errors import AdapterError, CalibrationError, CheckpointError, QuailoraError
from quailora.memory.budget import Meter
from quailora.memory.planner import TOKENS_PER_BATCH, Plan
from quailora.modeling.checkpoint import Checkpoint
from quailora.modeling.streamed_model import StreamedModel
from quailora.pipeline.distributed import Processes
from quailora.pipeline.loop import Loop, Solved, Stages
from quailora.quantization.bitsandbytes import Quantization, QuantizedWeight
from quailora.reporting.progress import Progress
from quailora.reporting.report import LayerReport, Report
from quailora.solvers.config import SolverConfig


@dataclass(frozen=True, eq=False)
class Run:
    """One run over a model.

    stream: the full-precision model; W comes in its dtype.
    targets, left: the linears to find factors for, and the other adapted modules with the reason for each.
    form: how the base is quantized.
    """

    stream: StreamedModel
    targets: list[Target]
    left: dict[str, str]
    data: Calibration
    form: Quantization
    solver: SolverConfig
    meter: Meter
    processes: Processes
    stages: Stages = field(default_factory=Stages)

    def plan(self, batch_size: int | None, *, timed: bool = False) -> Plan:
        """The fastest plan within the budget, the same on every process; if `timed`, with an estimate of the time.
        Raises BudgetError."""
        return self.meter.plan(
            self.stream,
            self.targets,
            self.form,
            self.solver,
            self.data,
            self.processes,
            batch_size,
            timed=timed and self.processes.is_main,
        )

    def solve(
        self,
        plan: Plan,
        quantized_weight: Callable[[Target, Tensor], QuantizedWeight],
        finish: Callable[[int, list[Solved]], None],
        *,
        folder: Path,
        finished: Collection[int] = (),
        known: Sequence[LayerReport] = (),
        progress: bool = True,
    ) -> None:
        """Run the loop over all blocks but those in `finished`, whose rows of the report are `known`; see `Loop`."""
        with ExitStack() as stack:
            shown = progress and self.processes.is_main
            bar = stack.enter_context(Progress(enabled=shown, finished=finished, layers=known, estimate=plan.seconds))
            stack.enter_context(self.meter)
            loop = Loop(
                model=self.stream,
                plan=plan,
                solver=self.solver,
                quantized_weight=quantized_weight,
                finish=finish,
                processes=self.processes,
                progress=bar,
                stages=self.stages,
                folder=folder,
            )
            loop.run(self.targets, list(self.processes.shard(self.data).batches(plan.batch_size)), finished)

    def report(self, plan: Plan, layers: list[LayerReport], record: dict[str, Any], *notes: str) -> Report:
        """What was done. Raises AdapterError where no targeted linear received a token."""
        left = self.left | _unreached(self.targets, layers, self.stream)
        every = [*_notes(self.stream, self.data, layers), *notes]
        return Report(layers, left, every, record, self.stages.seconds, self.meter.figures(plan))


def default_quantization(dtype: torch.dtype) -> BitsAndBytesConfig:
    """The paper's: NF4 with double quantization; computing in the dtype of the checkpoint, bf16 where that is fp32."""
    compute = torch.bfloat16 if dtype == torch.float32 else dtype
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )


def default_device(device: str | torch.device | None) -> torch.device:
    """The device named; None is CUDA if there is one, else the CPU. Raises QuailoraError where it cannot be used, or
    has no fp64."""
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, dtype=torch.float64, device=chosen).device
    except (RuntimeError, AssertionError, TypeError) as error:  # torch built without CUDA asserts; MPS has no fp64
        reason = str(error).partition("\n")[0]
        raise QuailoraError(f"device '{chosen}' cannot be used here: {reason}; name another, such as cpu") from error


def default_batch_size(calibration: Calibration) -> int:
    """As many sequences as make about 8192 tokens: enough for matrix products to be efficient, little beside a block's
    weights."""
    return max(1, TOKENS_PER_BATCH // calibration.longest)


def read_calibration(
    source: Checkpoint,
    data: Any,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    samples: int = SAMPLES,
    sequence_length: int | None = None,
    seed: int = 0,
    split: str = "train",
    column: str | None = None,
) -> Calibration:
    """`load_calibration` with the checkpoint's own tokenizer and limits; by default sequences are as long as the model
    has positions, 2048 at most. Raises CalibrationError for sequences it has no positions for."""
    text = source.config.get_text_config(decoder=True)
    positions = getattr(text, "max_position_embeddings", None)
    if sequence_length is None:
        sequence_length = min(SEQUENCE_LENGTH, positions or SEQUENCE_LENGTH)
    if tokenizer is None and not isinstance(data, Calibration | Tensor):
        tokenizer = load_tokenizer(source)
    loaded = load_calibration(
        data,
        tokenizer,
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
        split=split,
        column=column,
        vocab_size=text.vocab_size,
    )
    if positions is not None and loaded.longest > positions:
        raise CalibrationError(
            f"sequences of {loaded.longest} tokens, and the model has {positions} positions: lower sequence_length"
        )
    return loaded


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_tokenizer(source: Checkpoint, adapter: Path | None = None) -> PreTrainedTokenizerBase | None:
    """The tokenizer in the folder `adapter`, where training has saved one, or else the checkpoint's; None where there
    is none. Raises CheckpointError, with the reason, for one that cannot be read: it is damaged, or takes a package
    that is not here, or code of its own."""
    saved = adapter is not None and any((adapter / name).is_file() for name in _TOKENIZER_FILES)
    name, revision = (str(adapter), None) if saved else (source.name, source.revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=source.trust_remote_code)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError) as error:
        if not saved and not any(source.has(each) for each in _TOKENIZER_FILES):
            return None
        raise CheckpointError(
            f"the tokenizer of {name} cannot be read: {type(error).__name__}: {' '.join(str(error).split())[:600]}"
        ) from error
    return tokenizer if len(tokenizer) else None  # transformers makes an empty one where a kind is known but no file


def _unreached(targets: list[Target], layers: list[LayerReport], stream: StreamedModel) -> dict[str, str]:
    """The targets that no factors were found for, with why. Raises AdapterError where none were found at all."""
    inside = {name for block in stream.blocks for name in block.linears()}
    solved = {row.name for row in layers}
    unreached = {
        target.name: "no calibration token reached it"
        if target.name in inside
        else "it stands outside the decoder's blocks"
        for target in targets
        if target.name not in solved
    }
    if not layers:
        raise AdapterError(f"no targeted linear received calibration tokens: {enumerate_reasons(unreached)}")
    return unreached


# A choice. Factors fit what is particular to their tokens too, the more so the fewer there are.
_TOKENS_PER_INPUT = 8


def _notes(stream: StreamedModel, data: Calibration, layers: list[LayerReport]) -> list[str]:
    """What is worth saying once: data that was passed over, or is little; that H took the slow path; and of fused
    expert weights, parameters of three dimensions which bitsandbytes does not quantize."""
    notes = []
    if data.empty:
        notes.append(f"{data.empty} records of {data.source} had no tokens, and were passed over")
    if few := [layer for layer in layers if layer.tokens < _TOKENS_PER_INPUT * layer.inputs]:
        least = min(few, key=lambda layer: layer.tokens / layer.inputs)
        notes.append(
            f"{len(few)} linears saw fewer than {_TOKENS_PER_INPUT} tokens for each of their inputs ({least.name}: "
            f"{least.tokens} tokens, {least.inputs} inputs): on other text more of their error is left than is "
            "reported here; more data would do better"
        )
    gram = ops.backends(stream.device)["gram_"]
    if gram.backend == "reference":
        notes.append(f"H was added up by plain PyTorch, not by the compiled extension: {gram.others['extension']}")
    fused = [
        (name, tuple(parameter.shape))
        for name, parameter in stream.model.named_parameters()
        if parameter.dim() == 3 and any(name.startswith(f"{block.name}.") for block in stream.blocks)
    ]
    if fused:
        name, shape = fused[0]
        notes.append(
            f"{len(fused)} fused expert weights (the first is {name}, {shape}) stay in full precision when "
            "bitsandbytes loads this model: there is no error of theirs to undo, and they are left alone"
        )
    return notes


def enumerate_reasons(reasons: dict[str, str]) -> str:
    if not reasons:
        return "the configuration matches no module"
    name, why = next(iter(reasons.items()))
    return f"{name}: {why}" + (f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else "")
