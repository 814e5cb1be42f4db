"""The command line: quailora init | plan | eval | merge | convert | doctor."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import quailora
from quailora.errors import QuailoraError

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help=quailora.__doc__,
    rich_markup_mode=None,
)


class Quant(StrEnum):
    """How the base is quantised."""

    nf4 = "nf4"
    fp4 = "fp4"
    int8 = "int8"


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
    str, typer.Option(help="A text, JSON or JSONL file, or the name of a data set on the Hugging Face hub.")
]
ColumnOption = Annotated[str | None, typer.Option(help="The field of the records to use, where it is not a usual one.")]
SplitOption = Annotated[str, typer.Option(help="Which split of a data set from the hub.")]
LengthOption = Annotated[
    int | None,
    typer.Option(help="Tokens in one sequence. Default: 2048, or as many as the model has positions.", min=1),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="Where to compute, such as cuda:0 or cpu. Default: CUDA if there is one.")
]
QuantOption = Annotated[
    Quant | None, typer.Option(help="How the base is quantised. Default: nf4, or what the adapter was made for.")
]
DoubleOption = Annotated[bool, typer.Option("--double-quant/--no-double-quant", help="Double quantisation (4 bits).")]
CheckedDoubleOption = Annotated[
    bool | None,
    typer.Option("--double-quant/--no-double-quant", help="Double quantisation (4 bits), with --quant. Default: yes."),
]
ComputeOption = Annotated[
    Dtype | None, typer.Option(help="What a 4-bit base computes in. Default: what its weights are loaded as.")
]
LoadedOption = Annotated[
    Dtype | None,
    typer.Option(
        help="What the base's weights are loaded as before they are quantised, which decides their codes: as the "
        "training will load them. Default: the checkpoint's dtype."
    ),
]
RemoteOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.")]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of the checkpoint on the hub.")]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        help="What may be allocated on the device, such as 12GiB; on a CPU, by how much resident memory may grow. "
        "Default: nine tenths of what is free."
    ),
]
HostMemoryOption = Annotated[
    str | None,
    typer.Option(
        help="What hidden states may take of the host's memory beside a GPU; where that is too little they go to disk. "
        "Default: nine tenths of what is free."
    ),
]
BatchOption = Annotated[
    int | None, typer.Option(help="Sequences in one forward pass. Default: about 8192 tokens.", min=1)
]


@app.command()
def init(
    checkpoint: CheckpointArgument,
    data: DataOption,
    output: Annotated[Path, typer.Option(help="Where the adapter goes: a new or empty folder.")],
    rank: Annotated[int, typer.Option(help="LoRA's r.", min=1)] = 64,
    alpha: Annotated[int, typer.Option(help="LoRA's alpha; the starting product does not depend on it.", min=1)] = 16,
    rslora: Annotated[bool, typer.Option("--rslora", help="Scale by alpha / sqrt(r).")] = False,
    dropout: Annotated[float, typer.Option(help="LoRA's dropout in training.", min=0, max=1)] = 0.0,
    target_modules: Annotated[
        str, typer.Option(help="all-linear, names separated by commas, or one regular expression.")
    ] = "all-linear",
    quant: QuantOption = None,
    double_quant: DoubleOption = True,
    compute_dtype: ComputeOption = None,
    dtype: LoadedOption = None,
    solver: Annotated[str, typer.Option(help="krylov, als (the paper's), eigh or svd.")] = "krylov",
    iterations: Annotated[int | None, typer.Option(help="Depth of krylov (3), alternations of als (20).")] = None,
    damping: Annotated[
        float | None, typer.Option(help="Share of the mean of H's diagonal that is added to it.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration sequences.", min=1)] = 2000,
    sequence_length: LengthOption = None,
    column: ColumnOption = None,
    split: SplitOption = "train",
    batch_size: BatchOption = None,
    seed: Annotated[int, typer.Option(help="Of the draw of samples, and of the solver.")] = 0,
    memory_budget: MemoryOption = None,
    host_memory_budget: HostMemoryOption = None,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on with a run that did not come to its end.")
    ] = True,
    device: DeviceOption = None,
    revision: RevisionOption = None,
    trust_remote_code: RemoteOption = False,
    progress: Annotated[bool, typer.Option(help="Draw a progress bar.")] = True,
) -> None:
    """Make an adapter whose A and B undo most of the quantisation error of CHECKPOINT.

    Under torchrun the processes share the work, one to each GPU.
    """
    from peft import LoraConfig

    from quailora import crew, pipeline
    from quailora.budget import parse_bytes
    from quailora.checkpoint import Checkpoint
    from quailora.files import check_new_folder

    # Looked at first: a slip of the pen is no reason to wait for a download.
    check_new_folder(output)
    pipeline.Settings(solver, iterations)
    for budget in filter(None, (memory_budget, host_memory_budget)):
        parse_bytes(budget)
    source = Checkpoint(checkpoint, revision=revision, trust_remote_code=trust_remote_code)
    loaded_as = _torch_dtype(dtype) or source.dtype
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        use_rslora=rslora,
        lora_dropout=dropout,
        target_modules=_target_modules(target_modules),
        task_type="CAUSAL_LM",
    )
    with crew.joined(device) as place, _interruptible():
        report = pipeline.build_adapter(
            source,
            config,
            data,
            output,
            quantization=_quantization(quant or Quant.nf4, double_quant, compute_dtype, loaded_as),
            dtype=loaded_as,
            solver=solver,
            iterations=iterations,
            damping=pipeline.DEFAULT_DAMPING if damping is None else damping,
            samples=samples,
            sequence_length=sequence_length,
            split=split,
            column=column,
            batch_size=batch_size,
            memory_budget=memory_budget,
            host_memory_budget=host_memory_budget,
            resume=resume,
            distributed=crew.launched(),
            device=place,
            seed=seed,
            progress=progress,
        )
    if crew.rank() == 0:
        Console().print(report.summary())
        typer.echo(f"adapter, report.md and model card: {output}")


@app.command()
def plan(
    checkpoint: CheckpointArgument,
    memory_budget: MemoryOption = None,
    host_memory_budget: HostMemoryOption = None,
    rank: Annotated[int, typer.Option(help="LoRA's r.", min=1)] = 64,
    target_modules: Annotated[
        str, typer.Option(help="all-linear, names separated by commas, or one regular expression.")
    ] = "all-linear",
    quant: QuantOption = None,
    double_quant: DoubleOption = True,
    compute_dtype: ComputeOption = None,
    dtype: LoadedOption = None,
    solver: Annotated[str, typer.Option(help="krylov, als (the paper's), eigh or svd.")] = "krylov",
    iterations: Annotated[int | None, typer.Option(help="Depth of krylov (3), alternations of als (20).")] = None,
    samples: Annotated[int, typer.Option(help="Calibration sequences.", min=1)] = 2000,
    sequence_length: LengthOption = None,
    batch_size: BatchOption = None,
    device: Annotated[
        str | None,
        typer.Option(help="Where it would be computed; cuda need not be here. Default: CUDA if there is one, or cpu."),
    ] = None,
    revision: RevisionOption = None,
    trust_remote_code: RemoteOption = False,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """What `init` would have where, in bytes, its FLOPs and an estimate of its time.

    No weight is read, nor downloaded: of a model on the hub the headers do.
    """
    from json import dumps

    import torch
    from peft import LoraConfig

    from quailora import adapter as adapters
    from quailora import budget, pipeline
    from quailora.blocks import StreamedModel
    from quailora.calibration import SEQUENCE_LENGTH
    from quailora.checkpoint import Checkpoint
    from quailora.quantized import Quantization

    settings = pipeline.Settings(solver, iterations)
    # Read first: a slip of the pen is no reason to wait.
    allowed, host = (
        None if given is None else budget.parse_bytes(given) for given in (memory_budget, host_memory_budget)
    )
    absent = (device or "").partition(":")[0] == "cuda" and not torch.cuda.is_available()
    place = torch.device("cuda") if absent else pipeline.default_device(device)
    source = Checkpoint(checkpoint, revision=revision, trust_remote_code=trust_remote_code, headers_only=True)
    loaded_as = _torch_dtype(dtype) or source.dtype
    quantization = _quantization(quant or Quant.nf4, double_quant, compute_dtype, loaded_as)
    config = LoraConfig(r=rank, target_modules=_target_modules(target_modules), task_type="CAUSAL_LM")
    base = adapters.quantized_skeleton(source, quantization, loaded_as)
    targets, _ = adapters.find_targets(adapters.adapted_skeleton(base, config, source))
    positions = getattr(source.config.get_text_config(decoder=True), "max_position_embeddings", None)
    found = budget.make_plan(
        StreamedModel(source, torch.device("cpu") if absent else place, loaded_as),
        {target.name: target.rank for target in targets},
        Quantization.from_config(quantization),
        settings,
        samples=samples,
        sequence_length=sequence_length or min(SEQUENCE_LENGTH, positions or SEQUENCE_LENGTH),
        memory_budget=allowed,
        host_memory_budget=host,
        batch_size=batch_size,
        device=place,
        timed=True,
    )
    typer.echo(dumps(found.to_dict(), indent=2) if json else found.text())


@app.command("eval")
def evaluate(
    checkpoint: CheckpointArgument,
    data: DataOption,
    adapter: Annotated[Path | None, typer.Option(help="The adapter's folder.")] = None,
    initial: Annotated[
        Path | None,
        typer.Option(help="The adapter that training started from, if --adapter has no record of its base."),
    ] = None,
    quant: QuantOption = None,
    double_quant: CheckedDoubleOption = None,
    compute_dtype: ComputeOption = None,
    samples: Annotated[int, typer.Option(help="Sequences to measure on.", min=1)] = 64,
    sequence_length: LengthOption = None,
    column: ColumnOption = None,
    split: SplitOption = "test",
    batch_size: BatchOption = None,
    seed: Annotated[int, typer.Option(help="Of the draw of samples.")] = 0,
    device: DeviceOption = None,
    revision: RevisionOption = None,
    trust_remote_code: RemoteOption = False,
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file as well.")] = None,
) -> None:
    """Perplexity and KL divergence: full precision, quantised, and with the adapter on the one it belongs on.

    Both models are on the device together.
    """
    from quailora import pipeline
    from quailora.checkpoint import Checkpoint
    from quailora.evaluate import compare

    if adapter is None:
        quant = quant or Quant.nf4
    _check_whole(quant, double_quant, compute_dtype)
    source = Checkpoint(checkpoint, revision=revision, trust_remote_code=trust_remote_code)
    quantization = None if quant is None else _quantization(quant, double_quant, compute_dtype, source.dtype)
    calibration = pipeline.read_calibration(
        source, data, samples=samples, sequence_length=sequence_length, seed=seed, split=split, column=column
    )
    comparison = compare(
        source,
        adapter,
        calibration,
        initial=initial,
        quantization=quantization,
        device=pipeline.default_device(device),
        batch_size=batch_size or pipeline.default_batch_size(calibration),
    )
    Console().print(comparison.table())
    if json is not None:
        comparison.save(json)


@app.command()
def merge(
    checkpoint: CheckpointArgument,
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="The trained adapter's folder.")],
    output: Annotated[Path, typer.Option(help="Where the dense checkpoint goes: a new or empty folder.")],
    initial: Annotated[
        Path | None, typer.Option(help="The adapter that training started from, if ADAPTER has no record of its base.")
    ] = None,
    quant: QuantOption = None,
    double_quant: CheckedDoubleOption = None,
    compute_dtype: ComputeOption = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of the weights written. Default: the checkpoint's.")] = None,
    device: Annotated[str, typer.Option(help="Where to compute.")] = "cpu",
    revision: RevisionOption = None,
    trust_remote_code: RemoteOption = False,
) -> None:
    """Write a dense checkpoint W' = Q + scaling B A, for serving: what the quantised base with the adapter computes."""
    from quailora import merge as write
    from quailora.checkpoint import Checkpoint
    from quailora.files import check_new_folder

    check_new_folder(output)
    _check_whole(quant, double_quant, compute_dtype)
    source = Checkpoint(checkpoint, revision=revision, trust_remote_code=trust_remote_code)
    quantization = None if quant is None else _quantization(quant, double_quant, compute_dtype, source.dtype)
    write(source, adapter, output, initial=initial, quantization=quantization, dtype=_torch_dtype(dtype), device=device)
    typer.echo(f"dense checkpoint: {output}")


