"""Markdown tables, and numbers as people read them."""

from __future__ import annotations

from typing import Any


def table(rows: list[dict[str, Any]]) -> str:
    """A table of rows that all have the same keys, which become its header."""
    columns = list(rows[0]) if rows else []
    lines = [columns, ["---"] * len(columns), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", r"\|").replace("\n", " ")


def pairs(values: dict[str, Any]) -> str:
    """ "r 64, alpha 16"."""
    return ", ".join(f"{name} {value}" for name, value in values.items())


def count(number: int, one: str, more: str | None = None) -> str:
    """ "1 block" or "2 blocks"; "1 block is" or "2 blocks are", with `more`."""
    return f"{number} {one if number == 1 else more or f'{one}s'}"


def duration(seconds: float) -> str:
    """ "3.2 s", "41 s", "2 min 01 s" or "5 h 07 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
