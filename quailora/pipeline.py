"""The method, end to end: checkpoint -> blocks -> activations -> H -> Q -> factors -> adapter -> report."""

from __future__ import annotations

import copy
import math
import platform
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from json import JSONDecodeError
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase

import quailora
from quailora import adapter as adapters
from quailora.activations import Call, Calls, collect
from quailora.adapter import Target
from quailora.blocks import Block, StreamedModel, linear_weight
from quailora.calibration import SAMPLES, SEQUENCE_LENGTH, Calibration, load_calibration
from quailora.checkpoint import Checkpoint
from quailora.errors import AdapterError, CalibrationError, CheckpointError, MismatchError, QuailoraError
from quailora.progress import Progress
from quailora.quantized import Quantization, QuantizedWeight, quantization_of, quantize, read
from quailora.report import LayerReport, Report, model_card, write_files
from quailora.solvers import Linear, LoraFactors, check_solver, solve_group

# By benchmarks/damping.py: the least perplexity on held-out text, with much and with little data. See docs/using.md.
DEFAULT_DAMPING = 1e-4
RANK, ALPHA = 64, 16
TOKENS_PER_BATCH = 8192


@dataclass(frozen=True)
class Settings:
    """What the solver is told. See `quailora.solve`. Raises SolverError for what it does not take."""

    solver: str = "krylov"
    iterations: int | None = None
    damping: float = DEFAULT_DAMPING
    seed: int = 0

    def __post_init__(self) -> None:
        check_solver(self.solver, self.iterations, self.damping)


