"""The pictures of a report: what they are, and those that follow a run over its steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from amvl_fast.errors import AMVLError
from amvl_fast.report.answers import examples, kinds
from amvl_fast.report.evaluated import EvaluatedRun
from amvl_fast.report.style import (
    BASELINE,
    FORWARD,
    POSTERIOR,
    REVERSE,
    RUN,
    canvas,
    colour_key,
    label_ends,
    steps_axis,
)
from amvl_fast.report.verdict import signed, wilson

KL_FLOOR = 1e-4  # nats per row: where the logarithmic axis ends; zeros stand on it


def write_figures(
    directory: Path,
    run: EvaluatedRun,
    baseline: EvaluatedRun | None,
    rows: Sequence[dict[str, Any]],
    *,
    seed: int = 0,
) -> list[tuple[str, str]]:
    """Draw what the run has data for, and remove older pictures of what it has not.

    Args:
        directory: made if absent.
        rows: the evaluated rows, with their images, in the order of the run's predictions.
        seed: of the examples' choice.

    Returns:
        Pairs of file name and one-sentence caption, in the order of the report.

    Raises:
        AMVLError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise AMVLError(
            f"The evaluation is written to {run.directory}, but not its report, as matplotlib is not "
            "installed: run `pip install amvl-fast[report]` and the same command again."
        ) from error
    directory.mkdir(parents=True, exist_ok=True)
    captions = {
        "nll.png": nll(directory / "nll.png", run, baseline),
        "kl.png": kl(directory / "kl.png", run),
        "accuracy.png": accuracy(directory / "accuracy.png", run, baseline),
        "kinds.png": kinds(directory / "kinds.png", run, baseline),
        "examples.png": examples(directory / "examples.png", run, rows, seed),
    }
    for name, caption in captions.items():
        if caption is None:
            (directory / name).unlink(missing_ok=True)
    return [(name, caption) for name, caption in captions.items() if caption is not None]


def nll(path: Path, run: EvaluatedRun, baseline: EvaluatedRun | None) -> str | None:
    """Nats per answer token over the steps, under posterior and prior samples, and the baseline's."""
    own = "eval_nll_prior" if run.has_latents else "eval_nll"
    lines = [(run.series(own), RUN, "prior samples" if run.has_latents else run.name)]
    if run.has_latents:
        lines.append((run.series("eval_nll_posterior"), POSTERIOR, "posterior samples"))
    if not lines[0][0][0]:
        return None
    if baseline is not None:
        key = "eval_nll_prior" if baseline.has_latents else "eval_nll"
        name = baseline.name + ("" if baseline.has_latents else ", no latents")
        lines.append((baseline.series(key), BASELINE, name))
    with canvas(path, 8, 4.2) as figure:
        axes = figure.subplots()
        axes.set_title("Nats per answer token, evaluation rows")
        for (steps, values), colour, _ in lines:
            under = {"linewidth": 4.5, "alpha": 0.55} if colour == RUN and run.has_latents else {}
            axes.plot(steps, values, color=colour, marker="o", markeredgecolor="white", **under)
        axes.set_ylim(bottom=0)
        if run.has_latents:
            shade_leakage(axes, *lines[0][0], lines[1][0][1])
        steps_axis(axes)
        label_ends(axes, [(v[-1], f"{name}  {v[-1]:.3f}", colour) for (s, v), colour, name in lines if s])
    if not run.has_latents:
        return "Nats per answer token on the evaluation rows over the steps of training."
    return (
        "Nats per answer token on the evaluation rows, with latents sampled from the posterior, which has "
        "seen the answer, and from the prior, which has not; the gap between the two is the leakage."
    )


