"""The folders that `build_adapter` fills, a block at a time: the adapter's, and the base's where one is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from quailora.adapters.save_and_load import factors_of, rest, save, take
from quailora.errors import CalibrationError, CheckpointError, NotFiniteError, QuailoraError, SolverError
from quailora.files import write_files
from quailora.modeling.blocks import linear_weight
from quailora.pipeline.base_output import BaseOutput, discard_unfinished
from quailora.pipeline.depth import Restored
from quailora.pipeline.resume import Workspace
from quailora.pipeline.setup import Run
from quailora.pipeline.solved import Solved
from quailora.reporting.model_card import model_card
from quailora.reporting.report import BlockReport, Report


class Outputs:
    """What a run keeps of every finished block, until both folders are whole. They are this process's until `publish`
    or `leave`.

    Args:
        model: the skeleton with the adapter that `run` has its targets from.
        quantized: the names of the linears that are quantized.
        identity: what the run is; see `Workspace`.
        adapter, base: the folders, absent or empty; `base` None writes no base.
        calibrated: whether the codes of the base are chosen by calibration, so that Q cannot be made again from W.
        resume: whether to go on with an unfinished run; else it is discarded.

    Raises QuailoraError as `Workspace` and `BaseOutput` do.
    """

    def __init__(
        self,
        run: Run,
        model: PeftModel,
        quantized: list[str],
        identity: dict[str, Any],
        *,
        adapter: Path,
        base: Path | None,
        calibrated: bool,
        resume: bool,
    ) -> None:
        self._run, self._model, self._quantized, self._calibrated = run, model, quantized, calibrated
        self._base: BaseOutput | None = None
        self.workspace = Workspace(adapter, identity, resume=resume)
        try:
            if (other := self.workspace.discarded.get("rounding", {}).get("path")) is not None:
                discard_unfinished(Path(other), adapter)
            if base is not None:
                self._base = BaseOutput(
                    base,
                    run.stream,
                    run.form,
                    quantized,
                    adapter=adapter,
                    resume=resume,
                    keep=bool(self.workspace.finished),
                    published=self.workspace.chosen.get("published", False),
                )
        except QuailoraError:
            self.workspace.leave()
            raise

    @property
    def finished(self) -> list[int]:
        """The blocks that nothing is left to do for."""
        return [index for index in self.workspace.finished if self._base is None or self._base.has(index)]

    def save_block(
        self, index: int, solved: list[Solved], shrunk: list[dict[int, int]], refined: BlockReport | None
    ) -> None:
        """Keep what was found for a block; see `Loop.finish`."""
        by_name = {target.name: target for target in self._run.targets}
        adapted = []
        for each in solved:
            if each.factors is not None:
                adapted.append(by_name[each.name])
                adapted[-1].assign(each.factors, self._run.solver.seed)
        tensors = take(self._model, adapted)
        if any(shrunk) or "shrunk" in self.workspace.chosen:
            self.workspace.choose(shrunk=[list(of_rank.items()) for of_rank in shrunk])
        if self._base is not None:
            quantized = {each.name: each.quantized for each in solved if each.quantized is not None}
            self._base.write_block(index, quantized)
        rows = [each.row for each in solved if each.row is not None]
        digests = {each.name: each.digest for each in solved if each.row is None}
        self.workspace.save_block(index, tensors, rows, digests, refined)

    def restore(self, index: int, linears: Mapping[str, nn.Module]) -> dict[str, Restored]:
        """Q and the factors of the linears of a finished block; see `Depth.restore`."""
        if index not in self.workspace.finished:  # it has no quantized linear
            return {}
        factors = factors_of(self._run.targets, self.workspace.block_tensors(index))
        names = [name for name in self._quantized if name in linears]
        if self._base is not None and self._calibrated:
            weights = self._base.read_block(index, names)
        else:
            weights = {name: self._run.form.quantize(linear_weight(linears[name])) for name in names}
        return {name: (weights[name], *factors.get(name, (None, None))) for name in names}

    def publish(self, report: Report, *, times: float) -> None:
        """Write what is outside the blocks, and give the folders their names.

        times: what A and B are multiplied by, each.
        """
        workspace, base, stages = self.workspace, self._base, self._run.stages
        if base is not None:
            report.record["base"]["unquantized"] = base.unquantized()
            if not base.published:
                with stages("write"):
                    base.complete(report.record)
        with workspace.finish() as folder, stages("write"):
            made = {name: tensor.times(times) for name, tensor in workspace.tensors().items()}
            if base is not None:
                config: Any = self._model.peft_config["default"]
                config.base_model_name_or_path, config.revision = str(base.folder), None
            save(self._model, folder, made | rest(self._model, self._run.stream, self._run.solver.seed, made))
            report.save(folder)
            write_files(folder, {"README.md": model_card(report.record, report)})
            if base is not None and not base.published:
                workspace.choose(published=True)
                base.publish()

    def leave(self) -> str:
        """Let other processes have the folders. Returns what is kept, as the rest of a sentence; "" for nothing."""
        if self._base is not None:
            self._base.leave()
        kept = self.workspace.leave()
        return f"; {kept}" if kept else ""


@contextmanager
def saying_what_is_kept(outputs: Outputs | None, dtype: torch.dtype) -> Iterator[None]:
    """Within it, an error or an interruption leaves the outputs, and says what of them is kept and whether the same
    command would go on from there. None has nothing to keep."""
    try:
        yield
    except KeyboardInterrupt as interruption:
        kept = outputs.leave() if outputs else ""
        raise KeyboardInterrupt(f"interrupted{kept}{_CONTINUES if kept else ''}") from interruption
    except QuailoraError as error:
        kept = outputs.leave() if outputs else ""
        if isinstance(error, NotFiniteError) and dtype == torch.float16:
            anew = " with resume=False (--no-resume)" if kept else ""
            kept = f"; run it with dtype=torch.bfloat16 (--dtype bfloat16){anew}; in float16 it would fail again"
        elif kept and isinstance(error, CalibrationError | CheckpointError | SolverError):
            kept += ", but the same command would fail again until this is mended"
        elif kept:
            kept += _CONTINUES
        raise type(error)(f"{error}{kept}") from error
    except Exception:
        if outputs:
            outputs.leave()
        raise


_CONTINUES = ", and the same command continues from there"