@dataclass
class Stages:
    """Seconds spent by stage. On CUDA, work that is queued in one stage may be waited for in another."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - start


def run(
    model: StreamedModel,
    targets: list[Target],
    calibration: Calibration,
    quantized_weight: Callable[[Target, Tensor], QuantizedWeight],
    accept: Callable[[Target, LoraFactors], None],
    settings: Settings,
    progress: Progress,
    stages: Stages,
    batch_size: int | None = None,
) -> tuple[list[LayerReport], dict[str, str]]:
    """Solve for every target; the rows of the report, and the targets that could not be reached with why.

    quantized_weight: gives the Q of a target, for its full-precision weight (m, n).
    accept: takes the factors of a target.
    """
    layers: list[LayerReport] = []
    inside = {name for block in model.blocks for name in block.linears()}
    outside = {t.name: "it stands outside the decoder's blocks" for t in targets if t.name not in inside}
    waiting = {target.name: target for target in targets if target.name in inside}
    batches = list(calibration.batches(batch_size or default_batch_size(calibration)))
    states: list[Tensor] = []
    calls: list[list[Call]] = []
    # A caller's autocast must not reach the full-precision forward pass, nor H.
    with torch.no_grad(), torch.autocast(model.device.type, enabled=False), _memory_errors(model.device):
        with stages("load"), model.resident(*model.outside_blocks()):
            recorder = Calls(model)
            for batch in batches:
                hidden, of_batch = recorder.record(batch)
                states.append(hidden.cpu())
                calls.append(of_batch)

        for index, block in enumerate(progress.blocks(model.blocks)):
            if not waiting:
                break
            with _resident(model, block, stages):
                linears = {name: linear for name, linear in block.linears().items() if name in waiting}
                with stages("forward"), collect(linears) as collector:
                    for number, batch in enumerate(batches):
                        keep = None if batch.keep is None else batch.keep.to(model.device)
                        with collector.batch(keep):
                            hidden = calls[number][index].run(block.module, states[number].to(model.device))
                        states[number] = hidden.cpu()
                for gram, names in collector.groups():
                    if gram.tokens == 0:
                        continue
                    group = [waiting.pop(name) for name in names]
                    weights = [linear_weight(linears[name]) for name in names]
                    start = perf_counter()
                    with stages("quantise"):
                        quantized = [quantized_weight(*each) for each in zip(group, weights, strict=True)]
                    with stages("solve"):
                        factors = solve_group(
                            [
                                Linear(weight, q, target.rank, target.name)
                                for target, weight, q in zip(group, weights, quantized, strict=True)
                            ],
                            gram,
                            solver=settings.solver,
                            iterations=settings.iterations,
                            damping=settings.damping,
                            seed=settings.seed,
                            overwrite_weights=True,  # the block has run
                        )
                        for target, found in zip(group, factors, strict=True):
                            accept(target, found)
                    seconds = (perf_counter() - start) / sum(weight.numel() for weight in weights)
                    for target, weight, found in zip(group, weights, factors, strict=True):
                        layers.append(_row(target, found, gram.tokens, seconds * weight.numel()))
                        progress.layer(layers[-1])
    return layers, outside | dict.fromkeys(waiting, "no calibration token reached it")


def _row(target: Target, factors: LoraFactors, tokens: int, seconds: float) -> LayerReport:
    return LayerReport(
        name=target.name,
        outputs=len(factors.A),
        inputs=len(factors.B),
        rank=target.rank,
        tokens=tokens,
        weight_error=factors.error_norm,
        weight_error_after=factors.residual_norm,
        output_error=math.sqrt(2 * factors.initial / tokens),
        output_error_after=math.sqrt(2 * factors.objective / tokens),
        jitter=factors.jitter,
        seconds=seconds,
    )


@contextmanager
def _memory_errors(device: torch.device) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise QuailoraError(
            f"{device} is out of memory: lower batch_size (--batch-size 1) or sequence_length (--sequence-length). "
            f"{' '.join(str(error).split())[:200]}"
        ) from error


@contextmanager
def _resident(model: StreamedModel, block: Block, stages: Stages) -> Iterator[None]:
    with ExitStack() as stack:
        with stages("load"):
            stack.enter_context(model.resident(f"{block.name}."))
        yield


def build_adapter(
    checkpoint: str | Path | Checkpoint,
    lora_config: LoraConfig | None,
    calibration: Any,
    output_dir: str | Path,
    *,
    quantization: BitsAndBytesConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    solver: str = "krylov",
    iterations: int | None = None,
    damping: float = DEFAULT_DAMPING,
    samples: int = SAMPLES,
    sequence_length: int | None = None,
    split: str = "train",
    column: str | None = None,
    batch_size: int | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Report:
    """Make a PEFT adapter whose A and B undo most of the quantisation error of `checkpoint`; the whole model is never
    in memory.

    Args:
        checkpoint: the full-precision model: a folder with safetensors, or an id on the Hugging Face hub.
        lora_config: any LoRA configuration PEFT takes; None is the paper's (r 64, alpha 16, all linear layers).
        calibration: text file, JSON or JSONL, data set name, strings, records, token tensors, DataLoader: see
            `quailora.calibration.load_calibration`.
        output_dir: the adapter's folder, new or empty: adapter, `report.json`, `report.md`, `quailora.json` and a model
            card.
        quantization: how the base will be loaded; None is NF4 with double quantisation, computing in the checkpoint's
            dtype.
        tokenizer: None takes the checkpoint's own.
        solver, iterations, damping: see `quailora.solve`.
        samples, sequence_length, seed: how much calibration data is taken, and the seed of the draw.
        split, column: of a data set, where they are not the usual ones.
        batch_size: sequences in one forward pass; None takes as many as make about 8192 tokens.
        dtype: what the base's weights are loaded as before they are quantised; None is what transformers takes by
            itself.
        device: where to compute; None is CUDA if there is one, else the CPU.
        progress: whether to draw a progress bar.

    Returns:
        The report that is also in `output_dir`.

    Raises:
        QuailoraError: bad input of any kind, before anything is computed where that can be known.
    """
    output = Path(output_dir)
    adapters.check_new_folder(output)
    settings = Settings(solver, iterations, damping, seed)
    source = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint)
    dtype = dtype or source.dtype
    config = copy.deepcopy(lora_config) or LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    adapters.check_config(config)
    quantization = quantization or default_quantization(dtype)
    form = Quantization.from_config(quantization)

    base = adapters.quantized_skeleton(source, quantization, dtype)
    model = adapters.adapted_skeleton(base, config, source)
    targets, left = adapters.find_targets(model)
    if not targets:
        raise AdapterError(f"no quantised linear is targeted: {_enumerate(left)}")
    stream = StreamedModel(source, default_device(device), dtype)
    adapters.check_can_be_saved(model, stream)
    data = read_calibration(
        source,
        calibration,
        tokenizer=tokenizer,
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
        split=split,
        column=column,
    )

    stages = Stages()
    with Progress(len(stream.blocks), enabled=progress) as bar, adapters.new_folder(output) as folder:
        layers, unreached = run(
            stream,
            targets,
            data,
            lambda target, weight: quantize(weight, form),
            lambda target, factors: target.assign(factors, seed),
            settings,
            bar,
            stages,
            batch_size,
        )
        _check_some(layers, unreached)
        with stages("write"):
            adapters.fill_rest(model, stream, seed)
            model.save_pretrained(str(folder), save_embedding_layers=False)
        record = make_record(source, dtype, form, settings, data, config)
        report = Report(layers, left | unreached, _notes(stream), record, stages.seconds)
        report.save(folder)
        write_files(folder, {"README.md": model_card(record, report)})
    return report


def initialize(
    peft_model: PeftModel,
    calibration: Any,
    *,
    checkpoint: str | Path | Checkpoint,
    tokenizer: PreTrainedTokenizerBase | None = None,
    solver: str = "krylov",
    iterations: int | None = None,
    damping: float = DEFAULT_DAMPING,
    samples: int = SAMPLES,
    sequence_length: int | None = None,
    split: str = "train",
    column: str | None = None,
    batch_size: int | None = None,
    adapter: str = "default",
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Report:
    """Give a PeftModel over a 4-bit or 8-bit base its starting A and B, in place.

    Q is read from the loaded model, so a base that came from an already quantised checkpoint will do; W comes from
    `checkpoint`, block by block. Modules that cannot be initialised keep the LoRA default and are named in the report.
    The model is changed only once all factors are found: an error leaves it as it was. `Report.save(folder)` puts the
    record of the base beside an adapter you save.

    Args:
        peft_model: `get_peft_model(base, LoraConfig(...))`.
        checkpoint: the full-precision checkpoint that the base was quantised from.
        adapter: the name of the adapter within `peft_model`.
        device: where to compute; None is where the model is.
        Others as in `build_adapter`.

    Raises:
        MismatchError: the base is not a quantisation of `checkpoint`.
        QuailoraError: other bad input.
    """
    if not isinstance(peft_model, PeftModel):
        raise AdapterError(
            f"initialize takes a PeftModel, got {type(peft_model).__name__}: wrap the model with peft.get_peft_model"
        )
    if adapter not in peft_model.peft_config:
        raise AdapterError(f"the model has no adapter '{adapter}', only {', '.join(peft_model.peft_config)}")
    settings = Settings(solver, iterations, damping, seed)
    config = adapters.check_config(peft_model.peft_config[adapter])
    targets, left = adapters.find_targets(peft_model, adapter)
    if not targets:
        raise AdapterError(f"no quantised linear is targeted: {_enumerate(left)}; is the base loaded in 4 or 8 bits?")
    source = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint)
    stream = StreamedModel(source, default_device(device or targets[0].base.weight.device), source.dtype)
    _check_shapes(peft_model, targets, stream)
    data = read_calibration(
        source,
        calibration,
        tokenizer=tokenizer,
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
        split=split,
        column=column,
    )

    base_config: Any = peft_model.get_base_model().config
    dtype = base_config.dtype or source.dtype

    def held(target: Target, weight: Tensor) -> QuantizedWeight:
        quantized = read(target.base)
        _check_belongs(target, weight, quantized, dtype)
        return quantized

    found: list[tuple[Target, LoraFactors]] = []

    def keep(target: Target, factors: LoraFactors) -> None:
        found.append((target, replace(factors, A=factors.A.cpu(), B=factors.B.cpu())))

    stages = Stages()
    with Progress(len(stream.blocks), enabled=progress) as bar:
        layers, unreached = run(stream, targets, data, held, keep, settings, bar, stages, batch_size)
    _check_some(layers, unreached)
    for target, factors in found:
        target.assign(factors, seed)
    whole = getattr(base_config, "quantization_config", None)
    skipped = Quantization.from_config(whole).skip_modules if isinstance(whole, BitsAndBytesConfig) else None
    form = replace(quantization_of(targets[0].base), skip_modules=skipped)
    record = make_record(source, dtype, form, settings, data, config)
    return Report(layers, left | unreached, _notes(stream), record, stages.seconds)


def default_quantization(dtype: torch.dtype) -> BitsAndBytesConfig:
    """The paper's: NF4 with double quantisation; computing in the dtype of the checkpoint, bf16 where that is fp32."""
    compute = torch.bfloat16 if dtype == torch.float32 else dtype
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )


