"""How far a run is: blocks done, time left, and the output error left so far."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator
from time import perf_counter
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from quailora.memory.budget import about
from quailora.reporting.markdown import count, duration
from quailora.reporting.report import LayerReport, error_left

# Without a terminal: about so many lines, and more where they would be further apart than this.
_LINES = 20
_SECONDS_BETWEEN_LINES = 600


class Progress:
    """A bar on standard error; where that is not a terminal, as in a batch job, a line every few blocks.

    enabled: False shows nothing.
    finished, layers: the blocks that an earlier run finished, and their rows of the report. They are counted as done.
    estimate: seconds that a run over all blocks is expected to take.
    """

    def __init__(
        self,
        *,
        enabled: bool = True,
        finished: Collection[int] = (),
        layers: Iterable[LayerReport] = (),
        estimate: float | None = None,
    ) -> None:
        console = Console(stderr=True)
        self._enabled, self._prints_lines = enabled, enabled and not console.is_terminal
        self._bar = RichProgress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("blocks"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[error]}"),
            console=console,
            disable=not (enabled and console.is_terminal),
        )
        self._finished = frozenset(finished)
        self._layers = list(layers)
        self._estimate = estimate

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def blocks(self, indices: Collection[int]) -> Iterator[int]:
        """Yield the blocks to run, counting each one when the next is asked for.

        Blocks that were finished before are counted from the beginning. They are run forward again to get the inputs of
        the others, which takes less time, so they do not enter the estimate of the time left.
        """
        total, done = len(self._finished.union(indices)), len(self._finished)
        self._announce(total, done)
        task = self._bar.add_task("QuAILoRA", total=total, completed=done, error=self._error())
        start = printed = perf_counter()
        solving, solved = 0.0, 0
        for index in indices:
            began = perf_counter()
            yield index
            if index in self._finished:
                continue
            now = perf_counter()
            solving, solved, done = solving + now - began, solved + 1, done + 1
            self._bar.update(task, completed=done, error=self._error())
            due = done * _LINES // total > (done - 1) * _LINES // total or now - printed >= _SECONDS_BETWEEN_LINES
            if self._prints_lines and (due or solved == 1):
                left = f"{about(solving / solved * (total - done))} left, " if done < total else ""
                _print(f"{done} of {count(total, 'block')}, {duration(now - start)} so far, {left}{self._error()}")
                printed = now

    def layer(self, layer: LayerReport) -> None:
        """Take a layer's result into the error shown."""
        self._layers.append(layer)

    def _announce(self, total: int, done: int) -> None:
        if not self._enabled:
            return
        time = "" if self._estimate is None or done == total else about(self._estimate * (1 - done / total))
        if done:
            _print(f"{done} of {count(total, 'block is', 'blocks are')} done{time and f', {time} for the others'}")
        else:
            _print(f"{count(total, 'block')} to initialize{time and f', {time}'}")

    def _error(self) -> str:
        return f"output error left {error_left(self._layers):.1%}" if self._layers else ""


def _print(line: str) -> None:
    print(f"QuAILoRA: {line}", file=sys.stderr, flush=True)  # a log file should have it at once
