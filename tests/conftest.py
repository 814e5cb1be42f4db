"""Settings every test runs under."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parent.parent

# `python -m pytest` puts the root on the path, where our folder `kernels/` would answer transformers' `import kernels`.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]

# No test needs a model hub; without this, one that asks it for a missing file waits for its time-outs first.
os.environ["HF_HUB_OFFLINE"] = "1"

# Tests run side by side, one process to a core, and their models are tiny: more threads would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def slow_halves(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Says in which dtypes torch's own products are slow on this CPU, whatever it is."""
    from quailora.ops import cpu_matmul as half
    from quailora.ops import dispatch

    def say(*dtypes: "torch.dtype") -> None:
        monkeypatch.setattr(half, "slow_dtypes", lambda: dtypes)
        dispatch._choose.cache_clear()

    yield say
    dispatch._choose.cache_clear()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
