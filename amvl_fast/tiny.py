"""A tiny, untrained Qwen2.5-VL in a directory of the form that hubs serve.

It has the real architecture, the real processor and the real chat tokens at a size that a CPU trains in minutes,
so that everything downstream loads it exactly as it loads ``Qwen/Qwen2.5-VL-7B-Instruct``.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = [END_OF_TEXT, TURN_START, TURN_END, VISION_START, VISION_END, IMAGE, VIDEO]

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(texts: Iterable[str], vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on `texts`, with Qwen's special tokens and a chat template of the same form."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    roles = [f"{role}\n" for role in ("system", "user", "assistant")]  # the template's own words, one token each
    tokenizer.train_from_iterator([*texts, *roles, *roles], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=SPECIAL_TOKENS,
        chat_template=CHAT_TEMPLATE,
        model_max_length=32768,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast, patch_size: int = 8) -> Qwen2_5_VLProcessor:
    """transformers' own Qwen2.5-VL processor for images of a few thousand pixels."""
    images = dict(
        patch_size=patch_size,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": (2 * patch_size) ** 2, "longest_edge": 128 * 128},
    )
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**images),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**images),
        chat_template=tokenizer.chat_template,
    )


def tiny_config(
    tokenizer: PreTrainedTokenizerFast,
    *,
    hidden_size: int = 128,
    num_layers: int = 4,
    num_heads: int = 4,
    num_key_value_heads: int = 2,
    vision_hidden_size: int = 96,
    vision_depth: int = 2,
    patch_size: int = 8,
    tie_word_embeddings: bool = True,
    initializer_range: float = 0.06,
) -> Qwen2_5_VLConfig:
    """A Qwen2.5-VL configuration whose token ids are those of `tokenizer`."""

    def token(text: str) -> int:
        return int(tokenizer.vocab[text])

    half_head = hidden_size // num_heads // 2
    sections = [half_head - 2 * (half_head * 3 // 8)] + 2 * [half_head * 3 // 8]  # time, height, width: 2:3:3
    return Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=3 * hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_key_value_heads,
            max_position_embeddings=4096,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections},
            initializer_range=initializer_range,
            bos_token_id=token(END_OF_TEXT),
            eos_token_id=token(TURN_END),
            pad_token_id=token(END_OF_TEXT),
        ),
        vision_config=dict(
            depth=vision_depth,
            hidden_size=vision_hidden_size,
            intermediate_size=3 * vision_hidden_size,
            num_heads=num_heads,
            patch_size=patch_size,
            spatial_merge_size=2,
            temporal_patch_size=2,
            window_size=8 * patch_size,
            fullatt_block_indexes=list(range(vision_depth)),
            out_hidden_size=hidden_size,
            initializer_range=initializer_range,
        ),
        image_token_id=token(IMAGE),
        video_token_id=token(VIDEO),
        vision_start_token_id=token(VISION_START),
        vision_end_token_id=token(VISION_END),
        tie_word_embeddings=tie_word_embeddings,
    )


def build_tiny_base(directory: str | Path, texts: Iterable[str], *, seed: int = 0, **sizes: Any) -> Path:
    """Write an untrained tiny Qwen2.5-VL, its tokenizer and its processor to `directory`.

    Args:
        directory: created if absent; afterwards ``AutoProcessor.from_pretrained(directory)`` and
            ``AutoModelForImageTextToText.from_pretrained(directory)`` load it.
        texts: what the tokenizer is trained on.
        seed: of the initial weights; the caller's random state is left as it was.
        sizes: keyword arguments of `tiny_config`.
    """
    directory = Path(directory)
    tokenizer = build_tokenizer(texts)
    config = tiny_config(tokenizer, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    model.save_pretrained(directory)
    build_processor(tokenizer, model.model.visual.config.patch_size).save_pretrained(directory)
    return directory
