"""Tables and emphasis for people, in plain text: what works without the packages of the extra `cli`."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Sequence

__all__ = ["emphasised", "paragraph", "table", "width"]

_GREEN, _YELLOW, _RED = "32", "33", "1;31"
# How a word looks that says by itself how things stand.
_STYLES = {
    "runs": _GREEN, "yes": _GREEN, "not here": _YELLOW, "no": _YELLOW, "disabled": _YELLOW, "!": _YELLOW,
    "BROKEN": _RED, "?": _RED,
}  # fmt: skip


def width() -> int:
    """Return the columns of the terminal, or of COLUMNS."""
    return shutil.get_terminal_size().columns


def emphasised(text: str, style: str = "1") -> str:
    """Return text in bold, or another style of the terminal; as it is where no terminal reads it."""
    colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return f"\033[{style}m{text}\033[0m" if colours else text


def paragraph(mark: str, text: str) -> str:
    """Return text behind a mark, wrapped."""
    lines = textwrap.wrap(text, max(width() - len(mark) - 1, 20), break_on_hyphens=False) or [""]
    return "\n".join(
        [f"{emphasised(mark, _STYLES.get(mark, '1'))} {lines[0]}", *(f"{'':{len(mark)}} {x}" for x in lines[1:])]
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows in columns; the last column takes what is left of the terminal's width, and is wrapped."""
    if not rows:
        return ""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    left = sum(widths) + 2 * len(widths)
    lines = []
    for row in rows:
        last = [part for line in row[-1].splitlines() for part in textwrap.wrap(line, max(width() - left, 20))] or [""]
        cells = [_styled(cell, size) for cell, size in zip(row[:-1], widths, strict=True)]
        lines.append("  ".join([*cells, last[0]]).rstrip())
        lines += [f"{'':{left}}{part}" for part in last[1:]]
    return "\n".join(lines)


def _styled(cell: str, size: int) -> str:
    padding = " " * (size - len(cell))
    return (emphasised(cell, _STYLES[cell]) if cell in _STYLES else cell) + padding
