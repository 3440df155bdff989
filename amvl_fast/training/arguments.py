"""`AMVLTrainingArguments`: transformers' arguments, and what training AMVL needs besides."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import SchedulerType, TrainingArguments

from amvl_fast.errors import AMVLError
from amvl_fast.objective import Objective

# What transformers offers and would not do what it says here.
REFUSED = {
    "load_best_model_at_end": "evaluate the checkpoints and choose one",
    "metric_for_best_model": "evaluate the checkpoints and choose one",
    "save_only_model": "a run could not go on from its checkpoints; the end of a run holds the model alone",
    "push_to_hub": "push the model when the run has ended",
    "auto_find_batch_size": "losses belong to a batch of known size; set training.per_device_train_batch_size",
    "label_smoothing_factor": "the objective has its own losses",
}


@dataclass
class AMVLTrainingArguments(TrainingArguments):
    """``transformers.TrainingArguments`` with other defaults where theirs do not fit, and:

    Args:
        objective: the loss terms with weights and schedule: an `Objective`, its keys and values, or those as JSON.
        latents_learning_rate: of slots, heads and projection; None takes `learning_rate`.
        lora_learning_rate: of LoRA adapters, likewise.
        vision_learning_rate: of vision tower and connector where they are trained, likewise.
        padding_free: pack prompts of different lengths into one row; takes a flash attention.
        execution: as for `AMVLModel.forward`.
        max_new_tokens: for the answers of an evaluation.

    `learning_rate` is the language model's.

    Raises:
        AMVLError: an objective that is none, or options of transformers that would not do what they say here.
    """

    # Rows are not tensors before they are collated, logs go to TensorBoard, and a loss that is NaN ends a run instead
    # of being left out of the average.
    remove_unused_columns: bool = False
    report_to: None | str | list[str] = "tensorboard"
    logging_nan_inf_filter: bool = False
    logging_steps: float = 10
    save_total_limit: int | None = 2
    lr_scheduler_type: SchedulerType | str = "cosine"
    warmup_steps: float = 0.05
    dataloader_pin_memory: bool = field(default_factory=torch.cuda.is_available)
    # Every term is in the graph at any weight. Who trains the vision tower on rows of which some have no image turns it
    # on.
    ddp_find_unused_parameters: bool | None = False

    objective: dict | str | None = None
    latents_learning_rate: float | None = None
    lora_learning_rate: float | None = None
    vision_learning_rate: float | None = None
    padding_free: bool = False
    execution: str = "shared_prefix"
    max_new_tokens: int = 16

    def __post_init__(self) -> None:
        for key, advice in REFUSED.items():
            if getattr(self, key):
                raise AMVLError(f"training.{key} is not supported; {advice}.")
        if str(self.save_strategy) == "best":
            raise AMVLError(f"training.save_strategy 'best' is not supported; {REFUSED['load_best_model_at_end']}.")
        super().__post_init__()
        self.objective = _objective(self.objective)  # type: ignore[assignment]
        if not self.average_tokens_across_devices:
            raise AMVLError("training.average_tokens_across_devices: losses are always averaged over all devices.")
        # Trainer would split a batch over all visible GPUs by rows, which tears pixel_values from their images.
        self._n_gpu = min(self.n_gpu, 1)

    def to_dict(self) -> dict[str, Any]:
        objective: Any = self.objective
        return super().to_dict() | {"objective": asdict(objective)}

    def learning_rates(self) -> dict[str, float]:
        """Of every part in `amvl_fast.training.parts.PARTS`."""
        own = {
            "lora": self.lora_learning_rate,
            "latents": self.latents_learning_rate,
            "connector": self.vision_learning_rate,
            "vision_tower": self.vision_learning_rate,
        }
        return {"language_model": self.learning_rate} | {
            part: self.learning_rate if rate is None else rate for part, rate in own.items()
        }


def _objective(value: Any) -> Objective:
    if isinstance(value, Objective):
        return value
    try:
        return Objective(**(json.loads(value) if isinstance(value, str) else value or {}))
    except AMVLError:
        raise
    except (TypeError, ValueError) as error:
        raise AMVLError(f"training.objective is {value!r}, which is no objective ({error}).") from None
