"""How good a model is on held-out tokens: perplexity, and KL divergence from the full-precision model.

In a sequence of t tokens, tokens 2 to t are each predicted from those before them. Padding never counts.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils.quantization_config import QuantizationConfigMixin

from quailora import ops
from quailora.adapters.base_record import as_recorded, check_base, for_full_precision, loading, record_of
from quailora.adapters.correction import Correction, saved_adapter
from quailora.adapters.new_tokens import resize_to, vocabulary
from quailora.adapters.quantized_checkpoint import QuantizedCheckpoint
from quailora.adapters.save_and_load import loading_by_peft
from quailora.adapters.saved_adapter import check_weights
from quailora.calibration.data import Batch, Calibration, load_calibration
from quailora.errors import AdapterError, CalibrationError, MismatchError, QuailoraError
from quailora.files import to_json, write_files
from quailora.memory.budget import memory_errors
from quailora.memory.planner import TOKENS_PER_BATCH
from quailora.modeling.checkpoint import Checkpoint
from quailora.modeling.devices import default_device, without_torch_modes
from quailora.modeling.loading import load_model
from quailora.modeling.streamed_model import StreamedModel
from quailora.quantization.registry import evaluating, from_config
from quailora.refinement.student import predicted
from quailora.reporting.markdown import count
from quailora.reporting.record import read_record, was_trained

# Logits that are in fp32 at a time: 256 MiB for each of the few tensors that scoring takes.
LOGITS_AT_ONCE = 1 << 26

Batches = Iterable[Batch | Tensor]


@dataclass(frozen=True)
class Scores:
    """Means over the predicted tokens."""

    name: str
    perplexity: float  # e to the mean negative log-likelihood
    kl: float  # KL(full precision || this), in nats


@dataclass(frozen=True)
class Comparison:
    """What quantization costs, and how much of that an adapter recovers, over `tokens` predicted tokens."""

    full: Scores
    quantized: Scores
    adapted: Scores | None
    tokens: int
    untrained: bool = True  # whether the adapter is as quailora initialized it
    notes: tuple[str, ...] = ()  # what to know about the scores

    @property
    def gap_closed(self) -> float | None:
        """See the function `gap_closed`. None without an adapter, and for a trained one, which learned more."""
        if self.adapted is None or not self.untrained:
            return None
        return gap_closed(self.full.perplexity, self.quantized.perplexity, self.adapted.perplexity)

    def table(self) -> Table:
        """For rich to print."""
        table = Table(*self._header, caption=self._caption(), caption_justify="left")
        for row in self._rows():
            table.add_row(*row)
        return table

    def to_markdown(self) -> str:
        """The same table in Markdown."""
        lines = [self._header, ("---", "---:", "---:", "---:"), *self._rows()]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{self._caption()}\n"

    def save(self, path: str | Path) -> None:
        """Write `to_dict` as JSON.

        Raises:
            QuailoraError: the disk is full, or the file is not writable.
        """
        path = Path(path)
        write_files(path.parent, {path.name: to_json(self.to_dict())})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"gap_closed": self.gap_closed}

    _header = ("", "perplexity", "KL, nats", "gap closed")

    def _rows(self) -> list[tuple[str, ...]]:
        scores = [self.full, self.quantized] + ([self.adapted] if self.adapted else [])
        closed = "" if self.gap_closed is None else f"{self.gap_closed:.1%}"
        return [
            (score.name, f"{score.perplexity:.2f}", f"{score.kl:.4f}", closed if score is self.adapted else "")
            for score in scores
        ]

    def _caption(self) -> str:
        return "; ".join([count(self.tokens, "predicted token"), *self.notes])


def default_batch_size(calibration: Calibration) -> int:
    """As many sequences as make about 8192 tokens."""
    return max(1, TOKENS_PER_BATCH // calibration.longest)


def perplexity(model: nn.Module, batches: Batches) -> float:
    """e to the mean negative log-likelihood of the predicted tokens.

    model: a transformers causal language model, or a PeftModel over one. It runs in eval mode and is then restored.
    batches: `Calibration.batches(...)`, or (b, t) int64 tensors of tokens without padding.

    Raises:
        CalibrationError: no sequence has two tokens or more.
        QuailoraError: the model's logits are not finite.
    """
    tally = _Tally()
    with _evaluating(model):
        for batch in map(_predictions, batches):
            tally.add(batch, batch.logits(model))
    return tally.perplexity


def kl_divergence(model: nn.Module, reference: nn.Module, batches: Batches) -> float:
    """The mean KL(reference || model) over predicted tokens, in nats. Arguments and errors as for `perplexity`.

    Raises:
        MismatchError: the two models have different vocabularies.
    """
    tally = _Tally()
    with _evaluating(model, reference):
        for batch in map(_predictions, batches):
            tally.add(batch, batch.logits(model), batch.logits(reference))
    return tally.kl


def gap_closed(full: float, quantized: float, adapted: float) -> float | None:
    """The share of quantization's cost in perplexity that an adapter recovers; None if quantization costs nothing.

    This is the gap before training. The gap in the QuAILoRA paper's tables is measured after training, against 8 bits.
    """
    return (quantized - adapted) / (quantized - full) if quantized > full else None


@without_torch_modes()
def compare(
    checkpoint: str | Path | Checkpoint,
    adapter: str | Path | None,
    calibration: Calibration,
    *,
    initial: str | Path | None = None,
    quantization: QuantizationConfigMixin | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    base: str | Path | None = None,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Score the full-precision model, the quantized base and the base with an adapter, as users load them.

    Both models are on the device at once. An adapter that `convert` made is scored on the full-precision model, which
    is what it is for. On a CPU without fast bf16 or fp16 products (`ops.half_products`), fp32 copies of the LM head's
    weight and logits come on top.

    If the adapter was calibrated on the same data, by its record, a note says so.

    Where the adapter comes with embeddings of another size (new tokens), all models are scored on the vocabulary that
    they share: the held-out tokens must be in it, and other logits are left out of the softmax.

    Args:
        checkpoint: the full-precision model: a folder, or an id on the Hugging Face hub.
        adapter: a folder that PEFT saved; None scores the quantized base alone.
        calibration: the held-out tokens.
        initial: the initialized adapter that training started from, or that was kept frozen; see `merge`.
        quantization: of the base, such as a BitsAndBytesConfig; None is that of the adapter's record.
        device: None is CUDA if there is a CUDA device, else the CPU.
        dtype: of both models; None is that of the record, or else of the checkpoint.
        base: the folder of the quantized base; see `merge`.
        batch_size: sequences per batch; None takes as many as make about 8192 tokens. Two (b, t, vocabulary) tensors of
            logits are in memory at once.
        progress: called after each batch with the number of batches done and their total.

    Raises:
        MismatchError: the adapter's record names another checkpoint or quantization.
        AdapterError: `adapter` is not an adapter, or nothing says how the base is quantized.
        CalibrationError: as for `perplexity`; or a token outside the vocabulary that the models share.
        QuailoraError: as for `perplexity`; or the device is out of memory.
    """
    source = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint)
    loaded_in, untrained, converted, made_for = source.dtype, False, False, None
    notes: tuple[str, ...] = ()
    if adapter is not None:
        folder = Path(adapter)
        if not (folder / "adapter_config.json").is_file():
            raise AdapterError(f"{folder} is not an adapter: it has no adapter_config.json")
        check_weights(folder)
        record = record_of(folder, Path(initial) if initial else None)
        made_for = record["base"] if record else None
        notes = _not_held_out(record or {}, calibration)
        converted = made_for is not None and for_full_precision(made_for)
        # Trainers do not copy the record, and `convert` says that it is of a trained one.
        own = read_record(folder)
        untrained = own is not None and not was_trained(folder, own) and not converted
        source = as_recorded(source, made_for)
        quantization, loaded_in = loading(made_for, source, quantization, folder)
    elif quantization is None:
        raise AdapterError("without an adapter nothing says how the base is quantized: give quantization (--quant)")
    where = default_device(device)
    dtype = dtype or loaded_in
    method = from_config(quantization).name
    written = QuantizedCheckpoint.recorded(made_for or {}, base, trust_remote_code=source.trust_remote_code)
    of_full, of_quantized, of_adapted = _Tally(), _Tally(), _Tally()
    with memory_errors(where, _SMALLER):
        full = load_model(source, where, dtype)
        quantized = (
            load_model(source, where, dtype, quantization)
            if written is None
            else _load_written(source, written, where, dtype)
        )
        if adapter is not None and made_for is not None and not converted and written is None:
            check_base(quantized, adapter, checkpoint=source, initial=initial)
        shared, adapted = vocabulary(full), None
        if adapter is not None:
            receiver = full if converted else quantized
            resize_to(receiver, Path(adapter))
            shared = min(shared, vocabulary(receiver))
            adapted = _with_adapter(receiver, Path(adapter), Path(initial) if initial else None)
        size = default_batch_size(calibration) if batch_size is None else batch_size
        batches = list(load_calibration(calibration, vocab_size=shared).batches(size))
        with _evaluating(full, quantized):
            for done, batch in enumerate(map(_predictions, batches), 1):
                with nullcontext() if adapted is None else adapted.disable_adapter():
                    reference = batch.logits(full)[..., :shared]
                    of_full.add(batch, reference)
                    of_quantized.add(batch, batch.logits(quantized)[..., :shared], reference)
                if adapted is not None:
                    of_adapted.add(batch, batch.logits(adapted)[..., :shared], reference)
                if progress is not None:
                    progress(done, len(batches))
    return Comparison(
        of_full.scores("full precision"),
        of_quantized.scores(method),
        of_adapted.scores(f"{'full precision' if converted else method} + {'QuAILoRA' if untrained else 'adapter'}")
        if adapted is not None
        else None,
        of_full.tokens,
        untrained,
        notes,
    )


