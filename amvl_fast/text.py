"""Tables for terminals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def grid(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """Columns side by side; the first column to the left, numbers to the right."""
    cells: list[list[str]] = [list(header), *([str(cell) for cell in line] for line in lines)]
    wide = [max(len(line[i]) for line in cells) for i in range(len(header))]
    left = [all(not line[i][:1].isdigit() for line in cells[1:]) or i == 0 for i in range(len(header))]
    text = []
    for row in cells:
        padded = [c.ljust(w) if to_left else c.rjust(w) for c, w, to_left in zip(row, wide, left, strict=True)]
        text.append("  ".join(padded).rstrip())
    return "\n".join(text)
