"""What a model's cost depends on, read off its configuration; no weight is made or loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from amvl_fast.backbones import ADAPTERS, adapter_for
from amvl_fast.configuration import AMVLConfig
from amvl_fast.cost.vision import Vision, vision_of, weights
from amvl_fast.errors import AMVLError
from amvl_fast.latents import Latents


@dataclass(frozen=True)
class Decoder:
    """A decoder's sizes: grouped-query attention and a gated MLP. Weights are those of linear maps, without biases."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Of keys, and of values."""
        return self.kv_heads * self.head_dim

    @property
    def kv_weights(self) -> int:
        """Of one layer's linear maps to keys and values."""
        return 2 * self.hidden * self.kv_width

    @property
    def down_weights(self) -> int:
        """Of one layer's last linear map."""
        return self.hidden * self.intermediate

    @property
    def layer_weights(self) -> int:
        """Of one layer's linear maps."""
        return 2 * self.hidden * self.query_width + self.kv_weights + 3 * self.down_weights

    @property
    def head_weights(self) -> int:
        return self.hidden * self.vocabulary

    @property
    def weights(self) -> int:
        return self.layers * self.layer_weights + self.head_weights

    @property
    def lora_widths(self) -> int:
        """Inputs and outputs of one layer's seven linear maps: a LoRA of rank r has r times as many weights."""
        attention = 2 * (self.hidden + self.query_width) + 2 * (self.hidden + self.kv_width)
        return attention + 3 * (self.hidden + self.intermediate)


@dataclass(frozen=True)
class Parameters:
    """How many parameters each part has; `layer` is one layer of the decoder, `rest` its last norm."""

    vision: int
    connector: int
    layer: int
    layers: int
    embeddings: int
    rest: int
    latents: int

    @property
    def backbone(self) -> int:
        return self.vision + self.connector + self.layers + self.embeddings + self.rest

    @property
    def total(self) -> int:
        return self.backbone + self.latents


@dataclass(frozen=True)
class Sizes:
    """All that cost depends on.

    Attributes:
        k, d, end: latents, their dimensions, and rows of end-of-latents.
        stored: bytes of a weight in the checkpoint.
    """

    decoder: Decoder
    vision: Vision
    parameters: Parameters
    k: int
    d: int
    end: int
    stored: int = 4


def read_sizes(backbone: str, latents: dict[str, Any] | None = None, **hub: Any) -> Sizes:
    """Sizes of a backbone, a directory or hub name of which only the configuration is read.

    Args:
        latents: values of `AMVLConfig`.
        hub: such as `revision`, see ``AutoConfig.from_pretrained``.

    Raises:
        AMVLError: there is no such model, or its family is not supported.
    """
    try:
        config = AutoConfig.from_pretrained(backbone, **hub)
    except (OSError, ValueError) as error:
        raise AMVLError(
            f"model.backbone: {backbone!r} is neither a directory with a model's config.json nor a hub name that can "
            f"be reached ({' '.join(str(error).split())[:200]})."
        ) from None
    if config.model_type not in ADAPTERS:
        known = ", ".join(sorted(ADAPTERS))
        raise AMVLError(
            f"model.backbone: the architecture {config.model_type!r} is not supported; use one of: {known}."
        )
    return sizes_of(config, AMVLConfig(**(latents or {})))


def sizes_of(config: Any, latents: AMVLConfig) -> Sizes:
    """Sizes of a backbone's configuration and of what AMVL adds to it.

    Raises:
        AMVLError: the decoder's linear maps are not those of grouped-query attention and a gated MLP.
    """
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
        adapter = adapter_for(model)
        added = Latents(latents, adapter.hidden_size)
    text = adapter.decoder.config
    head: Any = adapter.head
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    decoder = Decoder(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=head_dim,
        vocabulary=head.weight.shape[0],
    )
    layers: Any = adapter.decoder.layers
    if weights(layers, nn.Linear) != decoder.layers * decoder.layer_weights:
        kind = type(adapter.decoder).__name__
        raise AMVLError(f"The cost of {kind} is not known: its layers are not grouped-query attention and a gated MLP.")
    connector = [part for part in adapter.inner.children() if part not in (adapter.decoder, adapter.vision_tower)]
    parameters = Parameters(
        vision=count(adapter.vision_tower),
        connector=sum(map(count, connector)),
        layer=count(layers[0]),
        layers=count(layers),
        embeddings=count(nn.ModuleList([model.get_input_embeddings(), adapter.head])),
        rest=0,
        latents=count(added),
    )
    rest = count(model) - parameters.backbone
    return Sizes(
        decoder=decoder,
        vision=vision_of(config, adapter.vision_tower, connector),
        parameters=Parameters(**{**vars(parameters), "rest": rest}),
        k=latents.num_latents,
        d=latents.latent_dim,
        end=int(latents.end_of_latents),
        stored=2 if config.dtype in (torch.bfloat16, torch.float16) else 4,
    )


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
