"""A base, chat files and a configuration that train in seconds."""

import json

import pytest
import yaml
from PIL import Image

from amvl_fast.tiny import build_tiny_base

SIZES = dict(hidden_size=32, num_layers=2, num_heads=4, num_key_value_heads=2, vision_hidden_size=32, vision_depth=1)
COLOURS = ("red", "green", "blue")


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """A directory with `base`, `train.jsonl` and `test.jsonl`."""
    root = tmp_path_factory.mktemp("inputs")
    build_tiny_base(root / "base", ["what colour is it?", *COLOURS], **SIZES)
    rows = []
    for i in range(24):
        colour = COLOURS[i % 3]
        Image.new("RGB", (32, 32), colour).save(root / f"{i}.png")
        question = {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "what colour is it?"}],
        }
        answer = {"role": "assistant", "content": [{"type": "text", "text": colour}]}
        rows.append({"messages": [question, answer], "images": [f"{i}.png"], "kind": "which colour"})
    for name, part in (("train", rows[:18]), ("test", rows[18:])):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return root


@pytest.fixture
def settings(inputs, tmp_path):
    """The contents of a YAML file, to be changed by a test and written by `write`."""
    return {
        "model": {"backbone": str(inputs / "base")},
        "latents": {"num_latents": 2, "latent_dim": 4},
        "objective": {"name": "amvl"},
        "data": {
            "train": str(inputs / "train.jsonl"),
            "test": str(inputs / "test.jsonl"),
            "max_new_tokens": 4,
        },
        "training": {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "logging_steps": 2,
            "save_steps": 3,
            "use_cpu": True,
        },
    }


@pytest.fixture
def write(tmp_path):
    def write(settings):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    return write
