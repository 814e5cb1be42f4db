"""The steps of a block, each alone: as the loaded PEFT model computes it, with gradients, on one or two streams."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quailora.calibration.block import in_place
from quailora.calibration.gram import Gram
from tests.helpers.blocks import KINDS, Case, open_case


@pytest.fixture(params=KINDS)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Case]:
    with open_case(tmp_path, request.param) as found:
        yield found


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
