"""`exact_products` beside whatever a caller allows, by either of torch's interfaces."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from quailora.ops.precision import exact_products

CUDA, CPU = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


def settings() -> tuple[Any, ...]:
    """All that the caller can see; reading the older interface is an error where it contradicts the newer."""
    seen: list[Any] = [torch.backends.fp32_precision, CUDA.fp32_precision, CPU.fp32_precision]
    for read in (torch.get_float32_matmul_precision, lambda: CUDA.allow_tf32):
        try:
            seen.append(read())
        except RuntimeError:
            seen.append("contradiction")
    return tuple(seen)


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = torch.backends.fp32_precision, CUDA.fp32_precision, CPU.fp32_precision
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision, CUDA.fp32_precision, CPU.fp32_precision = before


CALLERS: dict[str, Callable[[], object]] = {
    "nothing": lambda: None,
    "older": lambda: torch.set_float32_matmul_precision("high"),
    "older, bf16": lambda: torch.set_float32_matmul_precision("medium"),
    "older, CUDA": lambda: setattr(CUDA, "allow_tf32", True),
    "newer": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "newer, CUDA": lambda: setattr(CUDA, "fp32_precision", "tf32"),
    "newer, CPU": lambda: setattr(CPU, "fp32_precision", "bf16"),
    "both": lambda: (setattr(CUDA, "allow_tf32", True), setattr(CUDA, "fp32_precision", "ieee")),
}


@pytest.mark.parametrize("caller", CALLERS)
def test_the_callers_settings_are_out_of_force_and_return(caller: str) -> None:
    CALLERS[caller]()
    before = settings()
    for _ in range(2):
        with pytest.raises(KeyError), exact_products(torch.device("cpu")):
            # What torch.compile reads, too.
            assert settings()[1:] == ("ieee", "ieee", "highest", False)
            raise KeyError
        assert settings() == before
