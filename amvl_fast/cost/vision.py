"""A vision tower's sizes, read off its modules."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Vision:
    """A vision tower and the connector behind it.

    Attributes:
        layers, hidden, intermediate: of the tower; every head counted, attention is `hidden` wide.
        embedding_weights: of the convolution that embeds a patch.
        patch_weights: of what else is applied to each patch.
        token_weights: of the tower's linear maps that are applied to each image token (Qwen's merger).
        connector_weights: of those outside of the tower, of which `connector_first` belong to the first.
        patches_per_token: patches that are merged into an image token.
        window: patches of a window, for the layers whose attention is not over the whole image.
        full_layers: layers whose attention is.
    """

    layers: int
    hidden: int
    intermediate: int
    embedding_weights: int
    patch_weights: int
    token_weights: int
    connector_weights: int
    connector_first: int
    patches_per_token: float
    window: int
    full_layers: int


def vision_of(config: Any, tower: nn.Module, connector: list[nn.Module]) -> Vision:
    """Sizes of a tower by its modules: what families name differently, they build alike."""
    vision = config.vision_config
    embedding = next(module for module in tower.modules() if isinstance(module, CONVOLUTIONS))
    layers = getattr(vision, "depth", None) or vision.num_hidden_layers
    # A pooling head, which SigLIP has, sees an image once and is read by nobody.
    parts = [(name, child) for name, child in tower.named_children() if name != "head"]
    merged = sum(weights(child, nn.Linear) for name, child in parts if "merger" in name)
    maps = [p.numel() for part in connector for p in part.parameters() if p.dim() == 2]
    hidden = embedding.out_channels
    blocks = [m for child in tower.modules() if isinstance(child, nn.ModuleList) for m in child[:1]]
    last = [m for m in blocks[0].modules() if isinstance(m, nn.Linear)][-1]
    full = getattr(vision, "fullatt_block_indexes", None) or []
    windowed = full and getattr(vision, "window_size", None)
    return Vision(
        layers=layers,
        hidden=hidden,
        intermediate=last.in_features,
        embedding_weights=embedding.weight.numel(),
        patch_weights=sum(weights(child, nn.Linear) for name, child in parts if "merger" not in name),
        token_weights=merged,
        connector_weights=sum(maps),
        connector_first=maps[0] if maps else 0,
        patches_per_token=patches_per_token(config),
        window=(vision.window_size // vision.patch_size) ** 2 if windowed else 0,
        full_layers=len(full) if windowed else layers,
    )


def patches_per_token(config: Any) -> float:
    """How many patches an image token stands for; each family names that in its own way."""
    vision = config.vision_config
    if merge := getattr(vision, "spatial_merge_size", None):
        return merge**2
    if share := getattr(config, "downsample_ratio", None):
        return share**-2
    if factor := getattr(config, "scale_factor", None):
        return factor**2
    if tokens := getattr(config, "mm_tokens_per_image", None):
        return (vision.image_size // vision.patch_size) ** 2 / tokens
    return 1


def weights(module: nn.Module, kinds: Any) -> int:
    """Of all modules of some kinds within one, biases left out."""
    of_kind: Iterable[Any] = (one for one in module.modules() if isinstance(one, kinds))
    return sum(one.weight.numel() for one in of_kind)
