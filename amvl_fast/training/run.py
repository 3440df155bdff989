"""From a checked configuration to a trained run directory."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from amvl_fast.data import ChatCollator, ChatDataset, ChatStream
from amvl_fast.errors import AMVLError
from amvl_fast.lora import base_of
from amvl_fast.objective import Objective
from amvl_fast.training.arguments import AMVLTrainingArguments
from amvl_fast.training.checkpoints import newest
from amvl_fast.training.config import DataSection, ModelSection, RunConfig
from amvl_fast.training.loading import RUN_FILE, load_model, load_processor, one_line, read_run_file
from amvl_fast.training.progress import StopOnSignal
from amvl_fast.training.trainer import AMVLTrainer
from amvl_fast.training.zero import loading_whole
from amvl_fast.vision_cache import VisionCache

STATE_FILE = "trainer_state.json"
SKIPPED_FILE = "skipped.jsonl"

# What may be another on the way, for it changes how fast and on what a run trains but not what it learns. (That the
# whole batch keeps its size is seen to by the trainer.)
FREE = {
    "data": {"vision_cache", "on_bad_sample", "max_bad_share", "eval_rows", "max_new_tokens"},
    "training": {
        *("output_dir", "use_cpu", "fsdp", "fsdp_config", "ddp_find_unused_parameters"),
        *("per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size"),
        *("gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing"),
        *("activation_checkpointing_kwargs", "padding_free", "execution", "dataloader_num_workers"),
        *("dataloader_pin_memory", "dataloader_prefetch_factor", "dataloader_persistent_workers"),
        *(
            "eval_strategy",
            "eval_steps",
            "eval_delay",
            "logging_steps",
            "logging_strategy",
            "save_steps",
            "save_total_limit",
            "report_to",
            "run_name",
            "disable_tqdm",
        ),
    },
}


def train(config: RunConfig) -> int | None:
    """Run a configuration to its end, going on from its newest whole checkpoint if it has one.

    Started by ``torchrun`` or ``accelerate launch``, every process calls this.

    Returns:
        None when the run is complete, the step at which it was interrupted (by Ctrl-C) otherwise.

    Raises:
        AMVLError: anything the user can mend, before the first training step where it can be known then.
    """
    run_dir = config.output_dir
    arguments = training_arguments(config)
    is_main = arguments.process_index == 0
    say = print if is_main else lambda message: None
    require_same_run(config)
    if is_complete(run_dir):
        say(f"{run_dir} is complete already; nothing to do.")
        return None
    torch.manual_seed(arguments.seed)  # the new heads are drawn before the Trainer seeds
    processor = load_processor(config)
    with arguments.main_process_first(desc="reading data"):  # who comes later finds what the first has converted
        train_rows, test_rows = open_data(config, arguments, processor)
    with loading_whole():
        model = load_model(config, processor, next(iter(train_rows)))
    if is_main:
        write_run_file(config)
    cache = filled_cache(config, arguments, model, processor, train_rows, say)
    stop = StopOnSignal()
    trainer = AMVLTrainer(
        model=model,
        args=arguments,
        vision_cache=cache,
        data_collator=ChatCollator(processor),
        train_dataset=train_rows,
        eval_dataset=test_rows,
        processing_class=processor,
        callbacks=[stop],
    )
    stop.any_of = trainer.any_of
    checkpoint = agreed_checkpoint(run_dir, is_main)
    rows = "streamed" if config.data.streaming else f"{len(train_rows):,}"
    say(description(config, model, rows, checkpoint, arguments))
    with stop:
        trainer.train(resume_from_checkpoint=checkpoint)
    if stop.stopped and trainer.state.global_step < trainer.state.max_steps:
        return trainer.state.global_step
    trainer.require_finite()
    with trainer.written_aside() as aside:
        trainer.save_model(str(aside))
        if is_main:
            trainer.state.save_to_json(str(aside / STATE_FILE))
    return None


def training_arguments(config: RunConfig) -> AMVLTrainingArguments:
    """The trainer's arguments, of all the sections that hold some."""
    options = {"objective": config.objective, "max_new_tokens": config.data.max_new_tokens, **config.training}
    try:
        return AMVLTrainingArguments(**options)
    except AMVLError:
        raise
    except (TypeError, ValueError, ImportError) as error:
        raise AMVLError(f"The section training: is not usable: {one_line(error)}") from error


def agreed_checkpoint(run_dir: Path, is_main: bool) -> str | None:
    """The newest whole checkpoint, as the main process finds it."""
    found = [str(newest(run_dir) or "") if is_main else ""]
    return broadcast_object_list(found)[0] or None


