"""Refining a block: the gradient is that of training, and what did best on held-out tokens is kept."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quailora.calibration.block import BlockRun, DeployedLinear, in_place
from quailora.calibration.calls import Call
from quailora.calibration.data import Batch
from quailora.calibration.distributed import Processes
from quailora.calibration.hidden_states import HiddenStates
from quailora.errors import NotFiniteError, QuailoraError
from quailora.refinement.blocks import _Block, _steps, refine_block
from quailora.refinement.config import RefinementConfig, refinement_config
from quailora.reporting.report import BlockReport
from tests.helpers.blocks import CPU, KINDS, open_case

ALONE = Processes()


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_loaded_model(kind: str, tmp_path: Path) -> None:
    """Of the second block, for what the quantized first one gives it, by autograd through PEFT's model."""
    with open_case(tmp_path, kind) as case:
        runs, full = case.runs()
        with torch.no_grad():
            for run in runs:
                run.propagate(full)
        with case.peft_block(1) as seen:
            case.run_peft()
        [(hidden, output)] = seen
        errors = (output - full[0]).square().sum(-1) / full[0].square().sum(-1)
        errors.mean().backward()

        inputs = states(hidden.detach())
        deployed = case.deployed(1)
        for each in deployed.values():
            assert each.A is not None and each.B is not None
            each.A.requires_grad_(), each.B.requires_grad_()
        block = _Block(runs[1], case.stream.blocks[1].linears(), deployed, inputs, full, ALONE)
        sides = [side for each in deployed.values() for side in (each.A, each.B)]
        assert block.gradients([0], sides) == pytest.approx(errors.mean().item(), rel=1e-3)
        tolerance = 2e-2 if kind == "bf16 compute" else 1e-3
        for name, each in deployed.items():
            layer: Any = case.peft.get_base_model().get_submodule(name)
            scale = layer.scaling["default"]
            # lora_B is A over the scaling; lora_A is B.
            for side, weight, factor in ((each.A, layer.lora_B, 1 / scale), (each.B.T, layer.lora_A, 1.0)):
                got = side.grad if side is each.A else each.B.grad.T
                expected = weight["default"].weight.grad * factor
                assert (got - expected).norm() <= tolerance * expected.norm(), name


# ---- a linear in place of a block, to see what is done with it


N, RANK, LENGTH = 16, 2, 4


