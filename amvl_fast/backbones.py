"""What differs between families of image-text-to-text models, one small adapter each.

An adapter turns processor outputs into what any decoder reads: embeddings with the images in their places, rotary
positions, and final hidden states. It holds no weights and patches nothing.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from amvl_fast.errors import AMVLError


class Adapter(Protocol):
    """What the step asks of a backbone."""

    VISION_INPUTS: tuple[str, ...]

    @property
    def hidden_size(self) -> int: ...

    @property
    def vision_tower(self) -> nn.Module: ...

    def embed(self, input_ids: Tensor, **vision: Any) -> Tensor:
        """Token embeddings with the image features in place, ``(batch, length, hidden_size)``."""

    def positions(self, input_ids: Tensor, attention_mask: Tensor, **vision: Any) -> Tensor:
        """Rotary positions ``(axes, batch, length)``; padding holds arbitrary values."""

    def decode(self, embeds: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        """Final hidden states ``(batch, length, hidden_size)`` of the language model, after its last norm."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states ``(..., hidden_size)`` -> ``(..., vocabulary)``."""

    def generate(self, embeds: Tensor, attention_mask: Tensor, positions: Tensor, **kwargs: Any) -> Any:
        """transformers' own ``generate`` on left-padded embeddings; returns the new tokens alone."""


class Qwen2_5_VLAdapter:
    """Qwen2.5-VL: images enter by ``masked_scatter`` at the image token, positions are three-dimensional (M-RoPE)."""

    VISION_INPUTS: tuple[str, ...] = ("pixel_values", "image_grid_thw", "mm_token_type_ids")

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model

    @property
    def hidden_size(self) -> int:
        return self.model.config.text_config.hidden_size

    @property
    def vision_tower(self) -> nn.Module:
        return self.model.model.visual

    def embed(self, input_ids: Tensor, *, pixel_values: Tensor | None = None, **vision: Any) -> Tensor:
        embeds = self.model.get_input_embeddings()(input_ids)
        if (pixel_values is None) != (vision.get("image_grid_thw") is None):
            raise AMVLError("pixel_values and image_grid_thw go together; pass all that the processor returned.")
        if pixel_values is None:
            if (input_ids == self.model.config.image_token_id).any():
                raise AMVLError("input_ids hold image tokens, but pixel_values are missing; pass the images too.")
            return embeds
        inner = self.model.model
        features = inner.get_image_features(pixel_values, vision["image_grid_thw"], return_dict=True).pooler_output
        features = torch.cat(list(features)).to(embeds.device, embeds.dtype)
        places, _ = inner.get_placeholder_mask(input_ids, inputs_embeds=embeds, image_features=features)
        return embeds.masked_scatter(places, features)

    def positions(self, input_ids: Tensor, attention_mask: Tensor, **vision: Any) -> Tensor:
        """Three axes: time, height and width."""
        if vision.get("image_grid_thw") is None:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0).expand(3, -1, -1)
        kinds = vision.get("mm_token_type_ids")
        if kinds is None:
            kinds = (input_ids == self.model.config.image_token_id).int()
        return self.model.model.get_rope_index(
            input_ids, kinds, image_grid_thw=vision["image_grid_thw"], attention_mask=attention_mask
        )[0]

    def decode(self, embeds: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        return self.model.model.language_model(
            inputs_embeds=embeds, attention_mask=attention_mask, position_ids=positions, use_cache=False
        ).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.get_output_embeddings()(hidden)

    def generate(self, embeds: Tensor, attention_mask: Tensor, positions: Tensor, **kwargs: Any) -> Any:
        # The first row of a four-row position tensor is the plain text position; the other three are M-RoPE's.
        plain = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        return self.model.generate(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=torch.cat([plain[None], positions]),
            **kwargs,
        )


ADAPTERS = {"qwen2_5_vl": Qwen2_5_VLAdapter}


def adapter_for(model: PreTrainedModel) -> Adapter:
    """The adapter of `model`'s family.

    Raises:
        AMVLError: the architecture is not supported.
    """
    kind = getattr(model.config, "model_type", type(model).__name__)
    if kind not in ADAPTERS:
        raise AMVLError(
            f"The backbone's architecture {kind!r} ({type(model).__name__}) is not supported; "
            f"use one of: {', '.join(sorted(ADAPTERS))}."
        )
    return ADAPTERS[kind](model)