def make_record(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    form: Quantization,
    settings: Settings,
    data: Calibration,
    config: LoraConfig,
) -> dict[str, Any]:
    """What an adapter was made for and how: the base it belongs to, the solver, the data, the versions. Plain JSON."""
    return {
        "quailora": quailora.__version__,
        "base": {
            "checkpoint": checkpoint.name,
            "revision": checkpoint.revision,
            "fingerprint": checkpoint.fingerprint,
            "dtype": str(dtype).removeprefix("torch."),
            "quantization": form.to_dict(),
        },
        "solver": {
            "name": settings.solver,
            "iterations": settings.iterations,
            "damping": settings.damping,
            "seed": settings.seed,
        },
        "calibration": {
            "source": data.source,
            "samples": len(data),
            "tokens": data.tokens,
            "sequence_length": data.longest,
            "seed": data.seed,
            "fingerprint": data.fingerprint(),
        },
        "lora": {"r": config.r, "alpha": config.lora_alpha, "use_rslora": config.use_rslora},
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
    }


def default_device(device: str | torch.device | None) -> torch.device:
    """The device named; None is CUDA if there is one, else the CPU. Raises QuailoraError where it cannot be used."""
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=chosen).device
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
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


def load_tokenizer(source: Checkpoint) -> PreTrainedTokenizerBase | None:
    """The checkpoint's tokenizer, None where it has none. Raises CheckpointError for one that cannot be read."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.name, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
    except (JSONDecodeError, LookupError, TypeError, AttributeError, ImportError) as error:
        raise CheckpointError(
            f"the tokenizer of {source.name} cannot be read: {' '.join(repr(error).split())[:300]}; fetch it again"
        ) from error
    except (OSError, ValueError):  # what transformers says where there is no file of a tokenizer
        return None
    return tokenizer if len(tokenizer) else None  # transformers makes an empty one where a kind is known but no file


_GIVE_THE_SAME = "give the full-precision checkpoint that the base was made from"


def _check_shapes(model: PeftModel, targets: list[Target], stream: StreamedModel) -> None:
    """A base of another depth or width than the checkpoint's model was not made from it, which can be told at once."""
    config: Any = model.get_base_model().config
    depth = config.get_text_config(decoder=True).num_hidden_layers
    if depth != len(stream.blocks):
        raise MismatchError(
            f"the loaded base has {depth} blocks, and {stream.checkpoint.name} has {len(stream.blocks)}: "
            f"{_GIVE_THE_SAME}"
        )
    linears = {name: linear for block in stream.blocks for name, linear in block.linears().items()}
    for target in targets:
        held = (target.base.out_features, target.base.in_features)
        if target.name in linears and held != (shape := tuple(linear_weight(linears[target.name]).shape)):
            raise MismatchError(
                f"{target.name} is {held} in the loaded base and {shape} in {stream.checkpoint.name}: {_GIVE_THE_SAME}"
            )


