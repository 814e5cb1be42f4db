"""Along the depth: what is done with a block on the hidden states of the quantized blocks before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from quailora.adapters.targets import Target
from quailora.calibration.hidden_states import HiddenStates
from quailora.pipeline.block import BlockRun, DeployedLinear, in_place
from quailora.pipeline.distributed import Processes
from quailora.pipeline.solved import Solved
from quailora.quantization.protocol import QuantizedWeight
from quailora.refinement.blocks import refine_block
from quailora.refinement.config import RefinementConfig
from quailora.reporting.report import BlockReport

# Q of a linear, and A and B as they were saved; None where no adapter is on it.
Restored = tuple[QuantizedWeight, Tensor | None, Tensor | None]


@dataclass(frozen=True, eq=False)
class Streams:
    """The hidden states of all batches.

    full: of the full-precision model. quantized: of the quantized one with its factors, where that is asked for.
    """

    full: HiddenStates
    quantized: HiddenStates | None = None

    @property
    def edits(self) -> int:
        return self.full.edits + (self.quantized.edits if self.quantized is not None else 0)

    def enter(self, number: int, hidden: Tensor) -> None:
        """Set what enters the first block, which is the same for both."""
        self.full[number] = hidden
        if self.quantized is not None:
            self.quantized[number] = hidden

    def halve(self) -> None:
        self.full.halve()
        if self.quantized is not None:
            self.quantized.halve()


@dataclass(frozen=True, eq=False)
class Depth:
    """Refinement of blocks within a run.

    restore: what a finished block was given, from its index and its linears, whose W is in memory; called on the main
        process only.
    """

    config: RefinementConfig
    seed: int
    processes: Processes
    restore: Callable[[int, Mapping[str, nn.Module]], Mapping[str, Restored]]

    def restored(self, index: int, linears: Mapping[str, nn.Module], device: torch.device) -> dict[str, DeployedLinear]:
        """A finished block's linears as they are deployed."""
        found = self.processes.broadcast(self.restore(index, linears) if self.processes.is_main else {})
        return {name: _on(device, *each) for name, each in found.items()}

    def refined(
        self,
        run: BlockRun,
        name: str,
        index: int,
        solved: Sequence[Solved],
        linears: Mapping[str, nn.Module],
        streams: Streams,
    ) -> tuple[list[Solved], dict[str, DeployedLinear], BlockReport | None]:
        """What was solved of a block with its factors refined, and the linears with them; the same on every rank. No
        report: no adapter is on the block."""
        assert streams.quantized is not None
        deployed = {}
        for each in solved:
            assert each.quantized is not None
            sides = (each.factors.A, each.factors.B) if each.factors is not None else (None, None)
            deployed[each.name] = _on(run.device, each.quantized, *sides)
        if all(each.A is None for each in deployed.values()):
            return list(solved), deployed, None
        deployed, row = refine_block(
            run,
            linears,
            deployed,
            streams.quantized,
            streams.full,
            self.config,
            self.processes,
            name=name,
            seed=self.seed + index,
        )
        return [_with(each, deployed[each.name]) for each in solved], deployed, row

    @staticmethod
    def as_saved(
        deployed: Mapping[str, DeployedLinear], targets: Mapping[str, Target | None]
    ) -> dict[str, DeployedLinear]:
        """The same with A and B as a run that resumes this one will read them."""
        found = dict(deployed)
        for name, each in deployed.items():
            target = targets.get(name)
            if target is not None and each.A is not None and each.B is not None:
                a, b = target.factors(*target.weights(each.A, each.B))
                found[name] = replace(each, A=a, B=b)
        return found

    @staticmethod
    def advance(
        run: BlockRun, linears: Mapping[str, nn.Module], deployed: Mapping[str, DeployedLinear], streams: Streams
    ) -> None:
        """Move the quantized stream on to the next block."""
        assert streams.quantized is not None
        with in_place(linears, deployed):
            run.propagate(streams.quantized)


def _on(device: torch.device, quantized: QuantizedWeight, a: Tensor | None, b: Tensor | None) -> DeployedLinear:
    q = quantized.to(device).dequantize()
    return DeployedLinear(q, None if a is None else a.to(device), None if b is None else b.to(device))


def _with(solved: Solved, deployed: DeployedLinear) -> Solved:
    if solved.factors is None:
        return solved
    assert deployed.A is not None and deployed.B is not None
    return replace(solved, factors=replace(solved.factors, A=deployed.A.cpu(), B=deployed.B.cpu()))
