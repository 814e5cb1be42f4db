"""The LoRA initializations that the studies compare, each as a PEFT adapter, and the quantized bases they are for.

PEFT's own are made by PEFT. `prepare` makes an adapter's folder, `load` a model that can be trained.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import (
    EvaConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
    initialize_lora_eva_weights,
    replace_lora_weights_loftq,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import CordaConfig
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import quailora
from quailora.calibration.data import Calibration
from quailora.modeling.checkpoint import Checkpoint
from quailora.modeling.transformers_internals import no_progress_bar
from quailora.quantization.registry import config_for

DTYPE = torch.bfloat16  # whatever the checkpoint's: training is in bf16
BASES = {"nf4": config_for("nf4", DTYPE), "int8": BitsAndBytesConfig(load_in_8bit=True), "bf16": None}
SOLVERS = {"quailora": "krylov", "als": "als", "closed-form": "eigh", "svd": "svd"}
MINUS = "minus"  # the frozen adapter that subtracts the product of `random` from the base


def prepare(
    kind: str,
    checkpoint: Checkpoint,
    base: str,
    calibration: Calibration,
    config: LoraConfig,
    seed: int,
    folder: Path,
) -> None:
    """Make the adapter of an initialization of PREPARED in `folder`, which must not exist.

    quailora, als, closed-form, svd    this project's solvers; the closed form is that of CLoQ and of QERA (exact)
    loftq                              PEFT's `replace_lora_weights_loftq`, as it is
    loftq-scaled                       the same with PEFT's scaling, alpha / r, divided out
    eva, corda                         PEFT's
    """
    if kind in SOLVERS:
        quailora.build_adapter(
            checkpoint,
            config,
            calibration,
            folder,
            quantization=copy.deepcopy(BASES[base]),
            dtype=DTYPE,
            solver=SOLVERS[kind],
            seed=seed,
            progress=False,
        )
        return
    _OF_PEFT[kind](checkpoint, base, calibration, config).save_pretrained(folder)


def load(
    checkpoint: Checkpoint,
    base: str,
    kind: str | None = None,
    calibration: Calibration | None = None,
    rank: int = 64,
    alpha: int = 16,
    seed: int = 0,
    work: Path | None = None,
) -> Any:
    """The base with the LoRA factors of initialization `kind`, trainable in fp32. None: the base alone.

    zero: PEFT's default, lora_A random and lora_B zero. random: both random, with the norms of quailora's, and their
    product subtracted by a second, frozen adapter. So the model computes what it does with zero, up to the rounding of
    both adapters' outputs to bf16, but lora_B is not zero.
    Adapters of PREPARED are kept below `work` and made if missing.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with no_progress_bar():
        model: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint.name,
            revision=checkpoint.revision,
            dtype=DTYPE,
            quantization_config=copy.deepcopy(BASES[base]),  # loading writes into it
            device_map={"": device},
        )
    if kind is None:
        return model
    config = lora(rank, alpha)
    if kind == "zero":
        return _adapted(model, config)
    assert calibration is not None and work is not None
    made_as = "quailora" if kind == "random" else kind
    folder = keep(work, checkpoint, base, made_as, calibration, config, seed)
    with _quiet():
        adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    if kind == "random":
        _draw_at_random(adapted, config, seed)
    return adapted


def load_trained(checkpoint: Checkpoint, base: str, folder: Path) -> Any:
    """The base with an adapter from `folder`."""
    with _quiet():
        return PeftModel.from_pretrained(load(checkpoint, base), str(folder))


def lora(rank: int, alpha: float) -> LoraConfig:
    """LoRA on every linear layer, as in the paper."""
    whole: Any = alpha  # PEFT takes floats
    return LoraConfig(r=rank, lora_alpha=whole, target_modules="all-linear", task_type="CAUSAL_LM")


def keep(
    work: Path, checkpoint: Checkpoint, base: str, kind: str, calibration: Calibration, config: LoraConfig, seed: int
) -> Path:
    """The folder of an adapter of PREPARED below `work`, made if missing."""
    folder = kept(work, checkpoint, base, kind, calibration, config.r)
    if not folder.is_dir():
        with making(folder) as made:
            prepare(kind, checkpoint, base, calibration, config, seed, made)
    return folder