class Problem:
    """y = W x is to be computed by Q + A Bᵀ, where W - Q has rank 2: there is an A Bᵀ without error."""

    def __init__(self, sequences: int = 8, lengths: tuple[int, ...] | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        random = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        self.linear = torch.nn.Linear(N, N, bias=False).requires_grad_(False)
        self.linear.weight.copy_(random(N, N) / N**0.5)
        q = self.linear.weight - 0.3 * random(N, RANK) @ random(RANK, N)
        self.start = DeployedLinear(q, 0.1 * random(N, RANK), 0.1 * random(N, RANK))
        self.batches = []
        self.inputs, self.targets = HiddenStates(CPU), HiddenStates(CPU)
        for number in range(sequences // 2):
            x = random(2, LENGTH, N)
            self.inputs[number], self.targets[number] = x, self.linear(x)
            keep = None if lengths is None else torch.arange(LENGTH) < torch.tensor(lengths)[:, None]
            self.batches.append(Batch(torch.zeros(2, LENGTH, dtype=torch.int64), keep))

    def refine(self, **settings: Any) -> tuple[DeployedLinear, BlockReport]:
        config = RefinementConfig(**{"steps": 60, "rate": 0.05, "tokens": 2 * LENGTH, "every": 10} | settings)
        run = BlockRun(self.linear, CPU, torch.float32, self.batches, [Call((), {})] * len(self.batches))
        refined, row = refine_block(
            run, {"w": self.linear}, {"w": self.start}, self.inputs, self.targets, config, ALONE, name="the block"
        )
        return refined["w"], row

    def error(self, deployed: DeployedLinear, numbers: list[int]) -> float:
        """By hand."""
        assert deployed.A is not None and deployed.B is not None
        weight = deployed.Q + deployed.A @ deployed.B.T
        ratios = []
        for number in numbers:
            y = self.targets[number]
            ratios.append((self.inputs[number] @ weight.T - y).square().sum(-1) / y.square().sum(-1))
        return float(torch.cat(ratios).mean().sqrt())


def test_it_finds_factors_that_do_better_on_held_out_tokens() -> None:
    problem = Problem()
    deployed, row = problem.refine()
    assert row.error_after < 0.3 * row.error
    held_out = [2]  # of four steps with a batch each
    assert row.error == pytest.approx(problem.error(problem.start, held_out), rel=1e-5)
    assert row.error_after == pytest.approx(problem.error(deployed, held_out), rel=1e-5)
    assert row.tokens == 2 * LENGTH and row.steps > 0 and row.stopped == ""
    assert deployed.A is not None and not deployed.A.requires_grad


def test_held_out_tokens_are_not_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    used, gradients = [], _Block.gradients

    def record(self: _Block, numbers: list[int], parameters: list[Tensor]) -> float:
        used.append(numbers)
        return gradients(self, numbers, parameters)

    monkeypatch.setattr(_Block, "gradients", record)
    Problem().refine(steps=6)
    assert sorted(used[:3]) == sorted(used[3:]) == [[0], [1], [3]]
    assert used[:3] != used[3:]  # in another order


def test_where_nothing_does_better_the_factors_stay_what_they_were() -> None:
    problem = Problem()
    deployed, row = problem.refine(rate=100.0)
    assert (row.steps, row.error_after) == (0, row.error)
    assert deployed.A is not None and problem.start.A is not None and torch.equal(deployed.A, problem.start.A)


def test_it_ends_once_nothing_gets_better(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = itertools.count()
    gradients = _Block.gradients
    monkeypatch.setattr(_Block, "gradients", lambda *args: (next(steps), gradients(*args))[1])
    Problem().refine(rate=100.0, patience=2)
    assert next(steps) == 2 * 10


def test_a_loss_that_is_not_finite_ends_it_with_the_best_until_then(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, steps = Problem(), itertools.count(1)
    expected, _ = problem.refine(steps=60)
    gradients = _Block.gradients

    def planted(*args: Any) -> float:
        return float("nan") if next(steps) == 25 else gradients(*args)

    monkeypatch.setattr(_Block, "gradients", planted)
    deployed, row = problem.refine(steps=60)
    assert row.stopped == "the loss was not finite in step 25"
    assert row.steps == 20
    assert row.error_after == pytest.approx(problem.error(deployed, [2]), rel=1e-5)
    assert row.error > row.error_after > problem.error(expected, [2])


def test_an_error_that_is_not_finite_to_begin_with_names_the_block() -> None:
    problem = Problem()
    problem.start = replace(problem.start, Q=problem.start.Q * torch.inf)
    with pytest.raises(NotFiniteError, match="the output of the block with quantized weights is not finite"):
        problem.refine()


def test_padding_counts_for_nothing() -> None:
    problem, other = (Problem(lengths=(4, 2)) for _ in range(2))
    for number in range(len(other.batches)):
        other.targets[number][1, 2:] = 1e3
    (first, row), (second, its) = problem.refine(), other.refine()
    assert first.A is not None and second.A is not None and torch.equal(first.A, second.A)
    assert row.tokens == its.tokens == 6 and row.error_after == its.error_after


def test_linears_without_an_adapter_stay_as_they_are() -> None:
    problem = Problem()
    problem.start = DeployedLinear(problem.start.Q)
    run = BlockRun(problem.linear, CPU, torch.float32, problem.batches, [Call((), {})] * 4)
    x = problem.inputs[0]
    with in_place({"w": problem.linear}, {"w": problem.start}):
        assert torch.equal(run.forward(0, x), x @ problem.start.Q.T)


# ---- the data of a step


def batches_of(*sizes: int, length: int = 8) -> list[Batch]:
    return [Batch(torch.zeros(size, length, dtype=torch.int64), None) for size in sizes]


@pytest.mark.parametrize(
    "sizes, tokens, train, held_out",
    [
        ((1, 1), 8, [[0]], [1]),
        ((2, 2, 2, 1), 16, [[0], [1], [3]], [2]),
        ((1, 1, 1, 1), 16, [[0, 1]], [2, 3]),  # a step of two micro-batches
        ((1, 1, 1, 1), 10**6, [[0, 1]], [2, 3]),  # half of the data at most
        ((4,) * 40, 32, [[n] for n in range(40) if n % 16 != 8], [8, 24]),
    ],
)
def test_steps(sizes: tuple[int, ...], tokens: int, train: list[list[int]], held_out: list[int]) -> None:
    config = RefinementConfig(tokens=tokens)
    assert _steps(batches_of(*sizes), config, ALONE) == (train, held_out)


def test_settings() -> None:
    assert refinement_config(None, None, None) is None
    assert refinement_config("blocks", None, None) == RefinementConfig()
    assert refinement_config("blocks", 3, 0.5) == RefinementConfig(steps=3, rate=0.5)
    rates = [RefinementConfig(steps=12, rate=1.0, warmup=4).rate_at(step) for step in range(1, 13)]
    assert max(rates) <= 1 and rates[0] == 0.25 and rates[-1] == pytest.approx(1 / 12)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("block", None, None), r"refine='block' \(--refine\): it is 'blocks'"),
        (("blocks", 0, None), r"refine_steps \(--refine-steps\) must be a whole number, at least 1; got 0"),
        (("blocks", 2.5, None), r"whole number, at least 1; got 2.5"),
        (("blocks", True, None), r"whole number, at least 1; got True"),
        (("blocks", None, "1"), r"refine_rate \(--refine-rate\) must be a number above 0, got '1'"),
        (("blocks", None, float("nan")), r"refine_rate \(--refine-rate\) must be a number above 0, got nan"),
        ((None, 3, None), r"refine_steps \(--refine-steps\) goes with refine \(--refine\)"),
    ],
)
def test_wrong_settings(arguments: Any, said: str) -> None:
    with pytest.raises(QuailoraError, match=said):
        refinement_config(*arguments)


def states(*batches: Tensor) -> HiddenStates:
    found = HiddenStates(CPU)
    for number, hidden in enumerate(batches):
        found[number] = hidden
    return found
