"""What a decoder must not be for branches to share a prompt: refused by name, for the numbers would be wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedModel

from amvl_fast.errors import AMVLError

LAYER_TYPES = {"full_attention", "sliding_attention"}


def require_shareable(decoder: PreTrainedModel) -> None:
    """Refuse decoders whose prompts depend on what follows them, or that mask in ways we do not know.

    Raises:
        AMVLError: naming what is in the way.
    """
    config, kind = decoder.config, type(decoder).__name__
    unknown = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
    for obstacle, what in (
        (unknown, f"has layers of type {', '.join(sorted(unknown))}"),
        (getattr(config, "attention_chunk_size", None), "attends in chunks"),
        (getattr(config, "is_causal", True) is False, "is not causal"),
        (getattr(config, "use_bidirectional_attention", None), "attends in both directions"),
    ):
        if obstacle:
            raise AMVLError(f"shared_prefix cannot share prompts where {kind} {what}; use execution='three_pass'.")


def require_fixed_rotations(decoder: PreTrainedModel, rows: int) -> None:
    """Refuse sequences long enough for rotary embeddings to change with their length: branches would not fit prompts.

    Args:
        rows: of the longest sequence.

    Raises:
        AMVLError: a rotary embedding of type "dynamic" or "longrope" would.
    """
    config = decoder.config
    for rope in _ropes(getattr(config, "rope_parameters", None) or {}):
        kind = rope.get("rope_type")
        if kind not in ("dynamic", "longrope"):
            continue
        limit = rope.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", config.max_position_embeddings
        )
        if rows >= limit:
            raise AMVLError(
                f"shared_prefix: {kind} rotary embeddings change at {limit} rows, and prompt and branches may have "
                f"{rows}; shorten them, or use execution='three_pass'."
            )


def _ropes(parameters: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The rotary embeddings of a configuration: one, or one for each type of layer."""
    if "rope_type" in parameters:
        yield parameters
    else:
        yield from (value for value in parameters.values() if isinstance(value, Mapping))


def window_of(module: Any, kwargs: Mapping[str, Any]) -> int | None:
    """How many rows back a layer looks, as its attention is told.

    Raises:
        AMVLError: nobody told the attention of a layer that has a window, or the layer is not causal.
    """
    config, layer = module.config, module.layer_idx
    window = kwargs.get("sliding_window")
    types = getattr(config, "layer_types", None)
    slides = types[layer] == "sliding_attention" if types else getattr(config, "sliding_window", None) is not None
    if window is None and slides:
        raise AMVLError(
            f"shared_prefix: {type(module).__name__} does not tell its attention the sliding window of layer {layer}; "
            "use execution='three_pass'."
        )
    if getattr(module, "is_causal", True) is False:
        raise AMVLError(f"shared_prefix: layer {layer}, {type(module).__name__}, is not causal; use 'three_pass'.")
    return window
