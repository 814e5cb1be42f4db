"""The decoder blocks of a model, and their linears."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from quailora.errors import CheckpointError


@dataclass(frozen=True)
class Block:
    """One decoder block: its name in the model and its module, whose parameters are on the meta device while not
    resident."""

    name: str
    module: nn.Module

    def linears(self) -> dict[str, nn.Module]:
        """Every linear of the block by its full name. GPT-2's Conv1D counts as one; its weight is transposed."""
        return {
            f"{self.name}.{name}": module
            for name, module in self.module.named_modules()
            if isinstance(module, nn.Linear | Conv1D)
        }


def linear_weight(linear: nn.Module) -> Tensor:
    """The weight of a linear as (outputs m, inputs n); Conv1D stores it as (n, m)."""
    weight = linear.get_parameter("weight").detach()
    return weight.T.contiguous() if isinstance(linear, Conv1D) else weight


def linear_shape(linear: nn.Module) -> tuple[int, int]:
    """Outputs m and inputs n."""
    outputs, inputs = linear_weight(linear).shape
    return outputs, inputs


def find_blocks(model: PreTrainedModel, decoder: nn.Module) -> list[Block]:
    """The decoder's blocks: the outermost list with as many modules as the configuration has layers."""
    depth = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    lists = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    blocks = next((m for m in lists if len(m) == depth), None)
    if blocks is None:
        raise CheckpointError(
            f"{type(model).__name__} has no list of {depth} decoder blocks, found lists of "
            f"{sorted({len(m) for m in lists})}: this architecture is not supported"
        )
    names = {id(module): name for name, module in model.named_modules()}
    return [Block(names[id(module)], module) for module in blocks]
