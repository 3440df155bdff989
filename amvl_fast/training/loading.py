"""Models and processors of configurations and of runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from amvl_fast.backbones import ADAPTERS
from amvl_fast.configuration import AMVLConfig
from amvl_fast.data import ChatCollator
from amvl_fast.errors import AMVLError
from amvl_fast.lora import ADAPTER_FILE, LoraSection, add_lora, load_lora
from amvl_fast.modeling import AMVLModel
from amvl_fast.objective import OBJECTIVES
from amvl_fast.training.checkpoints import newest
from amvl_fast.training.config import ModelSection, RunConfig
from amvl_fast.training.parts import freeze

RUN_FILE = "amvl_run.json"


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def load_processor(config: RunConfig) -> Any:
    """The backbone's processor; its architecture is checked first."""
    name = config.model.backbone
    try:
        kind = AutoConfig.from_pretrained(name, **config.model.hub).model_type
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
        return AutoProcessor.from_pretrained(name, **config.model.hub)
    except (OSError, ValueError, ImportError, TypeError) as error:
        raise AMVLError(f"model.backbone: {name!r} has no processor that can be loaded ({one_line(error)}).") from error


def load_model(config: RunConfig, processor: Any, row: dict[str, Any]) -> Any:
    """The model that the configuration asks for, with its LoRA adapters and its frozen parts.

    `row` is any of the rows to be trained on: it shows which token the prompts end with.
    """
    section = config.model
    options: dict[str, Any] = {"dtype": section.dtype}
    if section.attn_implementation:
        options["attn_implementation"] = section.attn_implementation
    try:
        # Safetensors alone: the other kind of file is a pickle, which can run code.
        model: Any = AutoModelForImageTextToText.from_pretrained(
            section.backbone, use_safetensors=True, **config.model.hub, **options
        )
    except (OSError, ValueError, ImportError, AttributeError, RuntimeError, SafetensorError) as error:
        raise AMVLError(
            f"The model {section.backbone!r} cannot be loaded with {options} ({one_line(error)}); "
            "check its files and the section model:."
        ) from error
    if config.objective.terms.latents:
        prompt = ChatCollator(processor)([row], with_answer=False)["input_ids"]
        model = AMVLModel.from_backbone(
            model, AMVLConfig(**config.latents), freeze_vision=False, end_token_id=int(prompt[0, -1])
        )
    if config.lora is not None:
        model = add_lora(model, config.lora)
    freeze(model, section.freeze)
    return model


def load_run(run_dir: str | Path) -> tuple[PreTrainedModel, Any, Path]:
    """A run's trained model, its processor, and the directory they came from.

    That is the run directory once training is complete, its newest whole checkpoint before. LoRA adapters are merged
    into the weights. The model is put on the GPU if there is one.

    Raises:
        AMVLError: there is neither.
    """
    run_dir = Path(run_dir)
    source = run_dir if (run_dir / "config.json").is_file() else newest(run_dir)
    if source is None:
        raise AMVLError(f"{run_dir} holds no trained model; give the training.output_dir of a run.")
    model: Any = load_adapted(run_dir, source) if (source / ADAPTER_FILE).is_file() else load_whole(source)
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    return model, AutoProcessor.from_pretrained(source), source


def load_whole(directory: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(directory, use_safetensors=True)


def load_adapted(run_dir: Path, directory: Path) -> Any:
    """The backbone of the run with its adapters merged in."""
    settings = read_run_file(run_dir)
    section = ModelSection(**settings["model"])
    model: Any = AutoModelForImageTextToText.from_pretrained(
        section.backbone, use_safetensors=True, dtype=section.dtype, **section.hub
    )
    if OBJECTIVES[settings["objective"]["name"]].latents:
        model = AMVLModel.from_backbone(model, AMVLConfig(**settings["latents"]))
    adapted = add_lora(model, LoraSection(**settings["lora"]))
    load_lora(adapted, directory)
    return adapted.merge_and_unload()


def read_run_file(run_dir: str | Path) -> dict[str, Any]:
    """The configuration that a run was started with.

    Raises:
        AMVLError: `run_dir` is not the directory of a run.
    """
    path = Path(run_dir) / RUN_FILE
    if not path.is_file():
        raise AMVLError(f"{run_dir} is not the directory of a run (it has no {RUN_FILE}).")
    return json.loads(path.read_text())
