"""Tiny random models of every family, and batches for them as ragged as real ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    InternVLConfig,
    LlavaConfig,
    LlavaOnevisionConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
    SiglipVisionConfig,
    SmolVLMConfig,
)

from amvl_fast import AMVLConfig, AMVLModel

VOCABULARY, IMAGE = 64, 60
TEXT: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    initializer_range=0.2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
VISION: dict[str, Any] = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
)
# The number of images of each sample; where every sample of a family needs one, the last is dropped.
IMAGES = (2, 1, 0)


def mrope(config: type, **vision: Any) -> Callable[[], Any]:
    """A Qwen: rotary positions of three axes."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    depth = dict(depth=2, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2)
    return lambda: config(
        text_config=TEXT | {"rope_parameters": rope},
        vision_config=depth | vision,
        image_token_id=IMAGE,
        video_token_id=IMAGE + 1,
        vision_start_token_id=IMAGE + 2,
        vision_end_token_id=IMAGE + 3,
    )


CONFIGS: dict[str, Callable[[], Any]] = {
    "qwen2_vl": mrope(Qwen2VLConfig, embed_dim=16, hidden_size=32),
    "qwen2_5_vl": mrope(
        Qwen2_5_VLConfig,
        hidden_size=16,
        intermediate_size=24,
        out_hidden_size=32,
        window_size=16,
        fullatt_block_indexes=[1],
    ),
    "qwen3_vl": mrope(
        Qwen3VLConfig,
        hidden_size=16,
        intermediate_size=24,
        out_hidden_size=32,
        num_position_embeddings=16,
        deepstack_visual_indexes=[0, 1],
    ),
    "llava": lambda: LlavaConfig(
        text_config=TEXT | {"model_type": "llama"}, vision_config=CLIPVisionConfig(**VISION), image_token_id=IMAGE
    ),
    "llava_onevision": lambda: LlavaOnevisionConfig(
        text_config=TEXT | {"model_type": "qwen2"},
        vision_config=SiglipVisionConfig(**VISION),
        image_token_id=IMAGE,
        video_token_id=IMAGE + 1,
        image_grid_pinpoints=[[16, 32], [32, 16]],
    ),
    "internvl": lambda: InternVLConfig(
        text_config=TEXT | {"model_type": "qwen2"},
        vision_config=VISION | {"image_size": [16, 16], "patch_size": [4, 4]},
        image_token_id=IMAGE,
    ),
    "smolvlm": lambda: SmolVLMConfig(
        text_config=TEXT | {"model_type": "llama"}, vision_config=VISION, image_token_id=IMAGE, scale_factor=2
    ),
    "gemma3": lambda: Gemma3Config(
        text_config=TEXT
        | {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8},
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        image_token_id=IMAGE,
        boi_token_id=IMAGE + 1,
        eoi_token_id=IMAGE + 2,
        mm_tokens_per_image=4,
    ),
}


def make_model(
    family: str, dtype: torch.dtype = torch.float64, *, end_of_latents: bool = True, **text: Any
) -> AMVLModel:
    """A model of the family around a random backbone; `text` replaces values of its text configuration."""
    config = CONFIGS[family]()
    for name, value in text.items():
        setattr(config.get_text_config(), name, value)
    torch.manual_seed(0)
    backbone = AutoModelForImageTextToText.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # where everything starts at 0 or 1, much goes unseen
    return AMVLModel.from_backbone(
        backbone, AMVLConfig(num_latents=3, latent_dim=5, end_of_latents=end_of_latents)
    ).eval()


def vision_inputs(family: str, images: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    """What the family's processor would give for so many images of each sample."""
    total = sum(images)
    pixels = torch.randn(total, 3, 16, 16, dtype=dtype)
    if family.startswith("qwen"):
        grids = torch.tensor([[1, 4, 4], [1, 4, 6], [1, 6, 4]])[torch.arange(total) % 3]
        patches = int(grids.prod(1).sum())
        return {"pixel_values": torch.randn(patches, 3 * 2 * 4 * 4, dtype=dtype), "image_grid_thw": grids}
    if family == "llava_onevision":
        tiles = torch.randn(total, 3, 3, 16, 16, dtype=dtype)
        sizes = torch.tensor([[16, 32], [30, 16], [16, 20]])[torch.arange(total) % 3]
        return {"pixel_values": tiles, "image_sizes": sizes}
    if family == "smolvlm":
        rows = torch.zeros(len(images), max(images), 3, 16, 16, dtype=dtype)
        for i, count in enumerate(images):
            rows[i, :count] = torch.randn(count, 3, 16, 16, dtype=dtype)
        return {"pixel_values": rows}
    return {"pixel_values": pixels}


def make_batch(
    model: AMVLModel, family: str, *, images: tuple[int, ...] = IMAGES, side: str = "left", seed: int = 0
) -> dict[str, Any]:
    """Prompts and answers of different lengths, padded on a side; image tokens as many as the backbone makes."""
    torch.manual_seed(seed)
    vision = vision_inputs(family, images, model.backbone.dtype) if sum(images) else {}
    features: list[Any] = []
    if vision:
        with torch.no_grad():
            features = list(model.adapter.image_features(**vision).pooler_output)
        if family == "smolvlm":
            features = [f for row in features if len(row) for f in row.split(4)]
    sizes = iter([len(f) for f in features])
    rows, labels = [], []
    for i, count in enumerate(images):
        prompt: list[int] = []
        for _ in range(count):
            prompt += [*torch.randint(3, 50, (2,)).tolist(), *[IMAGE] * next(sizes)]
        prompt += torch.randint(3, 50, (4 + 5 * i,)).tolist()
        answer = torch.randint(3, 50, (1 + (2 * i + 1) % 4,)).tolist()
        rows.append([*prompt, *answer])
        labels.append([-100] * len(prompt) + answer)
    length = max(map(len, rows))

    def pad(row: list[int], value: int) -> list[int]:
        padding = [value] * (length - len(row))
        return padding + row if side == "left" else row + padding

    batch = {
        "input_ids": torch.tensor([pad(row, 0) for row in rows]),
        "attention_mask": torch.tensor([pad([1] * len(row), 0) for row in rows]),
        "labels": torch.tensor([pad(row, -100) for row in labels]),
        **vision,
    }
    if family == "gemma3":
        batch["token_type_ids"] = (batch["input_ids"] == IMAGE).int()
    return batch
