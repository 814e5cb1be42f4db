"""Which linears of a block can be fitted on the inputs behind quantized layers."""

import torch
from torch import Tensor, nn

from quailora.calibration.block import BlockRun
from quailora.calibration.calls import Call
from quailora.calibration.data import Batch
from quailora.calibration.hidden_states import HiddenStates
from quailora.pipeline.depth import Depth, Streams


class Routed(nn.Module):
    """An expert gets the first two tokens only; a batch of two is all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.expert = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, hidden: Tensor) -> Tensor:
        self.expert(hidden.flatten(0, 1)[:2] * 1)
        return self.router(hidden)


def test_an_expert_that_gets_every_token_of_a_short_batch_only_is_in_no_group() -> None:
    block, lengths, cpu = Routed(), (6, 2), torch.device("cpu")
    batches = [Batch(torch.zeros(1, length, dtype=torch.int64), None) for length in lengths]
    run = BlockRun(block, cpu, torch.float32, batches, [Call((), {})] * 2)
    with HiddenStates(cpu) as full:
        for number, length in enumerate(lengths):
            full[number] = torch.randn(1, length, 4)
        found = Depth.groups(run, {"router": block.router, "expert": block.expert}, Streams(full))
    assert found == [["router"]]