def open_data(config: RunConfig, arguments: AMVLTrainingArguments, processor: Any) -> tuple[Any, Any]:
    """Training rows, checked, and the rows that are looked at while training, if there are any."""
    data = config.data
    control_tokens = processor.tokenizer.all_special_tokens
    options = data.reading | {"special_tokens": control_tokens}
    if data.on_bad_sample == "skip":
        options["skipped_file"] = config.output_dir / SKIPPED_FILE
    if data.streaming:
        options |= {"batch_size": arguments.per_device_train_batch_size, "buffer_size": data.shuffle_buffer}
        options |= {"rank": arguments.process_index, "world_size": arguments.world_size, "endless": True}
        train_rows: Any = ChatStream(data.train, seed=arguments.seed, **options)
    else:
        train_rows = ChatDataset(data.train, **options)
    train_rows.validate()
    if not data.test:
        if arguments.eval_strategy != "no":
            raise AMVLError("training.eval_strategy asks for evaluations, but data.test names no file; add data.test.")
        return train_rows, None
    test = ChatDataset(data.test, image_root=data.image_root, split=data.test_split)
    test.validate(special_tokens=control_tokens)
    return train_rows, test.subset(data.eval_rows, seed=arguments.seed)


def filled_cache(
    config: RunConfig, arguments: AMVLTrainingArguments, model: Any, processor: Any, rows: Any, say: Any
) -> VisionCache | None:
    """What `data.vision_cache` names, filled by all processes together; None where it names nothing."""
    if config.data.vision_cache is None:
        return None
    if config.data.streaming:
        raise AMVLError("data.vision_cache is filled before training, so data.streaming does not go with it.")
    mixed = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    autocast = None if arguments.deepspeed_plugin else mixed  # DeepSpeed casts the model instead
    cache = VisionCache(config.data.vision_cache, model, processor, autocast=autocast)
    counts = cache.fill(
        rows,
        ChatCollator(processor),
        batch_size=arguments.per_device_train_batch_size,
        process=arguments.process_index,
        processes=arguments.world_size,
        workers=arguments.dataloader_num_workers,
        device=arguments.device,
        progress=arguments.process_index == 0 and not arguments.disable_tqdm,
    )
    computed, total = map(sum, zip(*gather_object([counts]), strict=True))  # and nobody goes on before all are done
    say(f"vision cache: {computed:,} of {total:,} computed")
    return cache


def write_run_file(config: RunConfig) -> None:
    aside = config.output_dir / (RUN_FILE + ".unfinished")
    try:
        config.output_dir.mkdir(parents=True, exist_ok=True)
        with aside.open("w") as file:
            file.write(json.dumps(asdict(config), indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        aside.replace(config.output_dir / RUN_FILE)
    except OSError as error:
        raise AMVLError(f"training.output_dir: {config.output_dir} cannot be written to ({error}).") from error


def require_same_run(config: RunConfig) -> None:
    """Refuse to go on with a run under a configuration that learns something else."""
    begun = is_complete(config.output_dir) or any(config.output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
    if not begun or not (config.output_dir / RUN_FILE).is_file():
        return
    before, now = read_run_file(config.output_dir), json.loads(json.dumps(asdict(config)))
    # What a run file of an older version does not name was at its default.
    defaults: dict[str, Any] = {
        "objective": asdict(Objective()),
        "model": asdict(ModelSection("")),
        "data": asdict(DataSection("")),
    }
    changed = []
    for section in now:
        old, new = (part.get(section) or {} for part in (before, now))
        old = defaults.get(section, {}) | old
        for key in sorted({*old, *new}):
            free = key in FREE.get(section, ())
            if not free and json.dumps(old.get(key)) != json.dumps(new.get(key)):
                changed.append(f"{section}.{key} was {old.get(key)!r} and is {new.get(key)!r}")
    if changed:
        raise AMVLError(
            f"{config.output_dir} holds a run with another configuration ({'; '.join(changed)}); "
            "choose another training.output_dir, or remove that directory."
        )


def is_complete(run_dir: Path) -> bool:
    path = run_dir / STATE_FILE
    if not path.is_file():
        return False
    state = TrainerState.load_from_json(str(path))
    return state.global_step >= state.max_steps


def description(
    config: RunConfig, model: Any, rows: str, checkpoint: str | None, arguments: AMVLTrainingArguments
) -> str:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    processes = f" on {arguments.world_size} processes" if arguments.world_size > 1 else ""
    return (
        f"{config.output_dir}: {type(base_of(model)).__name__} around {config.model.backbone}, objective "
        f"{config.objective.name}, {trained:,} of {total:,} parameters trained, {rows} rows{processes}, "
        + (f"going on from {Path(checkpoint).name}" if checkpoint else "from the start")
    )