@contextmanager
def making(folder: Path) -> Iterator[Path]:
    """A temporary folder next to `folder`, renamed to it at the end unless another process has made it by then."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as temporary:
        made = Path(temporary) / "adapter"
        yield made
        try:
            made.rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise


def kept(work: Path, checkpoint: Checkpoint, base: str, kind: str, calibration: Calibration, rank: int) -> Path:
    """Where `keep` puts it."""
    parts = (Path(checkpoint.name).name, base, kind, f"r{rank}", calibration.fingerprint()[:12])
    return work / "initial" / "_".join(parts)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide warnings about functions that transformers has deprecated and PEFT still calls."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        yield


def _adapted(model: Any, config: LoraConfig, **options: Any) -> Any:
    with _quiet():
        return get_peft_model(model, config, **options)


def lora_layers(model: Any) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, LoraLayer))


@torch.no_grad()
def _draw_at_random(model: PeftModel, config: LoraConfig, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model.add_adapter(MINUS, config)
    for layer in lora_layers(model):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        for factor in (a, b):
            drawn = torch.randn(factor.shape, generator=generator).to(factor)
            factor.copy_(drawn * (factor.norm() / drawn.norm()))
        layer.lora_A[MINUS].weight.copy_(a)
        layer.lora_B[MINUS].weight.copy_(-b)
    model.base_model.set_adapter(["default", MINUS])  # type: ignore[operator]
    for name, parameter in model.named_parameters():
        if f".{MINUS}." in name:
            parameter.requires_grad_(False)


# ---- PEFT's own


class _HereInsteadOfCuda(TorchFunctionMode):
    """PEFT's LoftQ moves every weight to CUDA. Without CUDA, ignore such a move."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.to and kwargs.get("device") == "cuda" and not torch.cuda.is_available():
            kwargs["device"] = args[0].device
        return function(*args, **kwargs)


def _loftq(
    checkpoint: Checkpoint, base: str, calibration: Calibration, config: LoraConfig, scaled: bool = False
) -> Any:
    model = _adapted(load(checkpoint, base), config)
    files = list(Path(checkpoint.name).glob("*.safetensors"))
    with _HereInsteadOfCuda():  # PEFT itself finds sharded files and those of a model on the hub
        replace_lora_weights_loftq(model, str(files[0]) if len(files) == 1 else None)
    if scaled:
        for layer in lora_layers(model):
            for factor in (layer.lora_A, layer.lora_B):  # both, so that they stay balanced
                factor["default"].weight.data /= layer.scaling["default"] ** 0.5
    return model


def _eva(checkpoint: Checkpoint, base: str, calibration: Calibration, config: LoraConfig) -> Any:
    # rho = 1: the same rank everywhere, as for the others.
    config = replace(config, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    model = _adapted(load(checkpoint, base), config, low_cpu_mem_usage=True)
    batches = [
        {"input_ids": batch.input_ids, "attention_mask": torch.ones_like(batch.input_ids)}
        for batch in calibration.batches(4)
    ]
    initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    return model


def _corda(checkpoint: Checkpoint, base: str, calibration: Calibration, config: LoraConfig) -> Any:
    from peft.tuners.lora.corda import preprocess_corda  # needs attrs, which PEFT does not install

    model = load(checkpoint, base)
    names = {name.rpartition(".")[2] for name, module in model.model.named_modules() if isinstance(module, nn.Linear)}
    kpm = CordaConfig(corda_method="kpm")
    config = replace(config, target_modules=sorted(names), init_lora_weights="corda", corda_config=kpm)

    @torch.no_grad()
    def run() -> None:
        for batch in calibration.batches(1):  # PEFT takes one sequence at a time
            model(batch.input_ids)

    preprocess_corda(model, config, run_model=run)
    return _adapted(model, config)


_OF_PEFT: dict[str, Callable[..., Any]] = {
    "loftq": _loftq,
    "loftq-scaled": partial(_loftq, scaled=True),
    "eva": _eva,
    "corda": _corda,
}
PREPARED = (*SOLVERS, *_OF_PEFT, "random")
