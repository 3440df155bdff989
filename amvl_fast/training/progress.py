"""What a person at the terminal sees of a run, and how they stop it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback


class ReadableProgress(ProgressCallback):
    """A progress bar, and one line a log step that a person can read."""

    SHOWN = {
        "loss": "loss {:.4f}",
        "ntp_loss": "ntp {:.4f}",
        "prior_ntp_loss": "prior ntp {:.4f}",
        "forward_kl": "KL(q|p) {:.4g}",
        "reverse_kl": "KL(p|q) {:.4g}",
        "beta": "beta {:.2f}",
        "gamma": "gamma {:.2f}",
        "grad_norm": "grad {:.2f}",
        "learning_rate": "lr {:.1e}",
        "eval_accuracy": "accuracy {:.3f}",
        "eval_nll": "nll {:.4f}",
        "eval_nll_posterior": "nll posterior {:.4f}",
        "eval_nll_prior": "nll prior {:.4f}",
        "eval_forward_kl": "KL(q|p) {:.3g}",
        "eval_active_units_posterior": "active units {:d}",
    }

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or self.training_bar is None:
            return
        parts = [form.format(logs[name]) for name, form in self.SHOWN.items() if name in logs]
        if parts:
            kind = "eval " if "eval_accuracy" in logs else "step "
            self.training_bar.write(f"{kind}{state.global_step:>6}/{state.max_steps}  " + "  ".join(parts))


class StopOnSignal(TrainerCallback):
    """Ctrl-C, or a scheduler's SIGTERM, ends the run after the step in hand, with a checkpoint to resume from.

    A second Ctrl-C ends it at once; the last checkpoint on disk is whole in any case. Where one of several processes
    hears it, all of them stop after the same step.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._heard = 0.0
        self.stopped = False
        # Whether any of the processes says so.
        self.any_of: Callable[[bool], bool] = bool

    def __enter__(self) -> StopOnSignal:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        # Launchers pass a terminal's Ctrl-C on to processes that heard it themselves.
        if self.received is not None and now - self._heard > 1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received, self._heard = number, now

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.any_of(self.received is not None):
            self.stopped = True
            control.should_save = control.should_training_stop = True