def _not_held_out(record: dict[str, Any], calibration: Calibration) -> tuple[str, ...]:
    """A note where, as far as the record of an adapter tells, it was made with this data."""
    made_with, refined_with = record.get("calibration", {}), record.get("model_refinement", {})
    sources = (made_with.get("source"), refined_with.get("data"))
    same = made_with.get("fingerprint") == calibration.fingerprint()
    if not same and not (calibration.named and calibration.source in sources):
        return ()
    return (f"by its record, the adapter was calibrated on {calibration.source} too: these are not held-out scores",)


_SMALLER = (
    "evaluation holds the full-precision and the quantized model at once. Lower batch_size (--batch-size 1) or the "
    "length of sequences (--sequence-length), or use the CPU (--device cpu)"
)


@dataclass(frozen=True)
class _Predictions:
    """A batch, and which of its tokens are predicted."""

    input_ids: Tensor  # (b, t)
    keep: Tensor  # (b, t)
    row: Tensor  # (p,) the sequence of each predicted token
    position: Tensor  # (p,) the position before it, whose logits predict it

    def logits(self, model: nn.Module) -> Tensor:
        """(b, t, vocabulary), in the model's dtype."""
        device = _device(model)
        mask = self.keep.to(device, torch.int64)
        logits: Tensor = model(input_ids=self.input_ids.to(device), attention_mask=mask, use_cache=False).logits
        return logits


