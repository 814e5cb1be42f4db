"""The steps of a block, each alone: as the loaded PEFT model computes it, with gradients, on one or two streams."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from quailora.calibration.calls import Call, Calls
from quailora.calibration.data import Batch
from quailora.calibration.gram import Gram
from quailora.calibration.hidden_states import HiddenStates
from quailora.modeling.checkpoint import Checkpoint
from quailora.modeling.streamed_model import StreamedModel
from quailora.pipeline.block import BlockRun, DeployedLinear, in_place
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


@pytest.fixture(params=["llama", "gpt2", "bf16 compute"])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Case]:
    family = "gpt2" if request.param == "gpt2" else "llama"
    compute = torch.bfloat16 if request.param == "bf16 compute" else torch.float32
    quantization: BitsAndBytesConfig = four_bits(compute=compute)
    folder = tiny.checkpoint(tmp_path / "model", family)
    build(folder, tmp_path / "adapter", quantization=quantization)
    peft = PeftModel.from_pretrained(load_base(folder, quantization), str(tmp_path / "adapter"), is_trainable=True)
    stream = StreamedModel(Checkpoint(folder), CPU, torch.float32)
    with stream.resident(*stream.outside_blocks()):
        embedded, calls = Calls(stream).record(BATCH)
    with stream.resident(*(f"{block.name}." for block in stream.blocks)):
        yield Case(stream, peft, embedded, calls)


def linears(case: Case, index: int) -> dict[str, nn.Module]:
    return case.stream.blocks[index].linears()


def test_in_place_it_computes_what_the_loaded_model_does(case: Case) -> None:
    runs, states = case.runs()
    with torch.no_grad():
        with case.peft_block(0) as seen:
            case.run_peft()
        [(hidden, expected)] = seen
        assert torch.equal(states[0], hidden)
        plain = runs[0].forward(0, hidden)
        with in_place(linears(case, 0), case.deployed(0)):
            got = runs[0].forward(0, hidden)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert (plain - expected).norm() > 10 * (got - expected).norm()  # in full precision it is another block
    with torch.no_grad():
        assert torch.equal(runs[0].forward(0, hidden), plain)  # and that is what it is again


def test_its_gradients_are_those_of_training(case: Case) -> None:
    runs, _ = case.runs()
    with case.peft_block(0) as seen:
        case.run_peft()
    [(hidden, output)] = seen
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    (output * weights).sum().backward()
    deployed = case.deployed(0)
    for each in deployed.values():
        each.A.requires_grad_(), each.B.requires_grad_()
    with in_place(linears(case, 0), deployed):
        (runs[0].forward(0, hidden.detach()) * weights).sum().backward()
    tolerance = 2e-2 if next(iter(deployed.values())).Q.dtype == torch.bfloat16 else 1e-3
    for name, each in deployed.items():
        layer: Any = case.peft.get_base_model().get_submodule(name)
        expected = layer.lora_A["default"].weight.grad.T  # with the scaling in A, B is lora_A itself
        assert each.B.grad is not None
        assert (each.B.grad - expected).norm() <= tolerance * expected.norm(), name


def test_two_streams_meet_the_inputs_of_each_prefix(case: Case) -> None:
    """Full precision moves on with H; the quantized prefix moves on with Q and the factors in place."""
    runs, full = case.runs()
    _, quantized = case.runs()
    name = next(iter(linears(case, 1)))
    expected: list[Tensor] = []
    module = case.peft.get_base_model().get_submodule(name)
    hook = module.register_forward_pre_hook(lambda module, args: expected.append(args[0].detach()))
    with torch.no_grad():
        case.run_peft()
        hook.remove()
        grams = runs[0].capture(linears(case, 0), full)
        assert set(grams) == set(linears(case, 0))
        with in_place(linears(case, 0), case.deployed(0)):
            runs[0].propagate(quantized)
        of_full = runs[1].capture({name: linears(case, 1)[name]}, full, propagate=False)[name].matrix().clone()
        of_quantized = runs[1].capture({name: linears(case, 1)[name]}, quantized)[name].matrix()
    h = Gram(expected[0].shape[-1])
    h.update(expected[0])
    torch.testing.assert_close(of_quantized, h.matrix(), rtol=1e-3, atol=1e-3 * float(h.matrix().max()))
    assert (of_full - h.matrix()).norm() > 2 * (of_quantized - h.matrix()).norm()


def test_an_error_within_leaves_the_block_as_it_was(case: Case) -> None:
    with pytest.raises(RuntimeError, match="planted"), in_place(linears(case, 0), case.deployed(0)):
        raise RuntimeError("planted")
    assert all("forward" not in vars(module) for module in linears(case, 0).values())
