"""Trainer's checkpoints as they should be: whole, safe to read, and the same for every engine but DeepSpeed."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from amvl_fast.errors import AMVLError
from amvl_fast.lora import ADAPTER_FILE, base_of, load_lora
from amvl_fast.training.checkpoints import (
    damage,
    newest,
    numbered,
    read_manifest,
    require_space,
    step_of,
    written_aside,
)
from amvl_fast.training.zero import weights_only

# What FSDP's own activation checkpointing puts into names.
WRAPPED = "_checkpoint_wrapped_module."
OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"


class SavingTrainer(Trainer):
    """transformers' Trainer; what it writes and reads is what `amvl_fast.training.checkpoints` knows to be whole."""

    model: Any  # transformers types it as possibly absent, which it is only before __init__ ends
    lr_scheduler: Any

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.run_dir = Path(str(self.args.output_dir))

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        require_space(self.run_dir, self.model)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest(self.run_dir)
            if resume_from_checkpoint is None:
                raise AMVLError(f"{self.run_dir} has no whole checkpoint to go on from; train without one.")
        self._require_newest(resume_from_checkpoint)
        if resume_from_checkpoint:
            self._require_same_batch(Path(resume_from_checkpoint))
            self._load_weights(resume_from_checkpoint)
        return super().train(str(resume_from_checkpoint or "") or None, *args, **kwargs)

    def _require_newest(self, checkpoint: Any) -> None:
        """Nobody trains past whole checkpoints of another course of a run, which would get mixed up with this one's."""
        later = [path for step, path in numbered(self.run_dir) if step > step_of(checkpoint) and damage(path) is None]
        if later:
            raise AMVLError(
                f"{later[-1]} is of a later step than the one that this run begins at; go on from it, remove it, or "
                "choose another output_dir."
            )

    def _facts(self) -> dict[str, Any]:
        args = self.args
        samples = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        # DeepSpeed's optimiser states are for one stage and number of processes; all others are anybody's.
        stage = self.accelerator.state.deepspeed_plugin.zero_stage if self.is_deepspeed_enabled else None
        engine = None if stage is None else f"ZeRO-{stage} on {args.world_size} processes"
        return {"samples_per_step": samples, "deepspeed": engine}

    def _require_same_batch(self, checkpoint: Path) -> None:
        before, now = read_manifest(checkpoint), self._facts()
        if before.get("samples_per_step", now["samples_per_step"]) != now["samples_per_step"]:
            raise AMVLError(
                f"{checkpoint} comes from steps of {before['samples_per_step']} samples, and this run would take "
                f"{now['samples_per_step']}; make processes x training.per_device_train_batch_size x "
                "training.gradient_accumulation_steps the same."
            )
        if before.get("deepspeed") != now["deepspeed"]:
            engines = [facts.get("deepspeed") or "no DeepSpeed" for facts in (before, now)]
            raise AMVLError(
                f"{checkpoint} was written with {engines[0]}, and this run has {engines[1]}, which cannot read its "
                "optimiser; go on as it began, or begin in another training.output_dir."
            )

    def _load_weights(self, checkpoint: str) -> None:
        # transformers writes Qwen2.5-VL under its hub's names, and Trainer loads a file by the model's names and
        # ignores what does not fit: nearly all weights would silently stay as they were. `from_pretrained` renames.
        # All of it happens before a model is sharded, so that engines need no way of their own; DeepSpeed has one.
        if self.is_deepspeed_enabled:
            return
        if (Path(checkpoint) / ADAPTER_FILE).is_file():
            load_lora(self.model, checkpoint)
        else:
            saved = type(self.model).from_pretrained(checkpoint, dtype=self.model.dtype, use_safetensors=True)
            self.model.load_state_dict(saved.state_dict())

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        begun = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)  # of logs and checkpoints, as they are asked for now
        return begun

    def _run_epoch(self, *, epoch: int, **kwargs: Any) -> None:  # type: ignore[override]
        # Asked after a step alone, transformers would take one more where the last was saved but the run not ended.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(epoch=epoch, **kwargs)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        with weights_only() if self.is_deepspeed_enabled else contextlib.nullcontext():
            return super()._prepare_for_training(*args, **kwargs)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: see `_load_weights`."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(self.model, options=options)
        if self.args.should_save:
            self._save(output_dir, state_dict=state)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # Engines hand over a copy for each of the names that a tied weight goes by.
        for name in getattr(base_of(self.model), "all_tied_weights_keys", {}) if state_dict else ():
            state_dict.pop(name, None)
        super()._save(output_dir, state_dict)
        directory = Path(output_dir or self.run_dir)
        if not self.args.should_save:
            return
        (directory / "training_args.bin").unlink(missing_ok=True)  # a pickle, which nobody reads
        if (directory / ADAPTER_FILE).is_file():
            base_of(self.model).config.save_pretrained(directory)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # By the names of parameters and whole: whatever engine and number of processes goes on from it.
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_optimizer_state_dict(self.model, self._inner_optimizer(), options=options)
        if self.args.should_save:
            torch.save(state, os.path.join(output_dir, OPTIMIZER))
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        # Mapped where it goes to other devices, so that a process reads of it what its shards need; on the CPU moments
        # would stay in the file, which will be deleted.
        path, mapped = os.path.join(checkpoint, OPTIMIZER), self.accelerator.device.type != "cpu"
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        known, inner = set(state["state"]), self._inner_optimizer()
        if known:  # plain gradient descent keeps nothing
            # Not strict: of what never had a gradient there is no state, and none is to be made up.
            options = StateDictOptions(full_state_dict=True, strict=False)
            set_optimizer_state_dict(self.model, inner, state, options=options)
            for name, parameter in self.model.named_parameters():
                if name.replace(WRAPPED, "") not in known:
                    inner.state.pop(parameter, None)
        self.lr_scheduler.load_state_dict(torch.load(os.path.join(checkpoint, SCHEDULER), weights_only=True))
        for group, rate in zip(self._inner_optimizer().param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def _inner_optimizer(self) -> Any:
        return getattr(self.optimizer, "optimizer", self.optimizer)  # out of accelerate's wrapper

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.require_finite()
        with self.written_aside() as aside:
            self.args.output_dir = str(aside)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.output_dir = str(self.run_dir)
        if self.args.should_save:
            self._remove_passed_over()
            rotate_checkpoints(str(self.run_dir), self.args.save_total_limit, self.state.best_model_checkpoint)

    def written_aside(self) -> Any:
        """See `amvl_fast.training.checkpoints.written_aside`; by all processes together."""
        wait = self.accelerator.wait_for_everyone
        return written_aside(self.run_dir, self._facts(), is_main=self.args.should_save, wait=wait)

    def _remove_passed_over(self) -> None:
        """Damaged checkpoints of steps to come: rotation would keep them, being the newest, in place of whole ones."""
        for step, path in numbered(self.run_dir):
            if step > self.state.global_step:
                shutil.rmtree(path, ignore_errors=True)

    def require_finite(self) -> None:
        """Raises AMVLError if a weight is NaN or infinite, on any process."""
        if self.any_of(not all(_local(p).isfinite().all() for p in self.model.parameters() if p.requires_grad)):
            raise AMVLError(
                f"The weights are no longer finite at step {self.state.global_step}, so they are not written; "
                "start again with a lower training.learning_rate and another training.output_dir."
            )

    def any_of(self, flag: bool) -> bool:
        """Whether any process says so."""
        if self.args.world_size == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(int(flag), device=self.accelerator.device), "sum"))


def _local(parameter: nn.Parameter) -> torch.Tensor:
    """The process's own share."""
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