def _predictions(batch: Batch | Tensor) -> _Predictions:
    input_ids, keep = (batch, None) if isinstance(batch, Tensor) else batch
    if input_ids.dim() != 2:
        raise CalibrationError(f"a batch is (b, t) tokens, got {tuple(input_ids.shape)}")
    keep = torch.ones_like(input_ids, dtype=torch.bool) if keep is None else keep
    return _Predictions(input_ids, keep, *predicted(Batch(input_ids, keep)))


@dataclass
class _Tally:
    """Sums over predicted tokens, in nats: in fp32 within a chunk of tokens, in fp64 across chunks."""

    tokens: int = 0
    loss: float = 0.0
    divergence: float = 0.0

    @property
    def perplexity(self) -> float:
        return math.exp(self._mean(self.loss))

    @property
    def kl(self) -> float:
        return self._mean(self.divergence)

    def scores(self, name: str) -> Scores:
        return Scores(name, self.perplexity, self.kl)

    def add(self, batch: _Predictions, logits: Tensor, reference: Tensor | None = None) -> None:
        """logits, reference: (b, t, vocabulary)."""
        if reference is not None and reference.shape != logits.shape:
            raise MismatchError(
                f"the models have vocabularies of {logits.shape[-1]} and {reference.shape[-1]} tokens: the KL "
                "divergence between them is not defined"
            )
        size = max(1, LOGITS_AT_ONCE // logits.shape[-1])
        for row, position in zip(batch.row.split(size), batch.position.split(size), strict=True):
            log_p = _log_softmax(logits, row, position)  # (p, vocabulary)
            targets = batch.input_ids[row, position + 1].to(log_p.device)
            self.tokens += len(targets)
            self.loss -= log_p.gather(1, targets[:, None]).sum().item()
            if reference is not None:
                log_r = _log_softmax(reference, row, position).to(log_p.device)
                self.divergence += nn.functional.kl_div(log_p, log_r, reduction="sum", log_target=True).item()

    def _mean(self, total: float) -> float:
        if not self.tokens:
            raise CalibrationError("no token to score: that takes sequences of two tokens or more")
        return total / self.tokens


def _log_softmax(logits: Tensor, row: Tensor, position: Tensor) -> Tensor:
    chosen = logits[row.to(logits.device), position.to(logits.device)].float()
    if not chosen.isfinite().all():
        raise QuailoraError(
            f"logits are not finite: the model overflows in {logits.dtype} (try bfloat16), or its weights are damaged"
        )
    return chosen.log_softmax(-1)


@contextmanager
def _evaluating(*models: nn.Module) -> Iterator[None]:
    """Within it the models are in eval mode and gradients are off. Every module is restored afterwards."""
    modules = [module for model in models for module in model.modules()]
    modes = [module.training for module in modules]
    with ExitStack() as undo, torch.no_grad():
        for module, mode in zip(modules, modes, strict=True):
            undo.callback(setattr, module, "training", mode)
            module.training = False
        undo.enter_context(evaluating(modules))
        for model in models:
            undo.enter_context(ops.half_products(_device(model), _dtypes(model)))
        yield


def _device(model: nn.Module) -> torch.device:
    """The device for its input."""
    # Offloaded parameters are on the meta device; accelerate moves the input to where it is needed.
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def _dtypes(model: nn.Module) -> set[torch.dtype]:
    """The dtypes it may compute in: those of its parameters, and the compute dtypes of quantized layers."""
    of_linears = {getattr(module, "compute_dtype", None) for module in model.modules()}
    of_parameters = {parameter.dtype for parameter in model.parameters()}
    return of_parameters | {dtype for dtype in of_linears if isinstance(dtype, torch.dtype)}


def _load_written(
    source: Checkpoint, written: QuantizedCheckpoint, device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    """The full-precision model with Q in place of W: what the base computes, whatever library would load it."""
    model = load_model(source, device, dtype)
    stream = StreamedModel(source, torch.device("cpu"), dtype)
    for name in written.names:
        module, q = model.get_submodule(name), written.weight(name, stream).dequantize().to(device, dtype)
        module.weight.data = q.T.contiguous() if isinstance(module, Conv1D) else q
    return model


def _with_adapter(model: PreTrainedModel, adapter: Path, initial: Path | None = None) -> PeftModel:
    try:
        with _as_one(adapter, initial) as folder, loading_by_peft():
            # An adapter on disk that lacks tensors its configuration names would be scored incomplete.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(model, str(folder))
    except (ValueError, RuntimeError, UserWarning) as error:  # no such module, another shape, missing tensors
        raise MismatchError(f"{adapter} does not fit {type(model).__name__}: {error}") from error


@contextmanager
def _as_one(adapter: Path, initial: Path | None) -> Iterator[Path]:
    """The folder of an adapter; if it was trained over a frozen one, a temporary folder with both as one adapter."""
    if Correction.read(adapter) is None:
        yield adapter
        return
    both = saved_adapter(adapter, initial)
    with tempfile.TemporaryDirectory(prefix="quailora-") as folder:
        both.config.save_pretrained(folder)
        save_file(both.tensors, Path(folder) / WEIGHTS, metadata={"format": "pt"})
        yield Path(folder)