def shade_leakage(axes: Any, steps: list[int], prior: list[float], posterior: list[float]) -> None:
    gaps = [a - b for a, b in zip(prior, posterior, strict=True)]
    leaks = [gap > 0 for gap in gaps]
    shade = {"where": leaks, "interpolate": True, "color": POSTERIOR, "alpha": 0.14, "linewidth": 0}
    axes.fill_between(steps, posterior, prior, **shade)
    # Not at the ends, where the label would leave the shade.
    widest = max(range(len(gaps)), key=lambda i: (gaps[i] if 0 < i < len(gaps) - 1 else 0, i))
    low, high = axes.get_ylim()
    style = {"color": POSTERIOR, "ha": "center", "va": "center"}
    if gaps[widest] > 0.09 * (high - low):
        axes.text(steps[widest], (prior[widest] + posterior[widest]) / 2, "leakage", **style)
    else:
        text = f"leakage {signed(gaps[-1])} at the end"
        axes.text(0.99, 0.97, text, transform=axes.transAxes, **(style | {"ha": "right"}))


def kl(path: Path, run: EvaluatedRun) -> str | None:
    """Both KLs over the steps with the schedule below, and at the end by slot with the active units."""
    if not run.has_latents:
        return None
    curves = [kl_series(run, name) for name in ("forward_kl", "reverse_kl")]
    logged = any(steps for steps, _ in curves)
    slots = run.record["latents"]["num_latents"]
    with canvas(path, 11 if logged else 6, max(4.6, 1.2 + 0.45 * slots)) as figure:
        if logged:
            grid = figure.add_gridspec(2, 2, width_ratios=[1.35, 1], height_ratios=[3, 1])
            top = figure.add_subplot(grid[0, 0])
            draw_kl(top, curves)
            schedule(figure.add_subplot(grid[1, 0], sharex=top), run)
            top.tick_params(labelbottom=False)
            bars(figure.add_subplot(grid[:, 1]), run)
        else:
            bars(figure.subplots(), run)
    over = "over the steps with their weights beta and gamma below, and " if logged else ""
    return (
        f"Both KLs in nats per row, q the posterior and p the prior, {over}at the end by latent slot, with "
        "the slot's active units."
    )


def kl_series(run: EvaluatedRun, name: str) -> tuple[list[int], list[float]]:
    """What training logged, in nats per row whatever the reduction; evaluations where it logged nothing."""
    steps, values = run.series(name)
    latents = run.record["latents"]
    size = latents["num_latents"] * latents["latent_dim"] if latents["kl_reduction"] == "mean" else 1
    return (steps, [value * size for value in values]) if steps else run.series(f"eval_{name}")


def draw_kl(axes: Any, curves: list[tuple[list[int], list[float]]]) -> None:
    axes.set_title("KL between posterior q and prior p, nats per row", pad=28)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    ends = []
    # The first is broad and pale: late in training the two lie on one another.
    looks = (FORWARD, "KL(q‖p)", 3.6, 0.5), (REVERSE, "KL(p‖q)", 1.6, 1)
    for (steps, values), (colour, name, width, alpha) in zip(curves, looks, strict=True):
        floored = [max(value, KL_FLOOR) for value in values]
        axes.plot(steps, floored, color=colour, linewidth=width, alpha=alpha)
        if values:
            end = f"{values[-1]:.2g}" if values[-1] >= KL_FLOOR else f"below {KL_FLOOR:g}"
            ends.append((floored[-1], f"{name}  {end}", colour))
    if min(value for _, values in curves for value in values) < KL_FLOOR:
        axes.axhline(KL_FLOOR, color=BASELINE, linewidth=0.8, linestyle=(0, (2, 3)))
        axes.text(
            0.01,
            KL_FLOOR,
            f"{KL_FLOOR:g} and below",
            transform=axes.get_yaxis_transform(),
            fontsize=8,
            va="bottom",
        )
        axes.set_ylim(bottom=KL_FLOOR / 2)
    label_ends(axes, ends)


