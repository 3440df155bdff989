"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: rotary positions of three axes (M-RoPE)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from amvl_fast.backbones.adapter import Adapter, Embedded
from amvl_fast.errors import AMVLError


class Qwen2VLAdapter(Adapter):
    """Qwen2-VL and Qwen2.5-VL. The axes are time, height and width."""

    VISION_INPUTS = ("pixel_values", "image_grid_thw", "mm_token_type_ids")
    AXES = 3

    @property
    def vision_tower(self) -> nn.Module:
        return self.inner.visual

    def image_features(self, **vision: Any) -> Any:
        return self.inner.get_image_features(vision["pixel_values"], vision["image_grid_thw"], return_dict=True)

    def embed(self, input_ids: Tensor, image_features: dict[str, Tensor] | None = None, **vision: Any) -> Embedded:
        name = "pixel_values" if image_features is None else "image_features"
        images = vision.get("pixel_values") if image_features is None else image_features
        if (images is None) != (vision.get("image_grid_thw") is None):
            raise AMVLError(f"{name} and image_grid_thw go together; pass all that the processor returned.")
        return super().embed(input_ids, image_features, **vision)

    def positions(self, input_ids: Tensor, attention_mask: Tensor, **vision: Any) -> Tensor:
        if vision.get("image_grid_thw") is None:
            return super().positions(input_ids, attention_mask)
        kinds = vision.get("mm_token_type_ids")
        if kinds is None:
            kinds = (input_ids == self.model.config.image_token_id).int()
        return self.inner.get_rope_index(
            input_ids, kinds, image_grid_thw=vision["image_grid_thw"], attention_mask=attention_mask
        )[0]

    def generate(
        self, embeds: Tensor, attention_mask: Tensor, positions: Tensor, extras: dict[str, Tensor], **kwargs: Any
    ) -> Any:
        # The first row of a four-row position tensor is the plain text position; the other three are M-RoPE's.
        plain = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        return super().generate(
            embeds, attention_mask, positions, extras, position_ids=torch.cat([plain[None], positions]), **kwargs
        )


class Qwen3VLAdapter(Qwen2VLAdapter):
    """Qwen3-VL: its first layers add features of the images a second time (DeepStack)."""

    def flat_features(self, images: Any) -> dict[str, Tensor]:
        levels = torch.stack([torch.cat(list(features)) for features in images.deepstack_features], dim=1)
        return {**super().flat_features(images), "deepstack": levels}

    def extras(self, places: Tensor, features: dict[str, Tensor]) -> dict[str, Tensor]:
        levels = features["deepstack"]
        spread = levels.new_zeros(*places.shape, *levels.shape[1:]).masked_scatter(places[..., None, None], levels)
        return {"images": places, "deepstack": spread}

    def decoder_inputs(self, extras: dict[str, Tensor]) -> dict[str, Any]:
        if not extras:
            return {}
        places = extras["images"]
        levels = extras["deepstack"][places]
        return {"visual_pos_masks": places, "deepstack_visual_embeds": list(levels.unbind(1))}
