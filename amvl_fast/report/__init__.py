"""A run's evaluation and the page that shows it."""

from amvl_fast.report.evaluate import evaluate_run

__all__ = ["evaluate_run"]
