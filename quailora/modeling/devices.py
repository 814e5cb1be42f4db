"""Which device to compute on, whatever torch's defaults are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from quailora.errors import QuailoraError


def default_device(device: str | torch.device | None) -> torch.device:
    """The device named; None is CUDA if there is one, else the CPU. Raises QuailoraError if it cannot be used or has no
    fp64."""
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, dtype=torch.float64, device=chosen).device
    except (RuntimeError, AssertionError, TypeError) as error:  # torch built without CUDA asserts; MPS has no fp64
        reason = str(error).partition("\n")[0]
        raise QuailoraError(
            f"device (--device) '{chosen}' cannot be used here: {reason}; name another, such as cpu"
        ) from error


@contextmanager
def without_torch_modes() -> Iterator[None]:
    """Within it the caller's inference mode and default device are off: tensors made in inference mode cannot
    be changed in place or used as fake tensors later, and everything here names its device or means the CPU."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield
