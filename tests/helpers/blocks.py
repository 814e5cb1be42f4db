"""The blocks of a tiny model, streamed, beside the model that a fine-tune loads over the same checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from quailora.calibration.block import BlockRun, DeployedLinear
from quailora.calibration.calls import Call, Calls
from quailora.calibration.data import Batch
from quailora.calibration.hidden_states import HiddenStates
from quailora.modeling.checkpoint import Checkpoint
from quailora.modeling.streamed_model import StreamedModel
from quailora.quantization.registry import read
from tests.helpers import tiny
from tests.integration.test_pipeline import build, four_bits, load_base

CPU = torch.device("cpu")
TOKENS = torch.stack([sequence[:8] for sequence in tiny.sequences(seed=3)])
BATCH = Batch(TOKENS, None)


@dataclass
class Case:
    """A streamed full-precision model with all of it resident, and the fine-tune's model over the same checkpoint."""

    stream: StreamedModel
    peft: PeftModel
    embedded: Tensor
    calls: list[Call]  # by block

    def runs(self) -> tuple[list[BlockRun], HiddenStates]:
        """The blocks in order, and the hidden states that enter the first, in a container of their own."""
        states = HiddenStates(CPU)
        states[0] = self.embedded
        blocks = [
            BlockRun(block.module, CPU, torch.float32, [BATCH], [call])
            for block, call in zip(self.stream.blocks, self.calls, strict=True)
        ]
        return blocks, states

    def deployed(self, index: int) -> dict[str, DeployedLinear]:
        """Q and the factors of a block, as the loaded model has them."""
        found = {}
        for name in self.stream.blocks[index].linears():
            layer: Any = self.peft.get_base_model().get_submodule(name)
            assert isinstance(layer, LoraLayer)
            scale = layer.scaling["default"]
            a, b = layer.lora_B["default"].weight.detach() * scale, layer.lora_A["default"].weight.detach().T
            found[name] = DeployedLinear(read(layer.get_base_layer()).dequantize(), a.clone(), b.clone())
        return found

    @contextmanager
    def peft_block(self, index: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Within it, the (input, output) of that block whenever the fine-tune's model runs."""
        seen: list[tuple[Tensor, Tensor]] = []

        def record(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            seen.append((hidden, out[0] if isinstance(out, tuple) else out))

        module = self.peft.get_base_model().get_submodule(self.stream.blocks[index].name)
        hook = module.register_forward_hook(record, with_kwargs=True)
        try:
            yield seen
        finally:
            hook.remove()

    def run_peft(self) -> Any:
        self.peft.train()  # in eval mode bitsandbytes may take a CPU kernel that rounds otherwise
        return self.peft(input_ids=TOKENS, use_cache=False)


KINDS = ("llama", "gpt2", "bf16 compute")


@contextmanager
def open_case(folder: Path, kind: str) -> Iterator[Case]:
    """kind: one of KINDS."""
    family = "gpt2" if kind == "gpt2" else "llama"
    compute = torch.bfloat16 if kind == "bf16 compute" else torch.float32
    quantization: BitsAndBytesConfig = four_bits(compute=compute)
    model = tiny.checkpoint(folder / "model", family)
    build(model, folder / "adapter", quantization=quantization)
    peft = PeftModel.from_pretrained(load_base(model, quantization), str(folder / "adapter"), is_trainable=True)
    stream = StreamedModel(Checkpoint(model), CPU, torch.float32)
    with stream.resident(*stream.outside_blocks()):
        embedded, calls = Calls(stream).record(BATCH)
    with stream.resident(*(f"{block.name}." for block in stream.blocks)):
        yield Case(stream, peft, embedded, calls)
