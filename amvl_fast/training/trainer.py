"""`AMVLTrainer`: transformers' Trainer for AMVL, on any number of processes, with whole checkpoints."""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_pt_utils import BatchRebalanceSampler

from amvl_fast.cost import sizes_of, training_flops
from amvl_fast.data import ChatStream
from amvl_fast.errors import AMVLError
from amvl_fast.evaluation import evaluate
from amvl_fast.lora import base_of
from amvl_fast.modeling import AMVLModel
from amvl_fast.objective import Objective
from amvl_fast.training.arguments import AMVLTrainingArguments
from amvl_fast.training.meter import Counts, Meter
from amvl_fast.training.parts import gradient_norms, parts_of
from amvl_fast.training.progress import ReadableProgress
from amvl_fast.training.sampling import WholeSteps
from amvl_fast.training.saving import SavingTrainer
from amvl_fast.training.zero import gathered, loading_whole
from amvl_fast.vision_cache import CachedCollator, VisionCache

OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"


class Numbered:
    """A collator whose batches say which rows they hold: ``sample_ids``, ``(batch,)`` int64."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(rows)
        if all("row" in row for row in rows):
            batch["sample_ids"] = torch.tensor([row["row"] for row in rows])
        return batch


class AMVLTrainer(SavingTrainer):
    """Trains an `AMVLModel`, or a plain image-text-to-text model where the objective has no latents.

    Losses are averaged over the whole accumulated batch, over answer tokens and samples of all processes. Noise
    depends on the seed, the step, and the row of the dataset (or, where rows have no number, their place in the whole
    batch), so how a batch is split changes nothing but rounding.

    Args:
        args: `AMVLTrainingArguments`.
        vision_cache: filled with what the frozen vision tower makes of the training rows' images, which it then need
            not see again.
        kwargs: as for ``transformers.Trainer``; `data_collator` is a `ChatCollator`, the datasets yield its rows.
    """

    model: Any  # transformers types it as possibly absent, which it is only before __init__ ends
    args: AMVLTrainingArguments
    data_collator: Any
    eval_dataset: Any
    lr_scheduler: Any

    def __init__(
        self,
        model: Any = None,
        args: AMVLTrainingArguments | None = None,
        *,
        vision_cache: VisionCache | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, AMVLTrainingArguments):
            raise AMVLError(f"AMVLTrainer: args is {type(args).__name__}; pass AMVLTrainingArguments.")
        if model is None:
            raise AMVLError("AMVLTrainer: there is no model; pass one that is made, and not a way to make it.")
        for name in ("compute_loss_func", "compute_metrics"):
            if kwargs.get(name) is not None:
                raise AMVLError(f"AMVLTrainer: {name} is not supported; the losses and metrics are the objective's.")
        self.objective: Objective = args.objective  # type: ignore[assignment]
        kind = type(base_of(model))
        if self.objective.terms.latents != issubclass(kind, AMVLModel):
            raise AMVLError(
                f"AMVLTrainer: the objective {self.objective.name!r} does not go with a {kind.__name__}; "
                "'no_latents' is for models without latents, the others are for AMVLModel."
            )
        if kwargs.get("processing_class") is None:  # without it nobody could use what is saved
            kwargs["processing_class"] = getattr(kwargs.get("data_collator"), "processor", None)
        super().__init__(model=model, args=args, **kwargs)
        self.vision_cache = vision_cache
        # Both: compute_loss divides by the whole batch, and nobody else is to.
        self.model_accepts_loss_kwargs, self.loss_is_scaled_for_ga = False, True
        self.meter = Meter(self.accelerator, self._operations())
        self._weights = self.model.num_parameters(exclude_embeddings=True)  # while they are whole
        self._part = 0
        self._norms: dict[str, float] = {}
        # Of outputs that are views; nobody writes into them.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        self._sampler: Any = None
        self.remove_callback(ProgressCallback)
        if not args.disable_tqdm:
            self.add_callback(ReadableProgress())

    @property
    def _image_token_id(self) -> int:
        whole = base_of(self.model)
        return (whole.backbone if isinstance(whole, AMVLModel) else whole).config.image_token_id

    def _operations(self) -> Any:
        """What the meter asks; None for a model whose operations nobody has counted."""
        whole, objective = base_of(self.model), self.objective
        if not isinstance(whole, AMVLModel):
            return None
        try:
            with loading_whole():
                sizes = sizes_of(whole.config.backbone_config, whole.config)
        except AMVLError:
            return None
        parts = parts_of(self.model).items()
        return functools.partial(
            training_flops,
            sizes,
            execution=self.args.execution,
            decoded=objective.num_posterior_samples + (objective.prior_ntp_weight > 0),
            lora_rank=next((p.shape[0] for name, p in self.model.named_parameters() if ".lora_A." in name), 0),
            freeze=tuple(part for part, found in parts if not any(p.requires_grad for p in found.values())),
        )

    # The step

    def get_train_dataloader(self) -> Any:
        cache = self.vision_cache
        collator = Numbered(self.data_collator if cache is None else CachedCollator(self.data_collator, cache))
        if isinstance(self.train_dataset, ChatStream):
            self._require_share(self.train_dataset)
            # It deals rows to processes itself, where accelerate would have each decode what the others read.
            loader = DataLoader(
                self.train_dataset,
                batch_size=self.args.per_device_train_batch_size,
                collate_fn=collator,
                num_workers=self.args.dataloader_num_workers,
                pin_memory=self.args.dataloader_pin_memory,
            )
            return prepare_data_loader(
                loader, self.accelerator.device, 1, 0, put_on_device=True, dispatch_batches=False
            )
        before, self.data_collator = self.data_collator, collator
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = before

    def _require_share(self, stream: ChatStream) -> None:
        args = self.args
        expected = {
            "batch_size": args.per_device_train_batch_size,
            "rank": args.process_index,
            "world_size": args.world_size,
            "endless": stream.endless or args.world_size > 1,  # else processes run out one after the other
        }
        for name, value in expected.items():
            if getattr(stream, name) != value:
                raise AMVLError(f"AMVLTrainer: the ChatStream has {name}={getattr(stream, name)}; make it {value}.")

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        if not hasattr(rows, "__len__"):
            return None
        args, strategy, samples = self.args, self.args.train_sampling_strategy, self._facts()["samples_per_step"]
        seed: int | None = args.seed if args.data_seed is None else args.data_seed
        lengths: Any = None
        if strategy in ("group_by_length", "batch_rebalance"):
            if not hasattr(rows, "lengths"):
                raise AMVLError(
                    f"training.train_sampling_strategy={strategy} takes a ChatDataset, which knows lengths."
                )
            lengths = rows.lengths().tolist()
        if strategy == "batch_rebalance" and len(rows) >= samples:
            # Sorts within a step alone. What does not fill a step is left out: how it is filled up hangs on the split.
            self._sampler = BatchRebalanceSampler(
                lengths,
                samples,
                dp_size=args.world_size,
                grad_accum=args.gradient_accumulation_steps,
                seed=seed or 0,
                rank=args.process_index,
                drop_last=True,
            )
        else:
            seed = None if strategy == "sequential" else seed
            last = args.dataloader_drop_last
            self._sampler = WholeSteps(len(rows), samples, seed=seed, lengths=lengths, drop_last=last)
        return self._sampler

    def _run_epoch(self, *, epoch: int, **kwargs: Any) -> None:  # type: ignore[override]
        # Behind the wrappers of a run that is resumed, neither transformers nor accelerate find it.
        if self._sampler is not None:
            self._sampler.set_epoch(epoch)
        super()._run_epoch(epoch=epoch, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        batches, _ = super().get_batch_samples(*args, **kwargs)
        if not batches:  # the end of a stream, where transformers goes on asking
            return batches, None
        self._part, self._counts = 0, Counts.of(batches, self.accelerator, self._image_token_id)
        self.meter.begin_step(self._counts)
        return batches, None

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        rows = len(inputs["input_ids"])
        places = torch.arange(rows, device=inputs["input_ids"].device)
        place = self._part * self.args.world_size + self.args.process_index
        ids = inputs.pop("sample_ids", places + place * self.args.per_device_train_batch_size)
        self._part += 1
        options: dict[str, Any] = {"num_items_in_batch": self._counts.answer_tokens}
        if self.objective.terms.latents:
            options |= self.objective.at(self.state.global_step, self.state.max_steps)
            options |= {
                "num_samples_in_batch": self._counts.samples,
                "sample_ids": ids,
                "seed": self._seed(),
                "execution": self.args.execution,
                "padding_free": self.args.padding_free,
            }
        outputs = model(**inputs, **options)
        self.meter.add(outputs)
        # Engines average gradients over processes, and these losses are shares of one sum.
        loss = outputs.loss * self.args.world_size
        return (loss, outputs) if return_outputs else loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """transformers' estimate; but the weights are counted once, which takes a hundredth of a small step."""
        return 6 * inputs["input_ids"].numel() * self._weights

    def _seed(self) -> int:
        """Of the step's noise; room for the numbers that follow it, one for each sample of the posterior."""
        return ((self.args.seed << 40) + (self.state.global_step << 8)) % 2**63

    def create_optimizer(self, model: Any = None) -> Any:
        rates = self.args.learning_rates()
        if self.optimizer is None and set(rates.values()) != {self.args.learning_rate}:
            whole = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(whole))
            groups = []
            for part, parameters in parts_of(whole).items():
                for decay in (True, False):
                    chosen = [p for n, p in parameters.items() if p.requires_grad and (n in decayed) == decay]
                    if chosen:
                        weight_decay = self.args.weight_decay if decay else 0.0
                        groups.append({"params": chosen, "lr": rates[part], "weight_decay": weight_decay})
            kind, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, whole)
            if "optimizer_dict" in options or "params" in options:
                raise AMVLError(f"training.optim={self.args.optim!s} takes one learning rate; leave the others out.")
            self.optimizer = kind(groups, **options)
        return super().create_optimizer(model)

    # What is logged

    def _clip_grad_norm(self, model: Any) -> Any:
        self._note_gradients()  # before they are clipped
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if grad_norm is None:  # nothing was clipped
            self._note_gradients()
        return super()._get_grad_norm(model, grad_norm)

    def _note_gradients(self) -> None:
        """Where they will be logged, for shards have to be gathered for it; DeepSpeed keeps them to itself."""
        step = self.state.global_step + 1
        often = self.args.logging_strategy == "epoch" or (step == 1 and self.args.logging_first_step)
        is_logged = often or (self.state.logging_steps and step % self.state.logging_steps == 0)
        # Under float16 they are still scaled.
        if is_logged and not self.is_deepspeed_enabled and getattr(self.accelerator, "scaler", None) is None:
            self._norms = gradient_norms(self.model)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise AMVLError(
                    f"The loss is {logs['loss']} at step {self.state.global_step}; look at the data, or start again "
                    "with a lower training.learning_rate and another training.output_dir."
                )
            logs |= self.meter.read() | {f"grad_norm_{part}": norm for part, norm in self._norms.items()}
            weights = self.objective.at(self.state.global_step - 1, self.state.max_steps)  # of the step that was taken
            logs |= {name: weights[name] for name in ("beta", "gamma") if name in weights}
            self._norms = {}
        super().log(logs, *args, **kwargs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if rows is None:
            raise AMVLError("AMVLTrainer: there are no rows to evaluate on; pass eval_dataset.")
        if isinstance(rows, dict):
            every = [self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}") for name, part in rows.items()]
            return {name: value for metrics in every for name, value in metrics.items()}
        engine = self.model_wrapped if self.is_deepspeed_enabled else None
        with self.meter.paused(), gathered(self.model, engine):
            metrics = evaluate(
                self.model,
                self.data_collator,
                rows,
                batch_size=self.args.per_device_eval_batch_size,
                max_new_tokens=self.args.max_new_tokens,
                seed=self.args.seed,
                process=self.args.process_index,
                processes=self.args.world_size,
            ).metrics
        logs = {f"{metric_key_prefix}_{name}": value for name, value in scalars(metrics).items()}
        self.log(logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        self.meter.reset()
        return prepared

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self.meter.paused():
            super()._save_checkpoint(model, trial)


def scalars(metrics: dict[str, Any]) -> dict[str, float]:
    """Metrics as single numbers for a log: lists are summed, dictionaries left out."""
    flat = {name: sum(value) if isinstance(value, list) else value for name, value in metrics.items()}
    return {name.removesuffix("_per_slot"): value for name, value in flat.items() if not isinstance(value, dict)}
