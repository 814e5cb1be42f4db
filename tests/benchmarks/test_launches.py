"""The launches of a solve on a GPU: counted right, as many as the documentation says, and no more than that."""

from collections import Counter

import pytest
import torch

from tests.helpers import ROOT

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from benchmarks.common.fake_cuda import CUDA, fake_cuda
from benchmarks.common.tables import read_json
from benchmarks.kernels import launches

MOST = 1_450  # of a block of Llama-2-7B


@triton.jit
def fill(pointer):
    tl.store(pointer, 0)


def test_what_is_launched_is_counted() -> None:
    counts: Counter[str] = Counter()
    with fake_cuda(lambda *args, **kwargs: counts.update(["triton"]), indexing=launches._Copies(counts)):
        x, index = torch.empty(4, 4, device=CUDA), torch.empty(4, device=CUDA, dtype=torch.int64)
        with launches._Operations(counts):
            torch.empty(3)  # not on the GPU, nor any work
            (x[1:, 0], x.T, x.view(16), x.new_empty(3), x.split(2), x.float(), x.detach())  # no launches
            x + 1
            x.add_(1)
            x.T.contiguous()
            x[0] = index
            x.copy_(torch.empty(4, 4))
            torch.where(x > 0, x, 0.0)
            torch.linalg.eigh(x)
            fill[(1,)](x)
    one = ("add", "add_", "gt", "where", "scalar_tensor", "_linalg_eigh 4 × 4, float32")
    assert counts == {**{f"aten.{name}": 1 for name in one}, "aten.copy_": 3, "triton": 1}


@pytest.mark.slow
def test_launches_of_a_block() -> None:
    groups = launches.count("7b", 64)
    record = read_json(ROOT / "docs" / "results" / "speed" / "launches.json")
    assert record is not None
    assert launches.total(groups) <= MOST, launches.table({"groups": groups})
    assert groups == record["groups"], "run benchmarks/kernels/launches.py --json docs/results/speed/launches.json"