@app.command()
def convert(
    initial: Annotated[Path, typer.Argument(metavar="INITIAL", help="The adapter that training started from.")],
    trained: Annotated[Path, typer.Argument(metavar="TRAINED", help="The adapter after training.")],
    output: Annotated[Path, typer.Option(help="Where the new adapter goes: a new or empty folder.")],
    rank: Annotated[
        int | None, typer.Option(help="Truncate to this rank. Default: keep all, at most 2 r.", min=1)
    ] = None,
) -> None:
    """Write what training learned, TRAINED less INITIAL, as an adapter for the full-precision weights."""
    from quailora import convert as write

    write(initial, trained, output, rank=rank)
    typer.echo(f"adapter for the full-precision weights: {output}")


@app.command()
def doctor(
    every: Annotated[
        bool, typer.Option("--all", help="Print every case, not only the worst of each operation.")
    ] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="First time the settings of the kernels on each GPU; keep the fastest.")
    ] = False,
    only: Annotated[
        str | None,
        typer.Option("--device", help="Only this one; without it, or on a GPU without our code for it, an error."),
    ] = None,
) -> None:
    """Versions and devices; which backend serves each operation here, and whether it computes what it should.

    Ends with an error where an operation does not, so that one can rely on it in scripts.
    """
    import platform
    from importlib.metadata import version

    import torch

    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    devices = [torch.device("cpu"), *gpus]
    if only is not None:
        known, devices = devices, [device for device in devices if str(device) == only]
        gpus = [device for device in gpus if device in devices]
        if not devices:
            raise QuailoraError(f"there is no {only} here; there are {', '.join(map(str, known))}")
    if tune:
        _tune(gpus)
    typer.echo(f"quailora {quailora.__version__}, Python {platform.python_version()}, {platform.platform()}")
    typer.echo(", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "bitsandbytes")))
    unsound = [operation for device in devices for operation in _examined(device, every)]
    if unsound:
        raise QuailoraError(
            f"{', '.join(dict.fromkeys(unsound))}: not what the reference gives. Do not trust results of this "
            "installation on that device; please report the tables above"
        )
    if only is not None and gpus:
        services = quailora.backends(only).items()
        plain = [name for name, service in services if service.backend == "reference" and service.others]
        if plain:
            raise QuailoraError(f"{only}: plain PyTorch serves {', '.join(plain)}; the table above says why")


def _tune(gpus: list[torch.device]) -> None:
    tunable = [gpu for gpu in gpus if quailora.backends(gpu)["grouped_error_product"].backend == "triton"]
    if not tunable:
        reasons = quailora.backends(gpus[0] if gpus else "cpu")["grouped_error_product"].others
        raise QuailoraError(f"there are no kernels to tune here: {reasons['triton']}; run doctor without --tune")
    from quailora.kernels import settings, tuning

    for gpu in tunable:
        typer.echo(f"Timing kernels on {gpu}: about a minute")
        try:
            fastest = tuning.tune(gpu)
        except OSError as error:
            raise QuailoraError(
                f"the timings cannot be kept: {error}; XDG_CACHE_HOME may name another folder"
            ) from error
        typer.echo(f"{len(fastest)} settings kept in {settings.timings_file(gpu)}")


def _examined(device: torch.device, every: bool) -> list[str]:
    """Print the tables of a device. Returns the operations that do not compute what they should."""
    import torch

    from quailora.doctor import Finding, copy_speed, examine

    console = Console(markup=False, emoji=False)
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else f"{torch.get_num_threads()} threads"
    services = Table("operation", "backend", "why not the others", title=f"{device}: {name}")
    for operation, service in quailora.backends(device).items():
        services.add_row(operation, service.backend, "; ".join(f"{k}: {v}" for k, v in service.others.items()))
    console.print(services)

    findings = list(examine(device, timed=on_gpu))
    copy = copy_speed(device) if on_gpu else None
    title = f"{device}: against the reference in fp64" + (f"; a copy moves {copy / 1e9:.0f} GB/s" if copy else "")
    checks = Table("operation", "cases", "worst case", "error", "allowed", "GB/s", title=title)

    def row(finding: Finding, cases: str) -> None:
        speed = f"{finding.speed / 1e9:.0f}" if finding.speed else ""
        error = finding.raised or f"{finding.error:.1e}"
        checks.add_row(finding.operation, cases, finding.case, error, f"{finding.allowed:.0e}", speed)

    for operation in dict.fromkeys(finding.operation for finding in findings):
        of_one = [finding for finding in findings if finding.operation == operation]
        sound = [finding for finding in of_one if finding.sound]
        if every:
            shown = of_one
        else:  # and all that are not sound, or were timed
            shown = [max(sound, key=lambda finding: finding.error / finding.allowed)] if sound else []
            shown += [each for each in of_one if not each.sound or (each.speed and each not in shown)]
        for i, finding in enumerate(shown):
            row(finding, f"{len(sound)} of {len(of_one)} sound" if i == 0 else "")
    console.print(checks)
    return [finding.operation for finding in findings if not finding.sound]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(quailora.__version__)
        raise typer.Exit


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C ends the command with what is kept, in one line, and the shell's own exit status for it."""
    try:
        yield
    except KeyboardInterrupt as interruption:
        typer.echo(str(interruption) or "interrupted", err=True)
        raise typer.Exit(130) from interruption


def _target_modules(text: str) -> str | list[str]:
    """Names are separated by commas; anything that could not be a name is a regular expression, as PEFT takes it."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    plain = all(re.fullmatch(r"[\w.-]+", name) for name in names)
    return names if plain and text != "all-linear" else text


def _check_whole(quant: Quant | None, double: bool | None, compute: Dtype | None) -> None:
    if quant is None and (double is not None or compute is not None):
        given = "--compute-dtype" if double is None else "--double-quant" if double else "--no-double-quant"
        raise QuailoraError(f"{given} says how --quant quantises the base: give that too, or leave both to the record")


def _quantization(quant: Quant, double: bool | None, compute: Dtype | None, dtype: torch.dtype) -> BitsAndBytesConfig:
    from transformers import BitsAndBytesConfig

    from quailora.pipeline import default_quantization

    if quant is Quant.int8:
        return BitsAndBytesConfig(load_in_8bit=True)
    config = default_quantization(_torch_dtype(compute) or dtype)
    config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant = quant.value, double is not False
    config.bnb_4bit_compute_dtype = _torch_dtype(compute) or config.bnb_4bit_compute_dtype
    return config


def _torch_dtype(dtype: Dtype | None) -> torch.dtype | None:
    import torch

    return None if dtype is None else getattr(torch, dtype.value)


def main() -> None:
    """The console script: what a user can mend is one line on standard error and exit status 1; a bug keeps its
    traceback."""
    # One progress bar and our own words are what a person should see, not the libraries' remarks on our use of them.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when it is imported, which only commands do
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(bitsandbytes|peft|transformers|torch)\b")
    try:
        app()
    except QuailoraError as error:
        several = os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ
        rank = f" (process {os.environ['RANK']})" if several else ""
        line = Text.assemble((f"error{rank}:", "bold red"), " ", " ".join(str(error).split()))
        Console(stderr=True, highlight=False).print(line, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
