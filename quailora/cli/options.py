"""Options that several commands share, and parsing their values. No heavy import happens before a command runs."""

from __future__ import annotations

import os
import re
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quailora.errors import QuailoraError
from quailora.quantization.registry import Format

if TYPE_CHECKING:
    import torch


GROUP_SIZE = 64  # weights that share a scale, with --bits
_MATCHED = "matched"  # as in adapters.alpha, which would import torch


class AutoClass(StrEnum):
    """The transformers classes that a base can be loaded with."""

    causal_lm = "AutoModelForCausalLM"
    image_text_to_text = "AutoModelForImageTextToText"


class Dtype(StrEnum):
    """A floating-point format."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


CheckpointArgument = Annotated[
    str,
    typer.Argument(metavar="CHECKPOINT", help="The full-precision model: a folder, or an id on the Hugging Face hub."),
]
DataOption = Annotated[
    str,
    typer.Option(
        help="A file of text or of records (JSON, JSONL, CSV, TSV, Parquet; also .gz), a folder of such files, or the "
        "name of a data set on the Hugging Face hub."
    ),
]
ColumnOption = Annotated[
    str | None, typer.Option(help="The field of the records to use, if not one of the usual ones.")
]
SplitOption = Annotated[str | None, typer.Option(help="Split of a data set. Default: train.")]
IterationsOption = Annotated[
    int | None,
    typer.Option(
        help="Exact number of steps of krylov or svd, or of alternations of als. Default: as many as gain, about 3 and "
        "8, and 20."
    ),
]
LengthOption = Annotated[
    int | None,
    typer.Option(help="Tokens in one sequence. Default: 2048, or the model's maximum if that is less.", min=1),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="Device to compute on, such as cuda:0 or cpu. Default: CUDA if there is a GPU.")
]
QuantOption = Annotated[Format | None, typer.Option(help="How the base is quantized. Default: nf4.")]
RecordedQuantOption = Annotated[
    Format | None,
    typer.Option(help="How the base is quantized. Default: as in the adapter's record; nf4 without an adapter."),
]
DoubleOption = Annotated[
    bool | None,
    typer.Option("--double-quant/--no-double-quant", help="Double quantization of nf4 and fp4. Default: yes."),
]
ComputeOption = Annotated[
    Dtype | None, typer.Option(help="Compute dtype of nf4 and fp4. Default: the dtype its weights are loaded in.")
]
LoadedOption = Annotated[
    Dtype | None,
    typer.Option(
        help="The dtype that training loads the base's weights in before they are quantized; it changes the quantized "
        "values. Default: the checkpoint's dtype."
    ),
]
InputsOption = Annotated[
    str | None,
    typer.Option(
        help="With calibrated rounding, the inputs each linear is fitted on: quantized, what it receives from layers "
        "that are quantized already, correcting half of their error; or full, its inputs in the full-precision model, "
        "which is much faster. Default: quantized."
    ),
]
RefineOption = Annotated[
    str | None,
    typer.Option(
        help="Train the factors further: blocks, those of each block together for its output in the quantized model, "
        "one block in memory at a time; or model, those of the whole quantized model for what it predicts. For "
        "adapters that are used without a fine-tune. Default: not."
    ),
]
RemoteOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.")]
AutoClassOption = Annotated[
    AutoClass | None,
    typer.Option(
        help="The class that training loads the model with; the two name modules differently. Default: as in the "
        "adapter's record, or, without one, the class that config.json implies."
    ),
]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of the checkpoint on the hub.")]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        help="Memory that may be allocated on the device, such as 12GiB; on a CPU, by how much resident memory may "
        "grow. Default: 90 % of the free memory."
    ),
]
HostMemoryOption = Annotated[
    str | None,
    typer.Option(
        help="With a GPU, host memory that hidden states may take; if they need more, they go to disk. "
        "Default: 90 % of the free memory."
    ),
]
BatchOption = Annotated[
    int | None, typer.Option(help="Sequences in one forward pass. Default: about 8192 tokens.", min=1)
]


def chosen_split(data: str, split: str | None, default: str = "train") -> str:
    """The split of a data set. Raises QuailoraError where one is given of a file, which has none."""
    if split is not None and os.path.isfile(os.path.expanduser(data)):
        raise QuailoraError(f"--split {split} is of a data set, and {data} is a file, which has none: leave it out")
    return split or default


def parse_names(text: str) -> list[str]:
    """Names separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def parse_pattern(option: str, text: str | None) -> dict[str, int]:
    """ "q_proj=8,down_proj=16" -> {"q_proj": 8, "down_proj": 16}. Raises QuailoraError for anything else."""
    found = {}
    for part in parse_names(text or ""):
        name, _, value = part.rpartition("=")
        if not name or not value.isdecimal() or int(value) < 1:
            raise QuailoraError(f"{option} {part!r}: write it as name=number, such as q_proj=8")
        found[name] = int(value)
    return found


