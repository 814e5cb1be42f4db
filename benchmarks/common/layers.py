"""The full-precision weight and H of every linear layer of a small model, all in memory."""

import torch
from torch import Tensor

from quailora import ops
from quailora.calibration.calls import Calls
from quailora.calibration.data import Calibration
from quailora.calibration.gram import Gram
from quailora.calibration.hooks import collect
from quailora.modeling.blocks import linear_weight
from quailora.modeling.checkpoint import Checkpoint
from quailora.modeling.streamed_model import StreamedModel


@torch.no_grad()
def gather(checkpoint: Checkpoint, calibration: Calibration) -> dict[str, tuple[Tensor, Gram]]:
    """Name of a linear -> its weight (m, n) and the H of its inputs, by one forward pass in full precision."""
    model = StreamedModel(checkpoint, torch.device("cpu"), checkpoint.dtype)
    found: dict[str, tuple[Tensor, Gram]] = {}
    batches = list(calibration.batches(8))
    with model.resident(*model.outside_blocks()):
        recorder = Calls(model)
        recorded = [recorder.record(batch) for batch in batches]
    states = [hidden for hidden, _ in recorded]
    for index, block in enumerate(model.blocks):
        linears = block.linears()
        with model.resident(f"{block.name}."):
            with ops.half_products(model.device, [model.dtype]), collect(linears) as collector:
                for number, (batch, (_, calls)) in enumerate(zip(batches, recorded, strict=True)):
                    with collector.batch(batch.keep):
                        states[number] = calls[index].run(block.module, states[number])
            found |= {name: (linear_weight(linears[name]).clone(), gram) for name, gram in collector.grams.items()}
    return found
