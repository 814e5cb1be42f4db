"""`quailora plan`: the memory, FLOPs and time of a run."""

from __future__ import annotations

from typing import Annotated

import typer

from quailora.cli.options import (
    AutoClassOption,
    BatchOption,
    CheckpointArgument,
    ComputeOption,
    DoubleOption,
    HostMemoryOption,
    LengthOption,
    LoadedOption,
    MemoryOption,
    QuantOption,
    RemoteOption,
    RevisionOption,
    parse_target_modules,
    quantization_config,
    torch_dtype,
)
from quailora.quantization.registry import Format


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
    iterations: Annotated[
        int | None, typer.Option(help="Depth of krylov (default 3) or alternations of als (20).")
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration sequences.", min=1)] = 2000,
    sequence_length: LengthOption = None,
    batch_size: BatchOption = None,
    device: Annotated[
        str | None,
        typer.Option(help="Device of the run; cuda may be absent here. Default: CUDA if there is a GPU, else cpu."),
    ] = None,
    revision: RevisionOption = None,
    trust_remote_code: RemoteOption = False,
    auto_class: AutoClassOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Show what `init` would need: memory by use, FLOPs, and an estimate of the time.

    No weights are read or downloaded; for a model on the hub, the headers of its files are enough.
    """
    from json import dumps

    import torch
    from peft import LoraConfig

    from quailora.adapters.skeleton import targeted_skeleton
    from quailora.adapters.targets import find_targets
    from quailora.calibration.data import SEQUENCE_LENGTH
    from quailora.memory.budget import MemoryConfig
    from quailora.memory.planner import make_plan
    from quailora.modeling.checkpoint import Checkpoint
    from quailora.modeling.devices import default_device
    from quailora.modeling.streamed_model import StreamedModel
    from quailora.quantization.registry import from_config
    from quailora.solvers.config import SolverConfig

    settings = SolverConfig(solver, iterations)
    memory = MemoryConfig(memory_budget, host_memory_budget, batch_size)  # checked first: a typo costs no download
    absent = (device or "").partition(":")[0] == "cuda" and not torch.cuda.is_available()
    place = torch.device("cuda") if absent else default_device(device)
    source = Checkpoint(
        checkpoint, revision=revision, trust_remote_code=trust_remote_code, auto_class=auto_class, headers_only=True
    )
    loaded_as = torch_dtype(dtype) or source.dtype
    quantization = quantization_config(quant or Format.nf4, double_quant, compute_dtype, loaded_as)
    config = LoraConfig(r=rank, target_modules=parse_target_modules(target_modules), task_type="CAUSAL_LM")
    model, _ = targeted_skeleton(source, quantization, loaded_as, config)
    targets, _ = find_targets(model)
    positions = getattr(source.config.get_text_config(decoder=True), "max_position_embeddings", None)
    found = make_plan(
        StreamedModel(source, torch.device("cpu") if absent else place, loaded_as),
        {target.name: target.rank for target in targets},
        from_config(quantization),
        settings,
        samples=samples,
        sequence_length=sequence_length or min(SEQUENCE_LENGTH, positions or SEQUENCE_LENGTH),
        memory_budget=memory.device_bytes,
        host_memory_budget=memory.host_bytes,
        batch_size=memory.batch_size,
        device=place,
        timed=True,
    )
    typer.echo(dumps(found.to_dict(), indent=2) if json else found.text())
