"""A base, chat files and a configuration that train in seconds."""

import json

import pytest
import yaml
from PIL import Image

from amvl_fast.tiny import build_tiny_base

SIZES = dict(hidden_size=32, num_layers=2, num_heads=4, num_key_value_heads=2, vision_hidden_size=32, vision_depth=1)
COLOURS = ("red", "green", "blue")
# Prompts and answers of several lengths, for what is averaged over tokens and samples must show it.
QUESTIONS = ("what colour is it?", "which colour is the square that fills the image?", "colour?")
ANSWERS = {"red": "red", "green": "green, i think", "blue": "it is blue"}
TRAIN_ROWS = 24
TRAIN_IMAGES = 6  # of three colours and two sizes


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """A directory with `base`, `train.jsonl` and `test.jsonl`."""
    root = tmp_path_factory.mktemp("inputs")
    build_tiny_base(root / "base", [*QUESTIONS, *ANSWERS.values()], **SIZES)
    rows = []
    for i in range(TRAIN_ROWS + 6):
        colour = COLOURS[i % 3]
        Image.new("RGB", (32, 32 if i % 2 else 64), colour).save(root / f"{i}.png")
        text = QUESTIONS[i // 3 % 3]
        question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
        answer = {"role": "assistant", "content": [{"type": "text", "text": ANSWERS[colour]}]}
        rows.append({"messages": [question, answer], "images": [f"{i}.png"], "kind": "which colour"})
    for name, part in (("train", rows[:TRAIN_ROWS]), ("test", rows[TRAIN_ROWS:])):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return root


def settings_for(inputs, run_dir):
    """The contents of a YAML file."""
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
            "output_dir": str(run_dir),
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "logging_steps": 2,
            "save_steps": 3,
            "use_cpu": True,
        },
    }


@pytest.fixture
def settings(inputs, tmp_path):
    """To be changed by a test and written by `write`."""
    return settings_for(inputs, tmp_path / "run")


@pytest.fixture
def write(tmp_path):
    def write(settings):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    return write
