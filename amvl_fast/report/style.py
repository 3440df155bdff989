"""One look for every picture: colours, sizes, and the labels that stand in for legends.

matplotlib's object interface only: drawing leaves a user's own pyplot figures alone.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Okabe and Ito's colours, which the colour-blind can tell apart, darkened so that text in them reads well.
RUN, POSTERIOR, BASELINE = "#0072B2", "#B86E00", "#767676"
FORWARD, REVERSE, RIGHT, WRONG, INK = "#00775A", "#A6558A", "#00775A", "#C44E00", "#222222"
STYLE: Any = {
    "figure.dpi": 150,
    "savefig.dpi": 150,
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,  # questions may hold dollar signs
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.labelcolor": "#555555",
    "axes.labelsize": 9.5,
    "axes.edgecolor": "#999999",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 2,
    "lines.markersize": 5,
    "lines.solid_capstyle": "round",
}


@contextlib.contextmanager
def canvas(path: Path, width: float, height: float) -> Iterator[Any]:
    """A figure in our style, written to `path` when the block has ended well."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
        figure = Figure(figsize=(width, height), layout=layout)
        yield figure
        aside = path.with_suffix(".unfinished")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # data may be in any script; a box is drawn instead
            figure.savefig(aside, format="png")
        aside.replace(path)


def steps_axis(axes: Any) -> None:
    axes.set_xlabel("training step")
    axes.set_xlim(left=0, right=1.02 * axes.dataLim.x1)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.locator_params(axis="x", nbins=6, integer=True)


def label_ends(axes: Any, ends: list[tuple[float, str, str]], gap: float = 0.075) -> None:
    """Name each line at its right end; names that would overlap are moved apart."""
    axes.get_ylim()  # limits are settled when somebody asks
    height = axes.get_position().height * axes.figure.get_figheight() * 0.8
    gap = max(gap, 0.19 / height)  # a line of text, in shares of the axes
    place = (axes.transData + axes.transAxes.inverted()).transform
    heights = [place((0, value))[1] for value, _, _ in sorted(ends)]
    for _ in range(50):
        for i in range(1, len(heights)):
            if (lack := gap - (heights[i] - heights[i - 1])) > 1e-6:
                heights[i - 1] -= lack / 2
                heights[i] += lack / 2
    for height, (_, text, colour) in zip(heights, sorted(ends), strict=True):
        axes.text(1.02, height, text, transform=axes.transAxes, va="center", color=colour, fontsize=9.5)


def colour_key(axes: Any, names: list[tuple[str, str]]) -> None:
    """Names in their colours, on a line below the title."""
    from matplotlib.offsetbox import AnchoredOffsetbox, HPacker, TextArea

    font = {"fontsize": 9.5, "fontweight": "bold"}
    words: list[Any] = [TextArea(name, textprops={"color": colour, **font}) for name, colour in names]
    box = HPacker(children=words, sep=12, pad=0)
    place = {"bbox_to_anchor": (0, 1.025), "bbox_transform": axes.transAxes, "frameon": False}
    axes.add_artist(AnchoredOffsetbox("lower left", child=box, pad=0, borderpad=0, **place))
