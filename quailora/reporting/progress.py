"""One progress bar: blocks done, time left, and the error that is left so far."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from quailora.reporting.report import LayerReport, error_left

T = TypeVar("T")


class Progress:
    """Drawn on standard error; with `enabled=False`, or where that is no terminal, nothing is drawn."""

    def __init__(self, total: int, *, enabled: bool = True) -> None:
        console = Console(stderr=True)
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
        self._task = self._bar.add_task("QuAILoRA", total=total, error="")
        self._layers: list[LayerReport] = []

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def blocks(self, blocks: Iterable[T]) -> Iterator[T]:
        """The blocks, counted as the next one is asked for."""
        for block in blocks:
            yield block
            self._bar.advance(self._task)

    def layer(self, layer: LayerReport) -> None:
        """Take a layer's result into the error shown."""
        self._layers.append(layer)
        self._bar.update(self._task, error=f"output error left {error_left(self._layers):.1%}")
