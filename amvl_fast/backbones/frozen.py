"""What the features of an image follow from, on the side of the backbone."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from amvl_fast.backbones.adapter import Adapter
from amvl_fast.entries import as_bytes
from amvl_fast.errors import AMVLError

# Of a configuration, what no feature follows from.
IRRELEVANT = ("text_config", "_name_or_path", "architectures", "dtype", "transformers_version", "use_cache")


def require_constant(adapter: Adapter) -> None:
    """Refuse a backbone that would make other features of an image at another step.

    Raises:
        AMVLError: tower or connector is trained, or the tower draws at random while the model is in training.
    """
    tower = {id(parameter) for parameter in adapter.vision_tower.parameters()}
    trained = {id(p) in tower for p in adapter.vision_parameters().values() if p.requires_grad}
    if trained:
        parts = [part for part, is_tower in (("vision_tower", True), ("connector", False)) if is_tower in trained]
        raise AMVLError(
            f"The vision cache holds what frozen parts make of images, but the {' and the '.join(parts)} would be "
            "trained; set model.freeze to [vision_tower, connector], or leave data.vision_cache out."
        )
    settings = vision_settings(adapter).get("vision_config", {})
    random = [name for name, value in settings.items() if "drop" in name and isinstance(value, float) and value > 0]
    if random:
        raise AMVLError(
            f"The vision tower drops at random while it trains ({', '.join(random)}), which no cache can repeat; "
            "leave data.vision_cache out."
        )


def vision_settings(adapter: Adapter) -> dict[str, Any]:
    """A backbone's configuration without what is the decoder's alone."""
    settings = adapter.model.config.to_dict()
    for part in (settings, settings.get("vision_config", {})):
        for name in IRRELEVANT:
            part.pop(name, None)
    return settings


def digest(adapter: Adapter) -> str:
    """Of the configuration, the tower's attention, and the weights and buffers that stand outside of the decoder."""
    tower: Any = adapter.vision_tower
    attention = getattr(tower.config, "_attn_implementation", None)
    facts = [type(adapter.model).__qualname__, attention, vision_settings(adapter)]
    made = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    text = {id(buffer) for buffer in adapter.decoder.buffers()}
    buffers = {name: buffer for name, buffer in adapter.inner.named_buffers() if id(buffer) not in text}
    for name, tensor in sorted({**adapter.vision_parameters(), **buffers}.items()):
        made.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        made.update(as_bytes(tensor))
    return made.hexdigest()
