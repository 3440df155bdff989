"""The rows as a printed table, as CSV and as JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from itertools import groupby
from typing import Any

Row = dict[str, Any]

# One row for each provider of each case, every case in the same columns: the long form, which plots and pivots want.
COLUMNS = (
    *("op", "batch", "slots", "d", "dtype", "mode", "provider", "backend", "rounds", "p20_ms", "p50_ms", "p80_ms"),
    *("speedup", "gb_per_s", "copy_gb_per_s", "percent_of_copy", "peak_mib", "launches", "host_us"),
)
CASE = ("op", "batch", "slots", "d", "dtype", "mode")

# Heading, column, digits.
PRINTED = (
    ("p20 ms", "p20_ms", 3),
    ("p50 ms", "p50_ms", 3),
    ("p80 ms", "p80_ms", 3),
    ("x eager", "speedup", 2),
    ("GB/s", "gb_per_s", 1),
    ("% of copy", "percent_of_copy", 0),
    ("peak MiB", "peak_mib", 1),
    ("launches", "launches", 0),
    ("host us", "host_us", 0),
    ("rounds", "rounds", 0),
)

NOTES = """\
p20, p50, p80   percentiles of the milliseconds a call takes, over rounds in which all providers take turns.
x eager         how many times faster than eager: the median over the rounds of the ratio within a round.
GB/s            bytes an ideal implementation moves, the same for all, over p50. Elements moved per latent element:
                5 forward or without gradients (reads 4, writes 1), 9 backward (reads 5, writes 4), 14 full.
% of copy       of the GB/s that Tensor.copy_ reaches, measured right before and after. More than 100: from caches.
peak MiB        allocated through PyTorch's allocators at the call's peak, results included, inputs not.
launches        kernels on the GPU, those that draw the noise or its seed included; empty on the CPU.
host us         microseconds until the call returns. On the CPU that of shape (1, 8, 64), where it is all overhead."""


def printed(rows: Sequence[Row]) -> str:
    """All cases, one block each."""
    width = max((len(label(row)) for row in rows), default=0)
    blocks = []
    for _, group in groupby(rows, key=lambda row: tuple(row[column] for column in CASE)):
        block = list(group)
        heads = [f"{heading:>{max(len(heading), 9)}}" for heading, _, _ in PRINTED]
        lines = [title(block[0]), "  ".join([" " * width, *heads])]
        for row in block:
            cells = [
                f"{number(row[column], digits):>{len(head)}}"
                for (_, column, digits), head in zip(PRINTED, heads, strict=True)
            ]
            lines.append("  ".join([f"{label(row):<{width}}", *cells]).rstrip())
        blocks.append("\n".join(lines))
    return "\n\n".join([*blocks, NOTES]) if blocks else ""


def title(row: Row) -> str:
    return f"{row['op']} ({row['batch']}, {row['slots']}, {row['d']}) {row['dtype']}, {row['mode']}"


def label(row: Row) -> str:
    return f"{row['provider']} ({row['backend']})" if row["backend"] else row["provider"]


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def as_csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({column: rounded(row[column]) for column in COLUMNS} for row in rows)
    return text.getvalue()


def as_json(machine: dict[str, Any], rows: Sequence[Row], steps: Sequence[Row], others: Sequence[Row]) -> str:
    """
    Args:
        rows: of the ops.
        steps: of the whole step.
        others: what the suite measured besides, in pytest-benchmark's figures.
    """
    tidy = [{column: rounded(row[column]) for column in COLUMNS} for row in rows]
    tidy_steps = [{column: rounded(value) for column, value in row.items()} for row in steps]
    return json.dumps({"machine": machine, "rows": tidy, "steps": tidy_steps, "others": list(others)}, indent=1) + "\n"


def rounded(value: Any) -> Any:
    """Four digits: more would only be noise, and noise makes long diffs."""
    return float(f"{value:.4g}") if isinstance(value, float) else value
