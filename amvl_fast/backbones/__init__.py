"""What differs between families of image-text-to-text models, one small adapter each."""

from __future__ import annotations

from typing import Any

from amvl_fast.backbones.adapter import Adapter, Embedded
from amvl_fast.backbones.families import (
    Gemma3Adapter,
    InternVLAdapter,
    LlavaAdapter,
    LlavaOnevisionAdapter,
    SmolVLMAdapter,
)
from amvl_fast.backbones.qwen import Qwen2VLAdapter, Qwen3VLAdapter
from amvl_fast.errors import AMVLError

__all__ = ["ADAPTERS", "Adapter", "Embedded", "adapter_for"]

ADAPTERS: dict[str, type[Adapter]] = {
    "gemma3": Gemma3Adapter,
    "internvl": InternVLAdapter,
    "llava": LlavaAdapter,
    "llava_onevision": LlavaOnevisionAdapter,
    "qwen2_5_vl": Qwen2VLAdapter,
    "qwen2_vl": Qwen2VLAdapter,
    "qwen3_vl": Qwen3VLAdapter,
    "smolvlm": SmolVLMAdapter,
}


def adapter_for(model: Any) -> Adapter:
    """The adapter of a model's family; of a model that PEFT wraps, too.

    Raises:
        AMVLError: the architecture is not supported.
    """
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise AMVLError(
            "PEFT's prompt learning is not supported, because its tokens stand in no row; use LoRA, for example."
        )
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # of PEFT
    kind = getattr(model.config, "model_type", type(model).__name__)
    if kind not in ADAPTERS:
        raise AMVLError(
            f"The backbone's architecture {kind!r} ({type(model).__name__}) is not supported; "
            f"use one of: {', '.join(sorted(ADAPTERS))}."
        )
    return ADAPTERS[kind](model)
