"""Block-wise refinement: A and B of all linears of a block, trained together for the block's output.

Layer by layer, every linear is fitted alone, on inputs of the full-precision model. Here the block is run as it will be
deployed, on hidden states x̂ that come out of the quantized blocks before it, and A and B minimize

    mean over tokens of ‖f̂(x̂) - f(x)‖² / ‖f(x)‖²

where f is the block in full precision, f̂ with Q + A Bᵀ, and x the hidden states of the full-precision model. So the
block also undoes, as far as it can, what the blocks before it left. (ApiQ, arXiv 2402.05147, trains by blocks too.)
The error is relative for each token, or the first few, with norms far above all others, would be all that counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import torch
from torch import Tensor, nn

from quailora import ops
from quailora.calibration.block import BlockRun, DeployedLinear, in_place
from quailora.calibration.data import Batch
from quailora.calibration.distributed import Processes
from quailora.calibration.hidden_states import HiddenStates
from quailora.errors import NotFiniteError
from quailora.refinement.config import RefinementConfig
from quailora.reporting.report import BlockReport


def refine_block(
    run: BlockRun,
    linears: Mapping[str, nn.Module],
    deployed: Mapping[str, DeployedLinear],
    inputs: HiddenStates,
    targets: HiddenStates,
    config: RefinementConfig,
    processes: Processes,
    *,
    name: str,
    seed: int = 0,
) -> tuple[dict[str, DeployedLinear], BlockReport]:
    """The linears with the A and B that did best on held-out tokens, which may be those given; and what was done.

    deployed: every quantized linear of the block, with A and B (fp32) where an adapter is on it.
    inputs, targets: by batch, the hidden states that the deployed block gets, and the output of the full-precision one.
    seed: of the order of the data.

    Where the loss is no longer finite, `BlockReport.stopped` says so. With several processes each has its share of the
    batches, and all end with the same factors.

    Raises NotFiniteError where the error is not finite to begin with.
    """
    start = perf_counter()
    trained = {
        key: replace(each, A=each.A.clone().requires_grad_(), B=each.B.clone().requires_grad_())
        for key, each in deployed.items()
        if each.A is not None and each.B is not None
    }
    block = _Block(run, linears, {**deployed, **trained}, inputs, targets, processes)
    train, held_out = _steps(run.batches, config, processes)
    parameters = [side for each in trained.values() for side in (each.A, each.B) if side is not None]
    adam = torch.optim.Adam(parameters, betas=_BETAS)
    generator = torch.Generator().manual_seed(seed)
    with ops.half_products(run.device, [run.dtype]):
        first, tokens = block.error(held_out)
        if not math.isfinite(first):
            raise NotFiniteError(f"the output of {name} with quantized weights is not finite")
        best, kept, since, stopped = first, 0, 0, ""
        copies = [side.detach().clone() for side in parameters]
        order: list[list[int]] = []
        for step in range(1, config.steps + 1):
            if since == config.patience:
                break
            order = order or [train[i] for i in torch.randperm(len(train), generator=generator).tolist()]
            if not math.isfinite(block.gradients(order.pop(), parameters)):
                stopped = f"the loss was not finite in step {step}"
                break
            adam.param_groups[0]["lr"] = config.rate_at(step)
            adam.step()
            if step % config.every == 0 or step == config.steps:
                error, _ = block.error(held_out)
                since += 1
                if error < best:
                    best, kept, since = error, step, 0
                    copies = [side.detach().clone() for side in parameters]
    sides = iter(copies)
    refined = {key: replace(each, A=next(sides), B=next(sides)) for key, each in trained.items()}
    row = BlockReport(name, tokens, math.sqrt(first), math.sqrt(best), kept, stopped, perf_counter() - start)
    return {**deployed, **refined}, row


@dataclass(frozen=True, eq=False)
class _Block:
    """The deployed block, whose A and B require gradients."""

    run: BlockRun
    linears: Mapping[str, nn.Module]
    deployed: Mapping[str, DeployedLinear]
    inputs: HiddenStates
    targets: HiddenStates
    processes: Processes

    def error(self, numbers: Sequence[int]) -> tuple[float, int]:
        """The mean relative squared error over the tokens of these batches of all processes, and their count."""
        total = torch.zeros(2, dtype=torch.float64, device=self.run.device)
        with torch.no_grad():
            for number in numbers:
                total += torch.stack(self._squares(number))
        self.processes.sum([total])
        error, tokens = total.tolist()
        return error / tokens, int(tokens)

    def gradients(self, numbers: Sequence[int], parameters: Sequence[Tensor]) -> float:
        """Set the gradients of that error. Returns it."""
        total = torch.zeros(2, device=self.run.device)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        for number in numbers:
            with torch.enable_grad():
                error, tokens = self._squares(number)
                (error * _SCALE).backward()
            total += torch.stack([error.detach(), tokens])
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        self.processes.sum([*grads, total])
        error, tokens = total.tolist()
        for grad in grads:
            grad /= tokens * _SCALE
        return error / tokens

    def _squares(self, number: int) -> tuple[Tensor, Tensor]:
        """The sum of the relative squared errors of a batch's tokens, fp32; and their count."""
        casts = {key: each.computing_in(self.run.dtype) for key, each in self.deployed.items()}
        with in_place(self.linears, casts):
            output = self.run.forward(number, self.inputs[number]).float()
        target = self.targets[number].float()
        errors = (output - target).square().sum(-1) / target.square().sum(-1).clamp_min(_TINY)
        keep = self.run.batches[number].keep
        if keep is not None:
            errors = errors[keep.to(errors.device)]
        return errors.sum(), errors.new_tensor(errors.numel())


_SCALE = 1024.0  # of the loss: a hidden state's gradient is a share of a squared norm, too small for float16
_BETAS = (0.9, 0.95)  # of Adam: a few dozen steps are too few for a longer memory than that of 20 gradients
_TINY = torch.finfo(torch.float32).tiny


def _steps(
    batches: Sequence[Batch], config: RefinementConfig, processes: Processes
) -> tuple[list[list[int]], list[int]]:
    """This rank's batches for each step, as many lists on every rank; and those held out: every so many, so that they
    are of all lengths."""
    mine = sum(len(batch.input_ids) for batch in batches)
    most = processes.maximum(mine)
    longest = processes.maximum(max((batch.input_ids.shape[1] for batch in batches), default=1))
    sequences = min(max(1, config.tokens // (longest * processes.size)), max(1, most // 2))
    size = -(-sequences // max((len(batch.input_ids) for batch in batches), default=1))  # batches in a step
    count = processes.maximum(-(-len(batches) // size))
    steps = [list(range(len(batches)))[i * size : (i + 1) * size] for i in range(count)]
    every = min(config.held_out, count)
    held_out = [i for i in range(count) if i % every == every // 2]
    return [step for i, step in enumerate(steps) if i not in held_out], [n for i in held_out for n in steps[i]]
