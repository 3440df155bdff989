"""Rows of the chat form, files of them, and what a refusal reads like."""

import json
import traceback
from pathlib import Path

import pytest

from amvl_fast.errors import AMVLError

IMAGE = {"type": "image"}


def text(words):
    return {"type": "text", "text": words}


def user(*content):
    return {"role": "user", "content": [text(part) if isinstance(part, str) else part for part in content]}


def assistant(words):
    return {"role": "assistant", "content": [text(words)]}


def row(*messages, images=("red.png",)):
    return {"messages": list(messages), "images": list(images)}


ROW = row(user(IMAGE, "what shape is it?"), assistant("circle"))


def write(folder: Path, rows, name="rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return path


def failure(call) -> AMVLError:
    """The AMVLError that `call` raises, rid of its frames: a loader that they hold keeps its workers."""
    with pytest.raises(AMVLError) as caught:
        call()
    traceback.clear_frames(caught.tb)
    return caught.value.with_traceback(None)


def refusal(call) -> str:
    """The message of the AMVLError that `call` raises: one sentence that ends in what to do."""
    with pytest.raises(AMVLError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert ":" in message
    assert message.endswith(".")
    return message
