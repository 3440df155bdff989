"""The words of a report: a summary for the terminal, and report.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from amvl_fast.evaluation import ACTIVE_VARIANCE
from amvl_fast.report.evaluated import EvaluatedRun
from amvl_fast.report.verdict import Verdict, number, signed, wilson

FIGURES = "report"
LABEL_WIDTH = 44


def rows_text(selection: dict[str, Any]) -> str:
    seed = selection["drawn_with_seed"]
    if seed is None:
        return f"all {selection['rows']:,} test rows"
    return f"{selection['rows']:,} test rows drawn with seed {seed}"


def summary(run: EvaluatedRun, verdict: Verdict) -> str:
    """A few lines for a terminal."""
    lines = [f"{run.name}: accuracy {accuracy(run)} on {rows_text(run.record['selection'])}"]
    lines += [f"  {label:<{LABEL_WIDTH}} {value}" for label, value in measures(run)]
    return "\n".join([*lines, f"{verdict.mark} {verdict.headline}. {verdict.sentences[0]}"])


def accuracy(run: EvaluatedRun) -> str:
    low, high = wilson(run.hits, len(run.predictions))
    return f"{run.metrics['accuracy']:.1%} ({100 * low:.1f} to {100 * high:.1f})"


def measures(run: EvaluatedRun) -> list[tuple[str, str]]:
    """Names and values of what was measured besides accuracy."""
    m = run.metrics
    if not run.has_latents:
        return [("nats per answer token, no latents", f"{m['nll']:.3f}")]
    units = run.record["latents"]["num_latents"] * run.record["latents"]["latent_dim"]
    swap = signed(m["swap_cost"]) if "swap_cost" in m else ""
    return [
        ("nats per answer token, posterior samples", f"{m['nll_posterior']:.3f}"),
        ("nats per answer token, prior samples", f"{m['nll_prior']:.3f}"),
        ("leakage, prior minus posterior", signed(m["leakage"])),
        ("swap cost, nats per answer token", swap),
        ("forward KL(q‖p), nats per row", number(sum(m["forward_kl_per_slot"]))),
        ("reverse KL(p‖q), nats per row", number(sum(m["reverse_kl_per_slot"]))),
        (f"active units of {units}, posterior", str(sum(m["active_units_posterior"]))),
        (f"active units of {units}, prior", str(sum(m["active_units_prior"]))),
    ]


def markdown(run: EvaluatedRun, baseline: EvaluatedRun | None, verdict: Verdict, figures: list[tuple[str, str]]) -> str:
    """The page; `figures` are pairs of file name and caption."""
    parts = [
        f"# {run.name}: {verdict.mark} {verdict.headline}",
        table([run, *([baseline] if baseline else [])]),
    ]
    if not run.record["complete"]:
        parts.append(f"Training is not complete: these are the numbers of {run.record['checkpoint']}.")
    parts += [
        f"## {verdict.mark} {verdict.headline}",
        "\n".join(f"- {sentence}" for sentence in verdict.sentences),
    ]
    parts.append("The thresholds are this package's, not the paper's.")
    if figures:
        parts.append("## Pictures")
    parts += [f"![{Path(name).stem}]({FIGURES}/{name})\n\n{caption}" for name, caption in figures]
    return "\n\n".join([*parts, "## How it was made", origin(run), GLOSSARY]) + "\n"


GLOSSARY = f"""## Words

- **q** is the posterior, which sees prompt and answer and exists in training only; **p** is the prior, which
  sees the prompt alone and which answers come from. **Forward KL** is KL(q‖p), **reverse KL** is KL(p‖q).
- **Leakage** is the nats per answer token under prior samples minus those under posterior samples.
- **Swap cost** is how many nats an answer token costs more when it is decoded with the prior sample of another
  row than with that of its own: 0 if the decoder does not read the latents, or they say the same everywhere.
- A latent unit is **active** if the variance over rows of its mean exceeds {ACTIVE_VARIANCE} (Burda et al.
  2016, arXiv 1509.00519).
- Intervals are 95% Wilson intervals over test rows. Rows that share an image are not independent, so they are
  a little too narrow."""


def table(runs: list[EvaluatedRun]) -> str:
    """One column a run, the first row accuracy; what a run does not have is left empty."""
    heads = [run.name if i == 0 else f"{run.name} (baseline)" for i, run in enumerate(runs)]
    values = [{"accuracy, 95% interval": f"**{accuracy(run)}**", **dict(measures(run))} for run in runs]
    labels = list(dict.fromkeys(label for column in values for label in column))
    # What a run with latents and one without have in different rows stands together.
    labels.sort(key=lambda label: (not label.startswith("accuracy"), not label.startswith("nats per")))
    lines = [
        f"| {rows_text(runs[0].record['selection'])} | {' | '.join(heads)} |",
        "|---" * (len(runs) + 1) + "|",
    ]
    lines += [f"| {label} | {' | '.join(column.get(label, '') for column in values)} |" for label in labels]
    return "\n".join(lines)


def origin(run: EvaluatedRun) -> str:
    r = run.record
    step = "" if r["step"] is None else f" at step {r['step']:,}"
    lines = [
        f"- command: `{r['command']}`",
        f"- model: {r['checkpoint']}{step}; answers are greedy, at most {r['max_new_tokens']} tokens"
        + (f", latent temperature {r['latents']['latent_temperature']:g}" if r["latents"] else ""),
        f"- rows: {rows_text(r['selection'])} of `{r['selection']['test']}`; seed {r['seed']}",
        "- versions: " + ", ".join(f"{name} {value}" for name, value in r["versions"].items()),
        f"- machine: {r['machine']}; {r['date']}",
    ]
    return "\n".join(lines)
