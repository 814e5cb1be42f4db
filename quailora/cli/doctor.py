"""`quailora doctor`: versions, devices, backends, and each operation against its reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

import quailora
from quailora.errors import QuailoraError
from quailora.quantization.registry import LIBRARIES
from quailora.reporting.markdown import count

if TYPE_CHECKING:
    import torch


def doctor(
    every: Annotated[
        bool, typer.Option("--all", help="Print every case, not only the worst of each operation.")
    ] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="First time the kernels' settings on each GPU, and keep the fastest.")
    ] = False,
    only: Annotated[
        str | None,
        typer.Option(
            "--device",
            help="Check only this device, such as cuda:0, or all of a type, such as cuda; fail if there is none, or a "
            "GPU served by plain PyTorch.",
        ),
    ] = None,
) -> None:
    """Show versions and devices, and the backend of each operation; check that each computes what it should.

    Exits with an error if one does not, so it can be used in scripts.
    """
    import platform
    from importlib.metadata import version

    import torch

    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    devices = [torch.device("cpu"), *gpus]
    if only is not None:
        known, devices = devices, [device for device in devices if only in (str(device), device.type)]
        gpus = [device for device in gpus if device in devices]
        if not devices:
            raise QuailoraError(f"there is no {only} here; there are {', '.join(map(str, known))}")
    if tune:
        _tune(gpus)
    typer.echo(f"quailora {quailora.__version__}, Python {platform.python_version()}, {platform.platform()}")
    typer.echo(", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", *LIBRARIES)))
    unsound = [operation for device in devices for operation in _examined(device, every)]
    if unsound:
        raise QuailoraError(
            f"{', '.join(dict.fromkeys(unsound))}: results differ from the reference. Do not trust results of this "
            "installation on that device; please report the tables above"
        )
    for gpu in gpus if only is not None else []:
        services = quailora.backends(gpu).items()
        plain = [name for name, service in services if service.backend == "reference" and service.others]
        if plain:
            raise QuailoraError(f"{gpu}: plain PyTorch serves {', '.join(plain)}; the table above says why")


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
                f"the timings cannot be saved: {error}; XDG_CACHE_HOME may name another folder"
            ) from error
        typer.echo(f"{count(len(fastest), 'setting')} saved in {settings.timings_file(gpu)}")


def _examined(device: torch.device, every: bool) -> list[str]:
    """Print the tables of a device. Returns the operations whose results are wrong."""
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
        else:  # and every case that is not sound or was timed
            shown = [max(sound, key=lambda finding: finding.error / finding.allowed)] if sound else []
            shown += [each for each in of_one if not each.sound or (each.speed and each not in shown)]
        for i, finding in enumerate(shown):
            row(finding, f"{len(sound)} of {len(of_one)} sound" if i == 0 else "")
    console.print(checks)
    return [finding.operation for finding in findings if not finding.sound]
