"""Prepares the demo: easy-VQA as chat files, and an untrained tiny Qwen2.5-VL to start from.

``python -m amvl_fast.demo DIRECTORY`` writes ``DIRECTORY/data`` and ``DIRECTORY/init``; what follows are ordinary
``amvl-fast`` commands (see the Makefile).
"""

from __future__ import annotations

import sys
from pathlib import Path

from amvl_fast.data import ChatDataset, write_easy_vqa
from amvl_fast.data.rows import text_of
from amvl_fast.tiny import build_tiny_base

# Small enough for minutes on two cores; deep enough to learn colours first and shapes later.
SIZES = dict(hidden_size=64, num_layers=3, num_heads=4, num_key_value_heads=2, vision_hidden_size=64, vision_depth=2)


def prepare(directory: str | Path) -> None:
    """Write the data and the untrained base; what is there already is kept."""
    directory = Path(directory)
    files = write_easy_vqa(directory / "data")
    if (directory / "init" / "config.json").is_file():
        return
    rows = ChatDataset(files["train"])
    texts = {text_of(message) for messages in rows.column("messages") for message in messages}
    build_tiny_base(directory / "init", sorted(texts), **SIZES)


if __name__ == "__main__":
    prepare(sys.argv[1])
