"""What the step asks of a backbone, and how most families of transformers answer it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from amvl_fast.errors import AMVLError


class Embedded(NamedTuple):
    """Rows as a decoder reads them.

    Attributes:
        embeds: ``(batch, length, hidden_size)``, images in place.
        extras: whatever else the family's decoder takes for each row, by name, ``(batch, length, ...)``.
    """

    embeds: Tensor
    extras: dict[str, Tensor]


class Adapter:
    """Turns processor outputs into what any decoder reads. It holds no weights and patches nothing.

    This is how most families work: image features take the places of image tokens, and rotary positions count tokens.
    A family overrides what it does differently.

    Attributes:
        VISION_INPUTS: what the family's processor gives besides `input_ids` and `attention_mask`.
        AXES: of its rotary positions.
    """

    VISION_INPUTS: tuple[str, ...] = ("pixel_values",)
    AXES = 1

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model
        self.inner: Any = model.model

    @property
    def decoder(self) -> PreTrainedModel:
        """The language model: embeddings in, hidden states after its last norm out."""
        return self.inner.language_model

    @property
    def vision_tower(self) -> nn.Module:
        return self.inner.vision_tower

    @property
    def vision_modules(self) -> list[nn.Module]:
        """Tower and connector: what stands outside of the decoder. Parameters of the model's own may come besides."""
        return [child for child in self.inner.children() if child is not self.decoder]

    def vision_parameters(self) -> dict[str, nn.Parameter]:
        """Whatever image features depend on, by name."""
        text = {id(parameter) for parameter in self.decoder.parameters()}
        return {name: p for name, p in self.inner.named_parameters() if id(p) not in text}

    @property
    def hidden_size(self) -> int:
        return self.decoder.config.hidden_size

    @property
    def layers(self) -> int:
        return self.decoder.config.num_hidden_layers

    def embed(self, input_ids: Tensor, image_features: dict[str, Tensor] | None = None, **vision: Any) -> Embedded:
        """Token embeddings with the image features in place.

        Args:
            image_features: what `encode_images` returned for the batch's images, in place of `pixel_values`.

        Raises:
            AMVLError: image tokens without images, images without their tokens, or inputs that nobody reads.
        """
        unknown = sorted(set(vision) - set(self.VISION_INPUTS))
        if unknown:
            raise AMVLError(
                f"{type(self).__name__} does not take the inputs {unknown}; "
                f"besides input_ids, attention_mask and labels it takes {list(self.VISION_INPUTS)}."
            )
        embeds = self.model.get_input_embeddings()(self.token_ids(input_ids))
        places = input_ids == self.model.config.image_token_id
        given = "pixel_values make" if image_features is None else "image_features hold"
        if image_features is None:
            if vision.get("pixel_values") is None:
                if places.any():
                    raise AMVLError("input_ids hold image tokens, but pixel_values are missing; pass the images too.")
                return Embedded(embeds, {})
            image_features = self.encode_images(**vision)
        elif vision.get("pixel_values") is not None:
            raise AMVLError("image_features stand in place of pixel_values; pass one of them.")
        features = image_features["embeds"].to(embeds.device, embeds.dtype)
        if places.sum() != len(features):
            raise AMVLError(
                f"input_ids hold {int(places.sum())} image tokens, but {given} {len(features)} features; "
                "pass what the processor returned for both."
            )
        return Embedded(embeds.masked_scatter(places[..., None], features), self.extras(places, image_features))

    def encode_images(self, **vision: Any) -> dict[str, Tensor]:
        """What `embed` puts in place: features of the batch's image tokens, in their order.

        They hang on the images, tower and connector alone, so that where these are frozen they may be kept. No graph is
        made of what is frozen, even if somebody makes inputs require gradients, as checkpointing may.

        Returns:
            `embeds`, ``(image tokens, hidden_size)``, and whatever else the family's decoder takes for each of them.
        """
        trained = any(parameter.requires_grad for parameter in self.vision_parameters().values())
        tower_trained = any(parameter.requires_grad for parameter in self.vision_tower.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            with contextlib.nullcontext() if tower_trained else without_graph(self.vision_tower):
                return self.flat_features(self.image_features(**vision))

    def token_ids(self, input_ids: Tensor) -> Tensor:
        """The ids to look up; some families number their image token beyond the vocabulary."""
        return input_ids

    def image_features(self, **vision: Any) -> Any:
        """The family's own output for images, with `pooler_output`."""
        return self.inner.get_image_features(**vision, return_dict=True)

    def flat_features(self, images: Any) -> dict[str, Tensor]:
        """What `encode_images` returns, out of what `image_features` does."""
        return {"embeds": torch.cat(list(images.pooler_output))}

    def extras(self, places: Tensor, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `Embedded`; only for batches with images.

        Args:
            places: ``(batch, length)`` bool, the image tokens.
            features: what `encode_images` returned.
        """
        return {}

    def positions(self, input_ids: Tensor, attention_mask: Tensor, **vision: Any) -> Tensor:
        """Rotary positions ``(axes, batch, length)``; padding holds arbitrary values."""
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0).expand(self.AXES, -1, -1)

    def decode(
        self,
        embeds: Tensor,
        attention_mask: Tensor | None,
        positions: Tensor,
        extras: dict[str, Tensor] | None = None,
        **attention: Any,
    ) -> Tensor:
        """Final hidden states ``(batch, length, hidden_size)`` of the language model, after its last norm.

        Args:
            embeds, extras: see `Embedded`.
            attention_mask: ``(batch, length)``, 0 on padding; None for none.
            positions: ``(axes, batch, length)``.
            attention: handed to the attention of each layer.
        """
        return self.decoder(
            inputs_embeds=embeds,
            attention_mask=self.mask(embeds, attention_mask, positions, extras or {}),
            position_ids=positions if self.AXES > 1 else positions[0],
            use_cache=False,
            **self.decoder_inputs(extras or {}),
            **attention,
        ).last_hidden_state

    def mask(self, embeds: Tensor, attention_mask: Tensor | None, positions: Tensor, extras: dict[str, Tensor]) -> Any:
        """The mask that the family's decoder takes."""
        return attention_mask

    def decoder_inputs(self, extras: dict[str, Tensor]) -> dict[str, Any]:
        """What the family's decoder takes besides."""
        return {}

    @property
    def head(self) -> nn.Module:
        """Hidden states ``(..., hidden_size)`` -> logits ``(..., vocabulary)``."""
        return self.model.get_output_embeddings()

    def generate(
        self, embeds: Tensor, attention_mask: Tensor, positions: Tensor, extras: dict[str, Tensor], **kwargs: Any
    ) -> Any:
        """transformers' own ``generate`` on left-padded embeddings; returns the new tokens alone.

        Raises:
            AMVLError: the family's decoder needs more than embeddings.
        """
        if extras:
            raise AMVLError(
                f"{type(self).__name__}: generating after images is not supported yet, because transformers' generate "
                f"takes embeddings without {', '.join(extras)}; train and score with forward()."
            )
        return self.model.generate(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)


@contextlib.contextmanager
def without_graph(module: nn.Module) -> Iterator[None]:
    """Calls of a module within make no graph; those around them are left alone."""
    enabled = torch.is_grad_enabled()

    def switch(on: bool) -> None:
        torch.set_grad_enabled(on)

    hooks = [
        module.register_forward_pre_hook(lambda *_: switch(False)),
        module.register_forward_hook(lambda *_: switch(enabled), always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
