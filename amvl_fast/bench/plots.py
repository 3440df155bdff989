"""The pictures of a benchmark run, drawn from the rows of its results."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from amvl_fast.bench.cases import MODES
from amvl_fast.bench.providers import EAGER, OURS
from amvl_fast.report.style import (
    BASELINE,
    FORWARD,
    INK,
    POSTERIOR,
    REVERSE,
    RUN,
    WRONG,
    canvas,
    colour_key,
    label_ends,
)

Row = dict[str, Any]

COLOURS = {
    EAGER: BASELINE,
    "compiled": POSTERIOR,
    "distributions": REVERSE,
    OURS: RUN,
    f"{OURS} compiled": FORWARD,
    f"{OURS} CUDA graph": WRONG,
}


def write_plots(directory: Path, rows: Sequence[Row], machine: str) -> list[Path]:
    """Draw what there are rows for.

    Args:
        machine: the line that says what the figures were taken on; it stands below every picture.

    Returns:
        The paths, in the order of the report.
    """
    paths = [directory / name for name in ("time.png", "bandwidth.png", "speedup.png")]
    ladder = widest_ladder(rows)
    by_mode(paths[0], ladder, machine, "Time a call, ms", "p50_ms")
    by_mode(paths[1], ladder, machine, "Percent of copy bandwidth", "percent_of_copy")
    speedups(paths[2], [row for row in rows if row["mode"] == "full"], machine)
    return paths


def widest_ladder(rows: Sequence[Row]) -> list[Row]:
    """The rows of the dtype and latent size that were measured at the most batch sizes."""
    ladders: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        ladders.setdefault((row["dtype"], row["d"]), []).append(row)
    return max(ladders.values(), key=lambda ladder: len({row["batch"] for row in ladder}))


def by_mode(path: Path, rows: Sequence[Row], machine: str, title: str, column: str) -> None:
    """One panel a mode, a line for each provider over the batch size, with its name at the end."""
    modes = [mode for mode in MODES if any(row["mode"] == mode for row in rows)]
    lines = -(-len(modes) // 2)
    with picture(path, 11, 4.1 * lines, machine) as figure:
        panels = figure.subplots(lines, min(2, len(modes)), squeeze=False).flat
        for axes, mode in zip(panels, modes, strict=False):
            axes.set_title(f"{title}, {mode}")
            draw_lines(axes, [row for row in rows if row["mode"] == mode], column)


def draw_lines(axes: Any, rows: list[Row], column: str) -> None:
    """Times stand on a logarithmic axis, with a band from p20 to p80, and shares on a linear one from 0."""
    axes.set_xscale("log", base=2)
    if column == "p50_ms":
        axes.set_yscale("log")
    ends = []
    for provider in dict.fromkeys(row["provider"] for row in rows):
        line = sorted((row for row in rows if row["provider"] == provider), key=lambda row: row["batch"])
        batches, values = [row["batch"] for row in line], [row[column] for row in line]
        colour = COLOURS.get(provider, INK)
        axes.plot(batches, values, color=colour, marker="o", markeredgecolor="white")
        if column == "p50_ms":
            low, high = ([row[edge] for row in line] for edge in ("p20_ms", "p80_ms"))
            axes.fill_between(batches, low, high, color=colour, alpha=0.15, linewidth=0)
        ends.append((values[-1], provider, colour))
    if column == "percent_of_copy":
        axes.axhline(100, color=BASELINE, linewidth=0.8, linestyle=(0, (2, 3)))
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:g}%" if column == "percent_of_copy" else "{x:g}")
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_xlabel(f"batch of {rows[0]['slots']} x {rows[0]['d']} latents, {rows[0]['dtype']}")
    label_ends(axes, ends)


def speedups(path: Path, rows: Sequence[Row], machine: str) -> None:
    """A bar for each provider of each case, forward and backward together, whoever wins."""
    rows = [row for row in rows if row["provider"] != EAGER]
    names = list(dict.fromkeys(row["provider"] for row in rows))
    cases = list(dict.fromkeys(case_name(row) for row in rows))
    height = 1.6 + 0.14 * len(names) * len(cases)
    with picture(path, 9, height, machine) as figure:
        axes = figure.subplots()
        # The names stand above the axes by a share of their height, and the title above the names.
        axes.set_title("Times faster than eager PyTorch, forward and backward", pad=18 + 0.025 * 72 * height)
        colour_key(axes, [(name, COLOURS.get(name, INK)) for name in names])
        draw_bars(axes, cases, names, rows)


def case_name(row: Row) -> str:
    return f"({row['batch']}, {row['slots']}, {row['d']}) {row['dtype']}"


def draw_bars(axes: Any, cases: list[str], names: list[str], rows: list[Row]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    height = 0.8 / len(names)
    axes.set_xscale("log")
    axes.grid(axis="y", visible=False)
    axes.axvline(1, color=BASELINE, linewidth=1.2)
    for row in rows:
        y = cases.index(case_name(row)) + (names.index(row["provider"]) - (len(names) - 1) / 2) * height
        axes.barh(y, row["speedup"] - 1, left=1, height=0.9 * height, color=COLOURS.get(row["provider"], INK))
        faster = row["speedup"] >= 1
        beside = {"xytext": (4 if faster else -4, 0), "textcoords": "offset points", "va": "center", "fontsize": 7}
        axes.annotate(f"{row['speedup']:.3g}", (row["speedup"], y), ha="left" if faster else "right", **beside)
    axes.set_yticks(range(len(cases)), cases)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.margins(x=0.12)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


@contextlib.contextmanager
def picture(path: Path, width: float, height: float, machine: str) -> Iterator[Any]:
    with canvas(path, width, height) as figure:
        yield figure
        figure.supxlabel(machine, fontsize=7, color="#777777")
