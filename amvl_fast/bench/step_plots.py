"""How the step grows with the prompt, drawn from the rows of its benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from amvl_fast.bench.plots import picture
from amvl_fast.bench.results import Row
from amvl_fast.bench.step_tables import case_of
from amvl_fast.bench.steps import FLOOR, OURS, SCALING, THREE_PASS
from amvl_fast.report.style import BASELINE, FORWARD, RUN, label_ends

COLOURS = {OURS: RUN, THREE_PASS: BASELINE, FLOOR: FORWARD}


def write_scaling(path: Path, rows: Sequence[Row], machine: str) -> list[Path]:
    """Time over the length of the prompt, and beside it how many times faster than three passes.

    Args:
        machine: the line that says what the figures were taken on; it stands below the picture.

    Returns:
        The path, or nothing if the cases of the ladder are not among the rows.
    """
    ladder = sorted((row for row in rows if case_of(row) in SCALING), key=lambda row: row["prompt"])
    if not ladder:
        return []
    with picture(path, 11, 4.4, machine) as figure:
        times, speedups = figure.subplots(1, 2)
        times.set_title("Time a step, ms")
        draw(times, ladder, "p50_ms", list(COLOURS))
        times.set_yscale("log")
        speedups.set_title("Times faster than three_pass")
        draw(speedups, ladder, "speedup", [OURS, FLOOR])
        speedups.axhline(1, color=BASELINE, linewidth=0.8, linestyle=(0, (2, 3)))
        speedups.set_ylim(bottom=0)
        for axes, column, names in ((times, "p50_ms", list(COLOURS)), (speedups, "speedup", [OURS, FLOOR])):
            axes.yaxis.set_major_formatter("{x:g}")
            label_ends(axes, [(of(ladder, name)[-1][column], name, COLOURS[name]) for name in names])
    return [path]


def of(rows: Sequence[Row], name: str) -> list[Row]:
    return [row for row in rows if row["provider"] == name]


def draw(axes: Any, ladder: Sequence[Row], column: str, names: list[str]) -> None:
    """A line for each contestant; times with a band from p20 to p80."""
    axes.set_xscale("log", base=2)
    for name in names:
        line = of(ladder, name)
        prompts = [row["prompt"] for row in line]
        axes.plot(prompts, [row[column] for row in line], color=COLOURS[name], marker="o", markeredgecolor="white")
        if column == "p50_ms":
            low, high = ([row[edge] for row in line] for edge in ("p20_ms", "p80_ms"))
            axes.fill_between(prompts, low, high, color=COLOURS[name], alpha=0.15, linewidth=0)
    axes.set_xticks(prompts, [str(prompt) for prompt in prompts])
    case = case_of(ladder[0])
    axes.set_xlabel(f"|x|, tokens of the prompt; |y| = {case.answer}, k = {case.k}, batch of {case.batch}")
