"""From H of linears to what is found for them: shared among the processes, one input after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from time import perf_counter

import torch
from torch import Tensor, nn

from quailora.adapters.targets import Target
from quailora.calibration.distributed import Processes
from quailora.calibration.gram import Gram
from quailora.calibration.inputs import InputPair
from quailora.modeling.blocks import linear_weight
from quailora.pipeline.quantize import QuantizeAndSolve
from quailora.pipeline.solved import Solved, layer_report
from quailora.pipeline.stages import Stages
from quailora.quantization.verify import digest

_CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Solving:
    """See `Loop`, which has these fields too."""

    initialize: QuantizeAndSolve
    keep_q: bool
    processes: Processes
    stages: Stages
    trim: Callable[[], None]

    def __call__(
        self,
        targets: Mapping[str, Target | None],
        linears: Mapping[str, nn.Module],
        grams: dict[str, Gram],
        *,
        overwrite: bool,
        pair: InputPair | None = None,
    ) -> list[Solved]:
        """What all ranks solved, on the main process; nothing elsewhere. Empties `grams`: each H is freed after use.

        overwrite: the block will not run again, and weights may be overwritten.
        pair: what makes targets of weights, where the linears share one input and are fitted behind quantized layers.
        """
        owners = self.processes.assign({name: linears[name].get_parameter("weight").numel() for name in targets})
        mine: list[Solved] = []
        while grams:
            gram = next(iter(grams.values()))
            names = [name for name, its in grams.items() if its is gram]
            own = {name: targets[name] for name in names if owners[name] == self.processes.rank}
            if own:
                mine += self._group(own, {name: linear_weight(linears[name]) for name in own}, gram, overwrite, pair)
            for name in names:
                del grams[name]
            del gram
            self.trim()
        found = {each.name: each for of_one in self.processes.gather(mine) for each in of_one}
        return [found[name] for name in targets if name in found]

    def _group(
        self,
        targets: Mapping[str, Target | None],
        weights: dict[str, Tensor],
        gram: Gram,
        overwrite: bool,
        pair: InputPair | None,
    ) -> list[Solved]:
        """Linears that share an input."""
        start = perf_counter()
        if pair is not None:
            with self.stages("solve"):
                weights = pair.targets(weights)
        ranks = {name: target.rank for name, target in targets.items() if target is not None}
        found = self.initialize(weights, ranks, gram, overwrite=overwrite)
        seconds = (perf_counter() - start) / sum(weight.numel() for weight in weights.values())
        solved = []
        for name, each in found.items():
            quantized = each.quantized.to(_CPU) if self.keep_q else None
            factors, row = each.factors, None
            its_digest = digest(each.quantized)
            if factors is not None:
                time = seconds * weights[name].numel()
                row = layer_report(name, each, gram.tokens, time, its_digest, quantized_inputs=pair is not None)
                factors = replace(factors, A=factors.A.cpu(), B=factors.B.cpu())
            solved.append(Solved(name, its_digest, quantized, factors=factors, row=row))
        return solved
