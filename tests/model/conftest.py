"""A tiny backbone, its processor, and rows that are as ragged as real ones."""

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from amvl_fast import AMVLConfig, AMVLModel
from amvl_fast.data import ChatCollator
from amvl_fast.tiny import build_tiny_base

SIZES = dict(hidden_size=32, num_layers=2, num_heads=4, num_key_value_heads=2, vision_hidden_size=32, vision_depth=1)
QUESTIONS = ["is there a red shape?", "what is it?", "is there a circle to the left of the blue triangle?"]
ANSWERS = ["yes", "a rectangle and a small circle", "no"]


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return build_tiny_base(tmp_path_factory.mktemp("base"), [*QUESTIONS, *ANSWERS], **SIZES)


@pytest.fixture(scope="session")
def processor(base):
    return AutoProcessor.from_pretrained(base)


@pytest.fixture
def model(base):
    """In float64, so that what should be equal is equal to 1e-12."""
    torch.manual_seed(0)
    backbone = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float64)
    return AMVLModel.from_backbone(backbone, AMVLConfig(num_latents=3, latent_dim=5)).eval()


def chat_row(question, answer, colours=("red",), size=(32, 32)):
    images = [Image.new("RGB", size, colour) for colour in colours]
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return {"messages": messages, "images": images}


@pytest.fixture
def rows():
    """Prompts and answers of different lengths; two images of different sizes, one image, and none."""
    return [
        chat_row(QUESTIONS[0], ANSWERS[0], colours=("red", "blue"), size=(32, 48)),
        chat_row(QUESTIONS[1], ANSWERS[1]),
        chat_row(QUESTIONS[2], ANSWERS[2], colours=()),
    ]


@pytest.fixture
def collate(processor):
    return ChatCollator(processor)


@pytest.fixture
def batch(collate, rows):
    return collate(rows)


def close(actual, expected, tolerance=1e-12):
    """Relative in norm, so that one budget fits tensors of any scale."""
    error = (actual - expected).norm() / expected.norm().clamp(min=1e-300)
    assert error < tolerance, f"relative error {error:.2e}"
