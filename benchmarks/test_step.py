"""One AMVL step, forward and backward, beside one step of the same backbone without latents."""

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from amvl_fast import AMVLConfig, AMVLModel
from amvl_fast.data import ChatCollator
from amvl_fast.tiny import build_tiny_base


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_tiny_base(tmp_path_factory.mktemp("base"), ["what colour is it?", "red"])


@pytest.fixture(scope="module")
def batch(base):
    content = [{"type": "image"}, {"type": "text", "text": "what colour is it?"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
    row = {"messages": [{"role": "user", "content": content}, answer], "images": [Image.new("RGB", (64, 64), "red")]}
    return ChatCollator(AutoProcessor.from_pretrained(base))([row] * 32)


@pytest.mark.parametrize("provider", ["no latents", "three_pass"])
def test_step(benchmark, base, batch, provider):
    benchmark.group = "training step, 32 rows"
    model = AutoModelForImageTextToText.from_pretrained(base)
    model.model.visual.requires_grad_(False)
    options = {}
    if provider != "no latents":
        model = AMVLModel.from_backbone(model, AMVLConfig(num_latents=4, latent_dim=32))
        options = {"execution": provider}

    def step():
        model.zero_grad()
        loss = model(**batch, **options).loss
        loss.backward()
        return loss

    assert torch.isfinite(step())
    benchmark(step)
