"""`AMVLTrainer`: transformers' Trainer with the objective's schedule, our evaluation and whole checkpoints."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import rotate_checkpoints

from amvl_fast.errors import AMVLError
from amvl_fast.evaluation import evaluate
from amvl_fast.objective import Objective
from amvl_fast.training.checkpoints import require_space, written_aside

LOSS_TERMS = ("ntp_loss", "prior_ntp_loss", "forward_kl", "reverse_kl")


class AMVLTrainer(Trainer):
    """Trains an `AMVLModel`, or a plain image-text-to-text model where the objective has no latents.

    Args:
        objective: the loss terms and their schedule.
        max_new_tokens: for the answers of an evaluation.
        kwargs: as for ``transformers.Trainer``; `data_collator` is a `ChatCollator`, the datasets yield its rows.
    """

    model: Any  # transformers types it as possibly absent, which it is only before __init__ ends
    data_collator: Any
    eval_dataset: Any

    def __init__(self, *, objective: Objective, max_new_tokens: int = 16, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.objective: Objective = objective
        self.run_dir = Path(str(self.args.output_dir))
        self.max_new_tokens = max_new_tokens
        self._sums: dict[str, torch.Tensor] = {}
        self._batches = 0
        # The model averages over each batch; Trainer is to average over accumulation steps.
        self.model_accepts_loss_kwargs = False
        self.remove_callback(ProgressCallback)
        self.add_callback(ReadableProgress())

    def train(self, *args: Any, **kwargs: Any) -> Any:
        require_space(self.run_dir, self.model)
        return super().train(*args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        weights = self.objective.at(self.state.global_step, self.state.max_steps)
        outputs = model(**inputs, **weights)
        self._batches += 1
        for name in LOSS_TERMS:
            if outputs.get(name) is not None:
                self._sums[name] = self._sums.get(name, 0.0) + outputs[name].detach()
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise AMVLError(
                    f"The loss is {logs['loss']} at step {self.state.global_step}; look at the data, or start again "
                    "with a lower training.learning_rate and another training.output_dir."
                )
            logs |= {name: (total / self._batches).item() for name, total in self._sums.items()}
            weights = self.objective.at(self.state.global_step, self.state.max_steps)
            logs |= {name: weights[name] for name in ("beta", "gamma") if name in weights}
            self._sums, self._batches = {}, 0
        super().log(logs, *args, **kwargs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        metrics = evaluate(
            self.model,
            self.data_collator,
            rows,
            batch_size=self.args.per_device_eval_batch_size,
            max_new_tokens=self.max_new_tokens,
            seed=self.args.seed,
        ).metrics
        logs = {f"{metric_key_prefix}_{name}": value for name, value in scalars(metrics).items()}
        self.log(logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # transformers writes Qwen2.5-VL under its hub's names, and Trainer loads a file by the model's names and
        # ignores what does not fit: nearly all weights would silently stay as they were. `from_pretrained` renames.
        try:
            saved = type(self.model).from_pretrained(resume_from_checkpoint, dtype=self.model.dtype)
        except (OSError, SafetensorError) as error:
            raise AMVLError(
                f"The checkpoint {resume_from_checkpoint} cannot be read ({error}); remove it, and the same command "
                "goes on from the one before it."
            ) from error
        (self.model if model is None else model).load_state_dict(saved.state_dict())

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if not all(p.isfinite().all() for p in self.model.parameters() if p.requires_grad):
            raise AMVLError(
                f"The weights are no longer finite at step {self.state.global_step}, so no checkpoint is written; "
                "start again with a lower training.learning_rate and another training.output_dir."
            )
        with written_aside(self.run_dir) as aside:
            self.args.output_dir = str(aside)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.output_dir = str(self.run_dir)
        rotate_checkpoints(str(self.run_dir), self.args.save_total_limit, self.state.best_model_checkpoint)


def scalars(metrics: dict[str, Any]) -> dict[str, float]:
    """Metrics as single numbers for a log: lists are summed, dictionaries left out."""
    flat = {name: sum(value) if isinstance(value, list) else value for name, value in metrics.items()}
    return {name.removesuffix("_per_slot"): value for name, value in flat.items() if not isinstance(value, dict)}


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

    A second Ctrl-C ends it at once; the last checkpoint on disk is whole in any case.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> StopOnSignal:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.received is not None:
            control.should_save = control.should_training_stop = True
