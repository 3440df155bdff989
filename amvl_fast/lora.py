"""LoRA on the language model, by PEFT: the backbone stays as it is, adapters and latents are trained and saved."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from amvl_fast.backbones import adapter_for
from amvl_fast.errors import AMVLError
from amvl_fast.modeling import AMVLModel

ADAPTER_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class LoraSection:
    """Options of ``peft.LoraConfig``; `target_modules` are names of linear layers in the language model, None for all.

    Raises:
        AMVLError: a rank below 1.
    """

    r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    target_modules: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        if self.r < 1:
            raise AMVLError(f"lora.r is {self.r}; it must be at least 1.")


def add_lora(model: PreTrainedModel, options: LoraSection) -> Any:
    """PEFT's model around `model`: adapters in its language model, latents (if any) trained whole, the rest frozen.

    What is trained is in float32 or wider, whatever the model is in.

    Raises:
        AMVLError: peft is not installed, or a name in `target_modules` is that of no linear layer.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise AMVLError("LoRA needs peft, which is not installed: run `pip install amvl-fast[lora]`.") from error
    latents = isinstance(model, AMVLModel)
    decoder = adapter_for(model.backbone if latents else model).decoder
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    names = {name.rpartition(".")[2] for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    wanted = names if options.target_modules is None else set(options.target_modules)
    if not wanted or not wanted <= names:
        raise AMVLError(f"lora.target_modules holds {sorted(wanted - names)}; use of: {', '.join(sorted(names))}.")
    config = LoraConfig(
        r=options.r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        # A tower may have layers of the same names.
        target_modules=rf"{re.escape(prefix)}\..*\.({'|'.join(sorted(wanted))})",
        modules_to_save=["latents"] if latents else None,
    )
    adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:  # steps of training are lost in fewer bits
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return adapted


def load_lora(model: Any, directory: str | Path) -> None:
    """Adapters and latents of a checkpoint into a model from `add_lora`."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(model, load_file(Path(directory) / ADAPTER_FILE))


def base_of(model: Any) -> Any:
    """The model inside PEFT's wrapper, if it is in one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
