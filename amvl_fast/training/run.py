"""From a checked configuration to a trained run directory."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    TrainingArguments,
)
from transformers.trainer_callback import TrainerState

from amvl_fast.backbones import ADAPTERS, adapter_for
from amvl_fast.configuration import AMVLConfig
from amvl_fast.data import ChatCollator, ChatDataset
from amvl_fast.errors import AMVLError
from amvl_fast.modeling import AMVLModel
from amvl_fast.training.checkpoints import newest, written_aside
from amvl_fast.training.config import RunConfig
from amvl_fast.training.trainer import AMVLTrainer, StopOnSignal

RUN_FILE = "amvl_run.json"

# Ours where transformers' default does not fit: our rows are not tensors yet, logs go to TensorBoard, and a loss that
# is NaN ends the run instead of being left out of the average.
DEFAULTS: dict[str, Any] = {
    "remove_unused_columns": False,
    "dataloader_pin_memory": torch.cuda.is_available(),
    "report_to": "tensorboard",
    "logging_nan_inf_filter": False,
    "logging_steps": 10,
    "save_strategy": "steps",
    "save_steps": 500,
    "save_total_limit": 2,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
}


def train(config: RunConfig) -> int | None:
    """Run a configuration to its end, going on from its newest checkpoint if it has one.

    Returns:
        None when the run is complete, the step at which it was interrupted (by Ctrl-C) otherwise.

    Raises:
        AMVLError: anything the user can mend, before the first training step where it can be known then.
    """
    run_dir = config.output_dir
    require_same_run(config)
    if is_complete(config):
        print(f"{run_dir} is complete already; nothing to do.")
        return None
    arguments = training_arguments(config)
    torch.manual_seed(arguments.seed)  # the new heads are drawn before the Trainer seeds
    processor = load_processor(config)
    control_tokens = processor.tokenizer.all_special_tokens
    train_rows = ChatDataset(config.data.train, image_root=config.data.image_root)
    train_rows.validate(special_tokens=control_tokens)
    test_rows = None
    if config.data.test:
        test = ChatDataset(config.data.test, image_root=config.data.image_root)
        test.validate(special_tokens=control_tokens)
        test_rows = test.subset(config.data.eval_rows, seed=arguments.seed)
    elif arguments.eval_strategy != "no":
        raise AMVLError("training.eval_strategy asks for evaluations, but data.test names no file; add data.test.")
    model = load_model(config, processor, train_rows[0])
    write_run_file(config)
    checkpoint = newest(run_dir)
    stop = StopOnSignal()
    trainer = AMVLTrainer(
        model=model,
        args=arguments,
        objective=config.objective,
        max_new_tokens=config.data.max_new_tokens,
        data_collator=ChatCollator(processor),
        train_dataset=train_rows,
        eval_dataset=test_rows,
        processing_class=processor,
        callbacks=[stop],
    )
    describe(config, model, len(train_rows), checkpoint)
    with stop:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stop.received is not None and trainer.state.global_step < trainer.state.max_steps:
        return trainer.state.global_step
    with written_aside(run_dir) as aside:
        trainer.save_model(str(aside))
        trainer.state.save_to_json(str(aside / "trainer_state.json"))
    return None


def training_arguments(config: RunConfig) -> TrainingArguments:
    """transformers' arguments with our defaults; one process and one device, the only way that is supported yet."""
    for key in ("load_best_model_at_end", "metric_for_best_model"):
        if config.training.get(key):
            raise AMVLError(f"training.{key} is not supported; evaluate the checkpoints and choose one.")
    try:
        arguments = TrainingArguments(**{**DEFAULTS, **config.training})
    except (TypeError, ValueError, ImportError) as error:
        raise AMVLError(f"The section training: is not usable: {one_line(error)}") from error
    if arguments.world_size > 1:
        raise AMVLError("Training on several processes is not supported yet; start one, without torchrun.")
    # Trainer would split a batch over all visible GPUs by rows, which tears pixel_values from their images.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def load_processor(config: RunConfig) -> Any:
    """The backbone's processor; its architecture is checked first."""
    name = config.model.backbone
    try:
        kind = AutoConfig.from_pretrained(name).model_type
    except (OSError, ValueError) as error:
        raise AMVLError(
            f"model.backbone: {name!r} is neither a directory with a model nor a hub name that can be reached "
            f"({one_line(error)})."
        ) from None
    if kind not in ADAPTERS:
        raise AMVLError(
            f"model.backbone: the architecture {kind!r} of {name!r} is not supported; use one of: "
            f"{', '.join(sorted(ADAPTERS))}."
        )
    try:
        return AutoProcessor.from_pretrained(name)
    except (OSError, ValueError, ImportError, TypeError) as error:
        raise AMVLError(f"model.backbone: {name!r} has no processor that can be loaded ({one_line(error)}).") from error


