"""An evaluated run on disk: what was measured, every answer, and what its training logged."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amvl_fast.errors import AMVLError
from amvl_fast.training.checkpoints import newest

EVALUATION_FILE, PREDICTIONS_FILE, STATE_FILE = "evaluation.json", "predictions.jsonl", "trainer_state.json"


@dataclass(frozen=True)
class EvaluatedRun:
    """A run directory with its evaluation.

    Attributes:
        directory: of the run.
        record: what evaluation.json holds: `metrics` and everything that made them.
        predictions: one dict a test row, as in `amvl_fast.evaluation.Evaluation`.
        log: the Trainer's log of the run, empty if it kept none.
    """

    directory: Path
    record: dict[str, Any]
    predictions: list[dict[str, Any]]
    log: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return self.directory.resolve().name

    @property
    def metrics(self) -> dict[str, Any]:
        return self.record["metrics"]

    @property
    def has_latents(self) -> bool:
        return "forward_kl_per_slot" in self.metrics

    @property
    def hits(self) -> int:
        return sum(p["correct"] for p in self.predictions)

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """The steps at which `key` was logged as a finite number, and its values."""
        found = {entry["step"]: entry[key] for entry in self.log if math.isfinite(entry.get(key, math.nan))}
        return list(found), list(found.values())

    def write(self) -> None:
        """Write evaluation.json and predictions.jsonl; a reader never sees half of one."""
        lines = "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in self.predictions)
        # The answers go first: evaluation.json is what says that there is an evaluation.
        write_whole(self.directory / PREDICTIONS_FILE, lines)
        write_whole(self.directory / EVALUATION_FILE, json.dumps(self.record, indent=2, ensure_ascii=False) + "\n")


def read_evaluated(run_dir: str | Path) -> EvaluatedRun:
    """An evaluated run.

    Raises:
        AMVLError: the run has not been evaluated.
    """
    run_dir = Path(run_dir)
    files = run_dir / EVALUATION_FILE, run_dir / PREDICTIONS_FILE
    if not all(file.is_file() for file in files):
        missing = next(file.name for file in files if not file.is_file())
        raise AMVLError(f"{run_dir} has no {missing}; run `amvl-fast evaluate {run_dir}` first.")
    record, lines = (file.read_text(encoding="utf-8") for file in files)
    # Not splitlines(): an answer may hold a line separator that JSON leaves as it is.
    predictions = [json.loads(line) for line in lines.split("\n") if line]
    return EvaluatedRun(run_dir, json.loads(record), predictions, read_state(run_dir).get("log_history", []))


def read_state(run_dir: Path) -> dict[str, Any]:
    """The Trainer's state at a run's end, or else at its newest checkpoint; empty if there is neither."""
    for directory in (run_dir, newest(run_dir)):
        if directory and (directory / STATE_FILE).is_file():
            return json.loads((directory / STATE_FILE).read_text())
    return {}


def write_whole(path: Path, text: str) -> None:
    """Write a text file aside and rename it."""
    aside = path.with_name(path.name + ".unfinished")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