def schedule(axes: Any, run: EvaluatedRun) -> None:
    ends = []
    for name, colour in (("beta", FORWARD), ("gamma", REVERSE)):
        steps, values = run.series(name)
        axes.plot(steps, values, color=colour, linewidth=1.6, clip_on=False)  # 0 lies on the edge
        if values:
            ends.append((values[-1], f"{name}  {values[-1]:g}", colour))
    axes.set_ylim(bottom=0)
    axes.locator_params(axis="y", nbins=3)
    axes.set_title("Weights", fontsize=9.5, fontweight="normal", pad=4)
    steps_axis(axes)
    label_ends(axes, ends)


def bars(axes: Any, run: EvaluatedRun) -> None:
    m, size = run.metrics, run.record["latents"]["latent_dim"]
    pairs = list(zip(m["forward_kl_per_slot"], m["reverse_kl_per_slot"], strict=True))
    units = list(zip(m["active_units_posterior"], m["active_units_prior"], strict=True))
    axes.set_title("KL by slot at the end, nats per row", pad=28)
    for slot, ((forward, reverse), (posterior, prior)) in enumerate(zip(pairs, units, strict=True)):
        axes.barh(slot - 0.17, forward, height=0.3, color=FORWARD)
        axes.barh(slot + 0.17, reverse, height=0.3, color=REVERSE)
        text = f"active units\nq {posterior}, p {prior} of {size}"
        beside = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": 8.5}
        axes.annotate(text, (max(forward, reverse), slot), **beside)
    axes.set_yticks(range(len(pairs)), [f"slot {slot + 1}" for slot in range(len(pairs))])
    axes.set_ylim(len(pairs) - 0.4, -0.6)
    axes.set_xlim(0, (max(max(pair) for pair in pairs) or 1) * 1.4)
    axes.locator_params(axis="x", nbins=4)
    axes.grid(visible=False)
    colour_key(axes, [("KL(q‖p)", FORWARD), ("KL(p‖q)", REVERSE)])


def accuracy(path: Path, run: EvaluatedRun, baseline: EvaluatedRun | None) -> str | None:
    """Accuracy over the steps, and of the finished models on the test rows with its interval."""
    runs = [(run, RUN), *([(baseline, BASELINE)] if baseline else [])]
    if not run.series("eval_accuracy")[0]:
        return None
    with canvas(path, 8, 4.2) as figure:
        axes, final = figure.subplots(1, 2, sharey=True, width_ratios=[4, 1 + 0.4 * (len(runs) - 1)])
        axes.set_title("Accuracy, evaluation rows")
        for one, colour in runs:
            axes.plot(*one.series("eval_accuracy"), color=colour, marker="o", markeredgecolor="white")
        axes.yaxis.set_major_formatter("{x:.0%}")
        steps_axis(axes)
        final.set_title(
            f"All {len(run.predictions):,} test rows" if whole(run) else f"{len(run.predictions):,} test rows"
        )
        for x, (one, colour) in enumerate(runs):
            low, high = wilson(one.hits, len(one.predictions))
            value = one.metrics["accuracy"]
            final.vlines(x, low, high, color=colour, linewidth=2)
            final.plot(x, value, "D", color=colour, markeredgecolor="white", markersize=8)
            note = {"xytext": (8, 0), "textcoords": "offset points", "va": "center", "color": colour}
            final.annotate(f"{value:.1%}", (x, value), fontweight="bold", **note)
        final.set_xticks(range(len(runs)), [one.name for one, _ in runs])
        for label, (_, colour) in zip(final.get_xticklabels(), runs, strict=True):
            label.set_color(colour)
        final.set_xlim(-0.5, len(runs) - 0.2)
        finals = [(one.series("eval_accuracy")[1], one.name, colour) for one, colour in runs]
        label_ends(axes, [(values[-1], name, colour) for values, name, colour in finals if values])
    return (
        "Accuracy of greedy answers on the evaluation rows over the steps of training, and at the end on the "
        "test rows of this report with its 95% interval."
    )


def whole(run: EvaluatedRun) -> bool:
    return run.record["selection"]["drawn_with_seed"] is None