def load_model(config: RunConfig, processor: Any, row: dict[str, Any]) -> PreTrainedModel:
    """The model that the objective asks for.

    `row` is any of the rows to be trained on: it shows which token the prompts end with.
    """
    section = config.model
    options: dict[str, Any] = {"dtype": section.dtype}
    if section.attn_implementation:
        options["attn_implementation"] = section.attn_implementation
    try:
        backbone = AutoModelForImageTextToText.from_pretrained(section.backbone, **options)
    except (OSError, ValueError, ImportError, AttributeError, RuntimeError, SafetensorError) as error:
        raise AMVLError(
            f"The model {section.backbone!r} cannot be loaded with {options} ({one_line(error)}); "
            "check its files and the section model:."
        ) from error
    if config.objective.terms.latents:
        prompt = ChatCollator(processor)([row], with_answer=False)["input_ids"]
        return AMVLModel.from_backbone(
            backbone,
            AMVLConfig(**config.latents),
            freeze_vision=section.freeze_vision,
            end_token_id=int(prompt[0, -1]),
        )
    adapter_for(backbone).vision_tower.requires_grad_(not section.freeze_vision)
    return backbone


def load_run(run_dir: str | Path) -> tuple[PreTrainedModel, Any, Path]:
    """A run's trained model, its processor, and the directory they came from.

    That is the run directory once training is complete, its newest checkpoint before. The model is put on the GPU if
    there is one.

    Raises:
        AMVLError: there is neither.
    """
    run_dir = Path(run_dir)
    source = run_dir if (run_dir / "config.json").is_file() else newest(run_dir)
    if source is None:
        raise AMVLError(f"{run_dir} holds no trained model; give the training.output_dir of a run.")
    model: Any = AutoModelForImageTextToText.from_pretrained(source).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model, AutoProcessor.from_pretrained(source), source


def write_run_file(config: RunConfig) -> None:
    aside = config.output_dir / (RUN_FILE + ".unfinished")
    try:
        config.output_dir.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(asdict(config), indent=2) + "\n")
        aside.replace(config.output_dir / RUN_FILE)
    except OSError as error:
        raise AMVLError(f"training.output_dir: {config.output_dir} cannot be written to ({error}).") from error


def read_run_file(run_dir: str | Path) -> dict[str, Any]:
    """The configuration that a run was started with.

    Raises:
        AMVLError: `run_dir` is not the directory of a run.
    """
    path = Path(run_dir) / RUN_FILE
    if not path.is_file():
        raise AMVLError(f"{run_dir} is not the directory of a run (it has no {RUN_FILE}).")
    return json.loads(path.read_text())


def require_same_run(config: RunConfig) -> None:
    """Refuse to go on with a run under another configuration."""
    if not (config.output_dir / RUN_FILE).is_file():
        return
    before, now = read_run_file(config.output_dir), json.loads(json.dumps(asdict(config)))
    changed = [
        f"{section}.{key} was {before[section].get(key)!r} and is {now[section].get(key)!r}"
        for section in now
        for key in sorted({*now[section], *before[section]})
        if now[section].get(key) != before[section].get(key)
    ]
    if changed:
        raise AMVLError(
            f"{config.output_dir} holds a run with another configuration ({'; '.join(changed)}); "
            "choose another training.output_dir, or remove that directory."
        )


def is_complete(config: RunConfig) -> bool:
    path = config.output_dir / "trainer_state.json"
    return path.is_file() and TrainerState.load_from_json(str(path)).global_step >= config.training["max_steps"]


def describe(config: RunConfig, model: PreTrainedModel, rows: int, checkpoint: Path | None) -> None:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    print(
        f"{config.output_dir}: {type(model).__name__} around {config.model.backbone}, objective "
        f"{config.objective.name}, {trained:,} of {total:,} parameters trained, {rows:,} rows, "
        + (f"going on from {checkpoint.name}" if checkpoint else f"{config.training['max_steps']} steps")
    )
