"""From a run's configuration to what its cost depends on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amvl_fast.cost.engines import Setup
from amvl_fast.cost.flops import Recipe, Sample
from amvl_fast.cost.lengths import Lengths, read_lengths
from amvl_fast.cost.sizes import Sizes
from amvl_fast.errors import AMVLError

if TYPE_CHECKING:
    from amvl_fast.training.config import RunConfig


def engine_of(config: RunConfig, count: int) -> str:
    """What transformers' Trainer would run with.

    Raises:
        AMVLError: DeepSpeed's configuration names no stage of ZeRO that is known here.
    """
    deepspeed = config.training.get("deepspeed")
    if count == 1:
        return "single"
    if config.training.get("fsdp"):
        return "fsdp2"
    if not deepspeed:
        return "ddp"
    try:
        options = deepspeed if isinstance(deepspeed, dict) else json.loads(Path(deepspeed).read_text())
        return {2: "zero2", 3: "zero3"}[options["zero_optimization"]["stage"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise AMVLError(
            f"training.deepspeed: {deepspeed!r} names no zero_optimization.stage of 2 or 3; say which with --engine."
        ) from None


def setup_of(config: RunConfig, sizes: Sizes, engine: str, count: int) -> Setup:
    training = config.training
    half = {"bfloat16": 2, "float16": 2, "auto": sizes.stored}
    return Setup(
        engine=engine,
        count=count,
        batch=training.get("per_device_train_batch_size", 8),
        accumulation=training.get("gradient_accumulation_steps", 1),
        weights=half.get(config.model.dtype, 4),
        bf16=bool(training.get("bf16") or training.get("fp16")),
        sync_each_batch=syncs_each_batch(training.get("accelerator_config")),
    )


def syncs_each_batch(options: Any) -> bool:
    """accelerate's option, where it stands in ``training.accelerator_config``."""
    kwargs = options.get("gradient_accumulation_kwargs") if isinstance(options, dict) else None
    return bool((kwargs or {}).get("sync_each_batch"))


def recipe_of(config: RunConfig, execution: str) -> Recipe:
    objective, attention = config.objective, config.model.attn_implementation or "sdpa"
    return Recipe(
        execution=execution,
        decoded=objective.num_posterior_samples + (objective.prior_ntp_weight > 0),
        checkpointing=checkpoints(config.training),
        lora_rank=config.lora.r if config.lora else 0,
        freeze=tuple(config.model.freeze),
        attention=attention,
    )


def checkpoints(training: dict[str, Any]) -> bool:
    """Whether activations are checkpointed, by transformers under either of its names or by FSDP."""
    fsdp = training.get("fsdp_config")
    asked = [training.get("gradient_checkpointing"), training.get("activation_checkpointing")]
    return any(asked) or bool(isinstance(fsdp, dict) and fsdp.get("activation_checkpointing"))


def lengths_of(
    config: RunConfig, prompt: int | None, answer: int | None, image_tokens: int | None, images: int
) -> Lengths:
    """Lengths as they are given, or else the data file's."""
    if prompt is None and answer is None and image_tokens is None:
        return read_lengths(config)
    if prompt is None or answer is None:
        raise AMVLError("--prompt-tokens and --answer-tokens go together; give both, or neither to read the data file.")
    tokens = image_tokens or 0
    if min(prompt, answer, images) < 1 or not 0 <= tokens <= prompt:
        raise AMVLError(
            f"A prompt of {prompt} tokens, {tokens} of them of {images} images, and an answer of {answer} do not go "
            "together; give at least 1 each, and no more image tokens than the prompt has."
        )
    sample = Sample(prompt, answer, tokens, images)
    return Lengths(sample, sample, rows=0, looked_at=0)
