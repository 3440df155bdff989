"""LLaVA, LLaVA-OneVision, InternVL, SmolVLM and Gemma 3: rotary positions count tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.gemma3.modeling_gemma3 import create_masks_for_vision_model, get_block_sequence_ids_for_mask

from amvl_fast.backbones.adapter import Adapter
from amvl_fast.errors import AMVLError


class LlavaAdapter(Adapter):
    """LLaVA; `image_sizes` where its vision tower takes images of any size (Pixtral)."""

    VISION_INPUTS = ("pixel_values", "image_sizes")


class LlavaOnevisionAdapter(Adapter):
    """LLaVA-OneVision: images come in tiles."""

    VISION_INPUTS = ("pixel_values", "image_sizes", "batch_num_images")


class InternVLAdapter(Adapter):
    """InternVL."""


class SmolVLMAdapter(Adapter):
    """SmolVLM: each sample has a row of images, padded with black ones."""

    VISION_INPUTS = ("pixel_values", "pixel_attention_mask")

    @property
    def decoder(self) -> PreTrainedModel:
        return self.inner.text_model

    @property
    def vision_tower(self) -> nn.Module:
        return self.inner.vision_model


class Gemma3Adapter(Adapter):
    """Gemma 3: the tokens of an image see each other in both directions."""

    VISION_INPUTS = ("pixel_values", "token_type_ids")

    def token_ids(self, input_ids: Tensor) -> Tensor:
        image = self.model.config.image_token_id
        return input_ids.masked_fill(input_ids == image, 0) if image >= self.inner.vocab_size else input_ids

    def image_features(self, **vision: Any) -> Any:
        return super().image_features(pixel_values=vision["pixel_values"])

    def extras(self, places: Tensor, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"images": places.int()}

    def generate(
        self, embeds: Tensor, attention_mask: Tensor, positions: Tensor, extras: dict[str, Tensor], **kwargs: Any
    ) -> Any:
        raise AMVLError(
            "Gemma3Adapter: generating is not supported yet, because transformers' generate takes no embeddings for "
            "Gemma 3; train and score with forward()."
        )

    def mask(self, embeds: Tensor, attention_mask: Tensor | None, positions: Tensor, extras: dict[str, Tensor]) -> Any:
        if not extras:
            return attention_mask
        return create_masks_for_vision_model(
            config=self.decoder.config,
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            past_key_values=None,
            position_ids=positions[0],
            block_sequence_ids=get_block_sequence_ids_for_mask(extras["images"], device=embeds.device),
        )
