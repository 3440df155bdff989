"""``amvl-fast evaluate``: a run's numbers on its test rows, and a page with pictures that explains them."""

from __future__ import annotations

import os
import platform
import shlex
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers

import amvl_fast
from amvl_fast.data import ChatCollator, ChatDataset
from amvl_fast.errors import AMVLError
from amvl_fast.evaluation import evaluate
from amvl_fast.modeling import AMVLModel
from amvl_fast.report import plots
from amvl_fast.report.evaluated import EvaluatedRun, read_evaluated, read_state, write_whole
from amvl_fast.report.page import FIGURES, markdown, rows_text, summary
from amvl_fast.report.swap import swap_latents
from amvl_fast.report.verdict import judge
from amvl_fast.training.loading import load_run, read_run_file

REPORT_FILE = "report.md"


def evaluate_run(
    run_dir: str | Path,
    *,
    baseline: str | Path | None = None,
    rows: int | None = None,
    latent_temperature: float | None = None,
    seed: int = 0,
    batch_size: int | None = None,
) -> Path:
    """Evaluate a run on its test rows and write its report.

    Writes evaluation.json, predictions.jsonl, report.md and its pictures in report/ into the run's directory.

    Args:
        run_dir: of a run that is complete, or has a checkpoint.
        baseline: directory of an evaluated run to set beside this one, evaluated on the same rows.
        rows: evaluate this many test rows only, drawn with `seed`.
        latent_temperature: for the answers; None takes the model's.
        seed: of the latents' noise, of the rows drawn and of the examples shown.
        batch_size: rows answered at a time; None takes the run's per_device_eval_batch_size.

    Returns:
        The path of report.md.

    Raises:
        AMVLError: there is no model or no test file, `baseline` has not been evaluated or on other rows, or
            matplotlib is missing; in that last case the evaluation has been written all the same.
    """
    run_dir = Path(run_dir)
    settings = read_run_file(run_dir)
    data = settings["data"]
    batch_size = settings["training"].get("per_device_eval_batch_size", 8) if batch_size is None else batch_size
    if data["test"] is None:
        raise AMVLError(f"The run {run_dir} has no test rows; set data.test in its configuration.")
    for name, value in (("rows", rows), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise AMVLError(f"{name} is {value}, but must be at least 1.")
    other = None if baseline is None else read_evaluated(baseline)
    test: Any = ChatDataset(data["test"], image_root=data["image_root"], split=data.get("test_split", "test"))
    drawn = rows is not None and rows < len(test)
    if drawn:
        test = test.subset(rows, seed=seed)
    selection = {"test": data["test"], "rows": len(test), "drawn_with_seed": seed if drawn else None}
    if other is not None:
        require_same_rows(other, selection)
    test.validate()
    model, processor, source = load_run(run_dir)
    collator = ChatCollator(processor)
    metrics, predictions = evaluate(
        model,
        collator,
        test,
        batch_size=batch_size,
        max_new_tokens=data["max_new_tokens"],
        latent_temperature=latent_temperature,
        seed=seed,
        progress=True,
    )
    state = read_state(run_dir)
    latents = None
    if isinstance(model, AMVLModel):
        keys = ("num_latents", "latent_dim", "kl_reduction", "latent_temperature")
        latents = {key: getattr(model.config, key) for key in keys}
        if latent_temperature is not None:
            latents["latent_temperature"] = latent_temperature
        metrics |= swap_latents(model, collator, test, batch_size=batch_size, seed=seed)
    record = {
        "metrics": metrics,
        "latents": latents,
        "selection": selection,
        "seed": seed,
        "batch_size": batch_size,
        "max_new_tokens": data["max_new_tokens"],
        "checkpoint": source.resolve().name,
        "complete": source == run_dir,
        "step": state.get("global_step"),
        "versions": versions(),
        "machine": machine(model.device),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command(run_dir, baseline, rows, latent_temperature, seed, batch_size),
    }
    run = EvaluatedRun(run_dir, record, predictions, state.get("log_history", []))
    run.write()
    verdict = judge(run, other)
    print(summary(run, verdict))
    figures = plots.write_figures(run_dir / FIGURES, run, other, test, seed=seed)
    write_whole(run_dir / REPORT_FILE, markdown(run, other, verdict, figures))
    return run_dir / REPORT_FILE


def require_same_rows(baseline: EvaluatedRun, selection: dict[str, Any]) -> None:
    theirs = baseline.record["selection"]
    if Path(theirs["test"]).resolve() != Path(selection["test"]).resolve():
        where = f"{theirs['test']}, not on {selection['test']}"
    elif {**theirs, "test": None} != {**selection, "test": None}:
        where = f"{rows_text(theirs)}, not on {rows_text(selection)}"
    else:
        return
    raise AMVLError(
        f"The baseline {baseline.directory} was evaluated on {where}; "
        "evaluate it again with the same --rows and --seed."
    )


def command(run_dir: Path, baseline: Any, rows: Any, latent_temperature: Any, seed: int, batch_size: int) -> str:
    options = {
        "--baseline": baseline,
        "--rows": rows,
        "--latent-temperature": latent_temperature,
        "--seed": seed,
        "--batch-size": batch_size,
    }
    given = [text for name, value in options.items() if value is not None for text in (name, str(value))]
    return shlex.join(["amvl-fast", "evaluate", str(run_dir), *given])


def versions() -> dict[str, str]:
    return {
        "amvl_fast": amvl_fast.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def machine(device: torch.device) -> str:
    """The GPU, or the CPU with the number of threads used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def cpu_name() -> str:
    # platform.processor() is empty on most Linux systems.
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