def parse_alpha(text: str) -> tuple[int, str | None]:
    """ "32" -> (32, None); "matched:32" -> (32, "matched"); "matched" -> (16, "matched")."""
    kind, colon, number = text.rpartition(":") if text != _MATCHED else (_MATCHED, ":", "16")
    if kind != (_MATCHED if colon else "") or not number.isdecimal() or int(number) < 1:
        raise QuailoraError(f"--alpha {text!r}: write a whole number, {_MATCHED}, or {_MATCHED}:16")
    return int(number), kind or None


def parse_target_modules(text: str) -> str | list[str]:
    """Names are separated by commas; anything that could not be a name is a regular expression, as PEFT takes it."""
    names = parse_names(text)
    plain = all(re.fullmatch(r"[\w.-]+", name) for name in names)
    return names if plain and text != "all-linear" else text


def _of_4_bits(double: bool | None, compute: Dtype | None) -> str | None:
    """An option of bitsandbytes' 4-bit formats that is given."""
    if double is None:
        return None if compute is None else "--compute-dtype"
    return "--double-quant" if double else "--no-double-quant"


def check_format_options(quant: Format, double: bool | None, compute: Dtype | None) -> None:
    """Raises QuailoraError where options do nothing for the format."""
    if quant is Format.int8 and (given := _of_4_bits(double, compute)) is not None:
        raise QuailoraError(f"{given} is of nf4 and fp4, and --quant int8 has no such setting: leave it out")


def check_quantization_options(quant: Format | None, double: bool | None, compute: Dtype | None) -> None:
    """Where an adapter's record may say how the base is quantized."""
    if quant is not None:
        check_format_options(quant, double, compute)
    elif (given := _of_4_bits(double, compute)) is not None:
        raise QuailoraError(f"{given} needs --quant: give both, or neither to use the adapter's record")


def quantization_config(quant: Format, double: bool | None, compute: Dtype | None, dtype: torch.dtype) -> Any:
    from quailora.quantization.registry import config_for

    return config_for(quant, dtype, double=double is not False, compute=torch_dtype(compute))


def check_bits(
    bits: int | None,
    quant: Format | None,
    double: bool | None,
    compute: Dtype | None,
    group_size: int | None,
    symmetric: bool = True,
) -> None:
    """Raises QuailoraError where options of a base in GPTQ's format and of bitsandbytes' are mixed, or do nothing."""
    check_format_options(quant or Format.nf4, double, compute)
    given = _of_4_bits(double, compute) if quant is None else "--quant"
    if bits is not None and given is not None:
        raise QuailoraError(f"{given} is for bitsandbytes, and --bits for a base in GPTQ's format: leave one out")
    if bits is None and (group_size is not None or not symmetric):
        raise QuailoraError(
            f"{'--asymmetric' if group_size is None else '--group-size'} goes with --bits: give that too"
        )


def gptq_config(bits: int, group_size: int, symmetric: bool) -> Any:
    """Raises QuailoraError for bits that the format does not hold."""
    from transformers import GPTQConfig

    try:
        return GPTQConfig(bits=bits, group_size=group_size, sym=symmetric, desc_act=False)
    except ValueError as error:
        raise QuailoraError(f"--bits {bits}, --group-size {group_size}: {error}") from error


def torch_dtype(dtype: Dtype | None) -> torch.dtype | None:
    import torch

    return None if dtype is None else getattr(torch, dtype.value)
