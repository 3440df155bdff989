"""An epoch with a vision cache beside one without, alternating, for the demo's model and for one of a large tower.

Epochs read images, run the processor, and step AdamW, in one process. No time is asserted; the figures are printed.
"""

import json
import statistics
import time

import pytest
import torch
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor

from amvl_fast import AMVLConfig, AMVLModel
from amvl_fast.data import ChatCollator, ChatDataset
from amvl_fast.demo import SIZES
from amvl_fast.tiny import build_tiny_base
from amvl_fast.vision_cache import CachedCollator, VisionCache

QUESTION, COLOURS = "what colour is the rectangle?", ("red", "green", "blue", "grey")
MODELS = {"demo": SIZES, "large tower": {**SIZES, "vision_hidden_size": 256, "vision_depth": 8}}


def write_rows(directory, count):
    """Rows of the form of easy-VQA, each with 64 x 64 pixels of its own."""
    lines = []
    for i in range(count):
        image = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(image).rectangle((i % 16, i // 16 % 16, 40, 48), COLOURS[i % 4])
        image.save(directory / f"{i}.png")
        question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
        messages = [question, {"role": "assistant", "content": COLOURS[i % 4]}]
        lines.append(json.dumps({"messages": messages, "images": [f"{i}.png"]}) + "\n")
    (directory / "train.jsonl").write_text("".join(lines))
    return ChatDataset(directory / "train.jsonl")


def timed(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@pytest.mark.parametrize("name", MODELS)
def test_epoch(name, tmp_path, pytestconfig, capsys):
    count, rounds = (64, 3) if pytestconfig.getoption("quick") else (256, 7)
    rows = write_rows(tmp_path, count)
    build_tiny_base(tmp_path / "base", [QUESTION, *COLOURS], **MODELS[name])
    backbone = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    model = AMVLModel.from_backbone(backbone, AMVLConfig(num_latents=4, latent_dim=16)).train()
    collator = ChatCollator(AutoProcessor.from_pretrained(tmp_path / "base"))
    cache = VisionCache(tmp_path / "cache", model, collator.processor)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def epoch(collate):
        for batch in DataLoader(rows, batch_size=32, collate_fn=collate):
            model(**batch, seed=1).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    filling = timed(lambda: cache.fill(rows, collator, batch_size=32))
    ways = {"without": collator, "with": CachedCollator(collator, cache)}
    for collate in ways.values():
        epoch(collate)
    times = [{way: timed(lambda c=collate: epoch(c)) for way, collate in ways.items()} for _ in range(rounds)]
    medians = {way: statistics.median(each[way] for each in times) for way in ways}
    ratios = [each["with"] / each["without"] for each in times]
    with capsys.disabled():
        print(
            f"\nvision cache, {name}: an epoch of {count} rows takes {medians['with']:.2f} s with it and "
            f"{medians['without']:.2f} s without, a ratio of {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}); filling it took {filling:.2f} s"
        )
