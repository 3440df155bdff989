"""The pictures of a report that are about single answers: accuracy by kind of question, and examples."""

from __future__ import annotations

import random
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from amvl_fast.report.evaluated import EvaluatedRun
from amvl_fast.report.style import BASELINE, RIGHT, RUN, WRONG, canvas, colour_key


def kinds(path: Path, run: EvaluatedRun, baseline: EvaluatedRun | None) -> str | None:
    """Accuracy by kind of question, the baseline's beside it; none where all rows are of one kind."""
    ours = run.metrics["accuracy_by_kind"]
    if len(ours) < 2:
        return None
    counts = Counter(p["kind"] for p in run.predictions)
    order = sorted(ours, key=lambda kind: ours[kind])
    runs = [(run, RUN), *([(baseline, BASELINE)] if baseline else [])]
    height = 0.72 / len(runs)
    with canvas(path, 8, 1.1 + 0.62 * len(order)) as figure:
        axes = figure.subplots()
        axes.set_title("Accuracy by kind of question", pad=12 if len(runs) == 1 else 28)
        for i, (one, colour) in enumerate(runs):
            values = [one.metrics["accuracy_by_kind"].get(kind, 0.0) for kind in order]
            places = [y + height * ((len(runs) - 1) / 2 - i) for y in range(len(order))]
            axes.barh(places, values, height=height * 0.9, color=colour, alpha=1 if i == 0 else 0.55)
            for y, value in zip(places, values, strict=True):
                note = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": 9}
                axes.annotate(
                    f"{value:.1%}",
                    (value, y),
                    color=colour,
                    fontweight="bold" if i == 0 else "normal",
                    **note,
                )
        axes.set_yticks(range(len(order)), [f"{kind}\n{counts[kind]:,} rows" for kind in order])
        axes.set_xlim(0, 1.08)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.grid(visible=False)
        if len(runs) > 1:
            colour_key(axes, [(one.name, colour) for one, colour in runs])
    return "Accuracy by kind of question on the test rows."


def examples(path: Path, run: EvaluatedRun, rows: Sequence[dict[str, Any]], seed: int) -> str:
    """Twelve test images, each with its question, the right answer and the model's."""
    chosen = choose(run.predictions, seed)
    lines = -(-len(chosen) // 4)
    height = 0.2 + 3.3 * lines
    with canvas(path, 10, height) as figure:
        figure.set_layout_engine("none")  # it would shift the panels by the length of their words
        box = {"left": 0.02, "right": 0.98, "top": 1 - 0.2 / height, "bottom": 1 / height, "wspace": 0.14}
        panels = figure.subplots(lines, 4, squeeze=False, gridspec_kw=box | {"hspace": 0.5}).ravel()
        for axes in panels:
            axes.set_axis_off()
        for axes, index in zip(panels, chosen, strict=False):
            example(axes, rows[index], run.predictions[index])
    wrong = sum(not run.predictions[i]["correct"] for i in chosen)
    return (
        f"{len(chosen)} test rows drawn with seed {seed}, {wrong} of them from the wrong answers and "
        f"{len(chosen) - wrong} from the right ones: their share says nothing of the accuracy."
    )


def example(axes: Any, row: dict[str, Any], p: dict[str, Any]) -> None:
    axes.set_box_aspect(1)
    if row["images"]:
        image = row["images"][0]
        axes.imshow(image, interpolation="nearest" if max(image.size) < 200 else "antialiased")
        axes.set_adjustable("datalim")  # an image that is not square stands in a square panel
    else:
        axes.text(0.5, 0.5, "no image", transform=axes.transAxes, ha="center", color=BASELINE)
    question = textwrap.wrap(textwrap.shorten(p["question"], 66, placeholder=" …"), 33) or [""]
    sign, colour = ("✓", RIGHT) if p["correct"] else ("✗", WRONG)
    said, answer = (textwrap.shorten(p[key], 28, placeholder=" …") for key in ("prediction", "answer"))
    lines: list[tuple[str, dict[str, Any]]] = [(line, {"fontsize": 9.5}) for line in question]
    lines += [(f"{sign} {said or '(nothing)'}", {"fontsize": 11, "fontweight": "bold", "color": colour})]
    lines += [(f"right answer: {answer}", {"fontsize": 9, "color": "#555555"})]
    for number, (text, style) in enumerate(lines):
        place = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "center"}
        axes.annotate(text, (0, 0), xytext=(0, -12 - 15 * number), annotation_clip=False, **place, **style)


def choose(predictions: Sequence[dict[str, Any]], seed: int, count: int = 12) -> list[int]:
    """Indices of a third wrong and two thirds right answers, as far as there are so many, shuffled."""
    generator = random.Random(seed)
    order = generator.sample(range(len(predictions)), len(predictions))
    right = [i for i in order if predictions[i]["correct"]]
    wrong = [i for i in order if not predictions[i]["correct"]]
    few = min(len(wrong), max(count // 3, count - len(right)))
    chosen = right[: count - few] + wrong[:few]
    return generator.sample(chosen, len(chosen))