def _check_belongs(target: Target, weight: Tensor, quantized: QuantizedWeight, dtype: torch.dtype) -> None:
    """The codes of the loaded base are those of the checkpoint's own weight, but for ties that devices round apart. A
    fine-tune of the same model, and a base model against its instruct version, differ in many."""
    expected = quantize(weight.to(dtype), quantization_of(target.base)).codes
    same = float((expected == quantized.codes.to(expected.device)).float().mean())
    if same < 0.99:
        raise MismatchError(
            f"the loaded base is not a quantisation of this checkpoint: {same:.1%} of the codes of {target.name} are "
            f"those of its weight; {_GIVE_THE_SAME}"
        )


def _check_some(layers: list[LayerReport], unreached: dict[str, str]) -> None:
    if not layers:
        raise AdapterError(f"no targeted linear received calibration tokens: {_enumerate(unreached)}")


def _notes(stream: StreamedModel) -> list[str]:
    """Fused expert weights are parameters of three dimensions, which bitsandbytes does not quantise: worth saying
    once."""
    fused = [
        (name, tuple(parameter.shape))
        for name, parameter in stream.model.named_parameters()
        if parameter.dim() == 3 and any(name.startswith(f"{block.name}.") for block in stream.blocks)
    ]
    if not fused:
        return []
    name, shape = fused[0]
    return [
        f"{len(fused)} fused expert weights (the first is {name}, {shape}) stay in full precision when bitsandbytes "
        "loads this model: there is no error of theirs to undo, and they are left alone"
    ]


def _enumerate(reasons: dict[str, str]) -> str:
    if not reasons:
        return "the configuration matches no module"
    name, why = next(iter(reasons.items()))
    return f"{name}: {why}" + (f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else "")
