"""The rows of the step benchmark as a printed table, with the bars they must meet, and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from amvl_fast.bench.results import Row, number, rounded
from amvl_fast.bench.steps import CASES, OURS, SAMPLES_BAR, SEVERAL, THREE_PASS, StepCase

# One row for each contestant of each case: the long form, which plots and pivots want.
COLUMNS = (
    *("prompt", "answer", "k", "batch", "provider", "rounds", "p20_ms", "p50_ms", "p80_ms"),
    *("speedup", "over_floor", "over_one_sample", "peak_mib"),
)

# Heading, column, digits.
PRINTED = (
    ("p20 ms", "p20_ms", 1),
    ("p50 ms", "p50_ms", 1),
    ("p80 ms", "p80_ms", 1),
    ("x three_pass", "speedup", 2),
    ("of floor", "over_floor", 3),
    ("peak MiB", "peak_mib", 1),
    ("rounds", "rounds", 0),
)

NOTES = """\
x three_pass    how many times faster than three passes: the median over the rounds of the ratio within a round.
of floor        the time over that of one plain forward and backward pass of the same decoder over |x| + k + 2(|y| + k)
                tokens a sample, also with logits for the answer alone.
peak MiB        allocated through PyTorch's allocators at the step's peak, gradients included, weights not."""


class Bar(NamedTuple):
    """What a figure has to hold.

    Attributes:
        what: in words.
        figure, limit: what was measured, and what it may at most or must at least be.
        at_least: which of the two.
    """

    what: str
    figure: float
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.figure >= self.limit if self.at_least else self.figure <= self.limit

    def __str__(self) -> str:
        bound = "at least" if self.at_least else "at most"
        return f"{self.what}: {self.figure:.4g}, {bound} {self.limit:.4g}: {'met' if self.met else 'NOT MET'}"


def case_of(row: Row) -> StepCase:
    return StepCase(row["prompt"], row["answer"], row["k"], row["batch"])


def bars(rows: Sequence[Row]) -> list[Bar]:
    """The bars of one case, whose rows these are. Memory has one on every case, time on those that say so."""
    by_name = {row["provider"]: row for row in rows}
    ours = by_name[OURS]
    found = []
    if case_of(ours) in CASES:
        faster, over_floor = CASES[case_of(ours)]
        found.append(Bar("times faster than three_pass", ours["speedup"], faster, at_least=True))
        found.append(Bar("time over the floor's", ours["over_floor"], over_floor))
    if SEVERAL in by_name:
        found.append(Bar("time of 4 samples over that of 1", by_name[SEVERAL]["over_one_sample"], SAMPLES_BAR))
    return [*found, Bar("peak MiB, against three_pass", ours["peak_mib"], by_name[THREE_PASS]["peak_mib"])]


def printed_steps(rows: Sequence[Row]) -> str:
    """All cases, one block each, with its bars below it."""
    blocks = [block(list(group)) for _, group in groupby(rows, key=case_of)]
    return "\n\n".join([*blocks, NOTES]) if blocks else ""


def block(rows: Sequence[Row]) -> str:
    """The table of one case."""
    width = max(len(row["provider"]) for row in rows)
    heads = [f"{heading:>9}" for heading, _, _ in PRINTED]
    lines = [case_of(rows[0]).name, "  ".join([" " * width, *heads])]
    for row in rows:
        cells = [
            f"{number(row[column], digits):>{len(head)}}"
            for (_, column, digits), head in zip(PRINTED, heads, strict=True)
        ]
        lines.append("  ".join([f"{row['provider']:<{width}}", *cells]))
    return "\n".join([*lines, *(f"  {bar}" for bar in bars(rows))])


def steps_as_csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({column: rounded(row[column]) for column in COLUMNS} for row in rows)
    return text.getvalue()
