"""What an evaluation says of the latents: collapsed, leaking or in use, with the numbers that say so.

The thresholds are ours; the paper (arXiv 2607.00461) gives none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from amvl_fast.report.evaluated import EvaluatedRun

COLLAPSED_KL = 0.01  # nats per row
LEAKING_GAP = 0.1  # nats per answer token
IGNORED_SWAP = 0.01  # nats per answer token
Z95 = 1.959964


class Verdict(NamedTuple):
    """`mark` and `headline` for a glance, `sentences` with the numbers for a reader."""

    mark: str
    headline: str
    sentences: list[str]


def wilson(hits: int, rows: int) -> tuple[float, float]:
    """The 95% interval of a proportion (Wilson 1927).

    >>> low, high = wilson(8, 10)
    >>> f"{low:.3f} {high:.3f}"
    '0.490 0.943'
    """
    share, z2 = hits / rows, Z95**2
    middle = (share + z2 / (2 * rows)) / (1 + z2 / rows)
    half = Z95 / (1 + z2 / rows) * math.sqrt(share * (1 - share) / rows + z2 / (4 * rows**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def difference(ours: Sequence[bool], theirs: Sequence[bool]) -> tuple[float, float, float]:
    """The difference of two accuracies on the same rows, and its 95% interval (Bonett and Price 2012).

    It is narrower than the two single intervals suggest: rows that both get right, or both wrong, drop out.
    """
    rows = len(ours)
    won = sum(a and not b for a, b in zip(ours, theirs, strict=True))
    lost = sum(b and not a for a, b in zip(ours, theirs, strict=True))
    more, less = (won + 1) / (rows + 2), (lost + 1) / (rows + 2)
    half = Z95 * math.sqrt((more + less - (more - less) ** 2) / (rows + 2))
    return (won - lost) / rows, max(-1.0, more - less - half), min(1.0, more - less + half)


def judge(run: EvaluatedRun, baseline: EvaluatedRun | None = None) -> Verdict:
    """The verdict on a run; `baseline` was evaluated on the same rows."""
    comparison, below = compare(run, baseline)
    if not run.has_latents:
        return Verdict("⚪", "Latents: none", ["This run was trained without latents.", comparison])
    headline, detail = read(run, below)
    mark, meaning = MEANINGS[headline]
    return Verdict(mark, f"Latents: {headline}", [meaning + detail, *evidence(run), comparison])


MEANINGS = {
    "broken": ("🔴", "A KL or a likelihood is not a finite number: training diverged."),
    "collapsed": ("🔴", "The latents carry nothing of the answer that the prompt does not give anyway: "),
    "leaking": (
        "🔴",
        "Answers are much likelier under posterior samples, which have seen them, than under prior samples, "
        "and those that the prior gives are clearly worse than the baseline's: the posterior puts into the "
        "latents what the prior cannot supply.",
    ),
    "perhaps leaking": (
        "🟡",
        "Answers are much likelier under posterior samples than under prior samples. Whether that costs "
        "accuracy only a comparison can tell: evaluate a run without latents and give it as --baseline.",
    ),
    "idle at inference": (
        "🟡",
        "The posterior's latents differ between inputs, but the prior's, which answers come from, do not: at "
        "inference they carry nothing about the input.",
    ),
    "ignored": (
        "🔴",
        "Decoded with the latents of another row, answers are as likely as with their own or nearly so: whatever "
        "the latents carry, the decoder makes next to no use of it.",
    ),
    "untested": ("🟡", "There are too few rows to see whether answers depend on the latents."),
    "in use, with a gap": (
        "🟡",
        "Answers depend on the latents. They are much likelier under posterior samples than under prior samples, "
        "but those that the prior gives are not clearly worse than the baseline's.",
    ),
    "in use, at a cost": (
        "🟡",
        "Answers depend on the latents, but accuracy is clearly below the baseline's.",
    ),
    "in use": (
        "🟢",
        "Answers depend on the latents. This does not say that they gain by them",
    ),
}


def read(run: EvaluatedRun, below: bool | None) -> tuple[str, str]:
    """A key of `MEANINGS` and what to add to it.

    Args:
        below: whether accuracy is clearly below the baseline's, None without one.
    """
    m = run.metrics
    gap, kl = m["leakage"], sum(m["forward_kl_per_slot"])
    if not (math.isfinite(gap) and math.isfinite(kl)):
        return "broken", ""
    if sum(m["active_units_posterior"]) == 0:
        return "collapsed", "no latent unit of the posterior differs between inputs."
    if kl < COLLAPSED_KL:
        return "collapsed", "posterior and prior are the same."
    if gap > LEAKING_GAP and below is not False:
        return "leaking" if below else "perhaps leaking", ""
    if sum(m["active_units_prior"]) == 0:
        return "idle at inference", ""
    if m.get("swap_cost", 0.0) < IGNORED_SWAP:
        return "ignored" if "swap_cost" in m else "untested", ""
    if gap > LEAKING_GAP:
        return "in use, with a gap", ""
    if below:
        return "in use, at a cost", ""
    return "in use", ": that is the comparison of accuracies below."


def evidence(run: EvaluatedRun) -> list[str]:
    """The numbers that `read` looks at, with its thresholds."""
    m, latents = run.metrics, run.record["latents"]
    units = latents["num_latents"] * latents["latent_dim"]
    posterior, prior = sum(m["active_units_posterior"]), sum(m["active_units_prior"])
    forward, reverse = number(sum(m["forward_kl_per_slot"])), number(sum(m["reverse_kl_per_slot"]))
    gap = f"{abs(m['leakage']):.3f} {'more' if m['leakage'] >= 0 else 'less'}"
    facts = [
        f"Active units: {posterior} of {units} in the posterior and {prior} in the prior (collapsed: none in "
        "the posterior).",
        f"Forward KL(q‖p), q the posterior and p the prior, is {forward} nats per row, reverse KL(p‖q) "
        f"{reverse} (collapsed: forward below {COLLAPSED_KL}).",
        f"An answer token costs {m['nll_prior']:.3f} nats under prior samples, {gap} than under posterior "
        f"samples (leaking: over {LEAKING_GAP} more, and accuracy clearly below the baseline's).",
    ]
    if "swap_cost" in m:
        facts.append(
            f"With the prior sample of another row an answer token costs {m['swap_nll_other']:.3f} nats, with "
            f"its own {m['swap_nll_own']:.3f}, on {m['swap_rows']:,} rows: a swap costs {signed(m['swap_cost'])} "
            f"(ignored: below {IGNORED_SWAP})."
        )
    return facts


def compare(run: EvaluatedRun, baseline: EvaluatedRun | None) -> tuple[str, bool | None]:
    """A sentence on the two accuracies, and whether the run's is clearly below."""
    if baseline is None:
        return "No baseline was given, so accuracy is not compared.", None
    ours, theirs = ([p["correct"] for p in one.predictions] for one in (run, baseline))
    delta, low, high = difference(ours, theirs)
    word = "clearly below" if high < 0 else "clearly above" if low > 0 else "not distinguishable"
    sentence = (
        f"Accuracy is {run.metrics['accuracy']:.1%}, the baseline's ({baseline.name}) "
        f"{baseline.metrics['accuracy']:.1%}: {100 * delta:+.1f} points, 95% interval {100 * low:+.1f} to "
        f"{100 * high:+.1f} on the same rows, {word} (clearly: the interval leaves out 0; it knows of test "
        "rows, not of training seeds)."
    )
    return sentence, high < 0


def number(value: float) -> str:
    """Two digits that count or more, whatever the size: KLs span orders of magnitude."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if value >= 1 or value == 0 else f"{value:#.2g}"


def signed(value: float) -> str:
    """Three digits and a sign, but no minus zero."""
    return f"{round(value, 3) + 0.0:+.3f}"
