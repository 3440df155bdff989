"""easy-VQA (synthetic shapes on 64 x 64 images) in the chat form that :class:`ChatDataset` reads."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

from amvl_fast.errors import AMVLError

SPLITS = ("train", "test")
SHAPES = frozenset({"circle", "rectangle", "triangle"})


def question_kind(question: str, answer: str) -> str:
    """The kind of question a report groups by, such as ``"which colour"`` or ``"yes/no: shape, negated"``.

    Negated questions ("is there not a ...?") are kinds of their own: they are what a small model gets wrong.
    """
    if answer not in ("yes", "no"):
        return "which shape" if answer in SHAPES else "which colour"
    words = set(question.rstrip("?").split())
    subject = "shape" if words & SHAPES else "colour"
    return f"yes/no: {subject}" + (", negated" if words & {"no", "not"} else "")


def _row(question: str, answer: str, image: str) -> dict:
    prompt = [{"type": "image"}, {"type": "text", "text": question}]
    return {
        "messages": [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ],
        "images": [image],
        "kind": question_kind(question, answer),
    }


def write_easy_vqa(directory: str | os.PathLike[str]) -> dict[str, Path]:
    """Write the PyPI package easy-vqa, with its own train/test split, as chat-form JSONL beside its images.

    ``directory`` gets ``train.jsonl`` (38,575 rows), ``test.jsonl`` (9,673 rows) and, in ``images/train`` and
    ``images/test``, 4,000 + 1,000 RGB images of 64 x 64. A row is ``{"messages": [...], "images": [path],
    "kind": str}``, its path relative to ``directory``. A split that is already there is left as it is, so
    calling this again is cheap; an interrupted call leaves nothing half-written under a final name.

    Returns ``{"train": path, "test": path}`` of the two JSONL files.

    Raises:
        AMVLError: the easy-vqa package is not installed.
    """
    try:
        import easy_vqa
    except ImportError as error:
        raise AMVLError(
            "The easy-vqa package, which holds the demo's images and questions, is not installed: "
            "run `pip install amvl-fast[demo]`."
        ) from error
    sources = {
        "train": (easy_vqa.get_train_questions, easy_vqa.get_train_image_paths),
        "test": (easy_vqa.get_test_questions, easy_vqa.get_test_image_paths),
    }
    root = Path(directory)
    (root / "images").mkdir(parents=True, exist_ok=True)
    written = {}
    for split in SPLITS:
        written[split] = root / f"{split}.jsonl"
        images = root / "images" / split
        if written[split].exists() and images.is_dir():
            continue
        questions, image_paths = sources[split]
        with tempfile.TemporaryDirectory(dir=root, prefix=f".{split}-") as scratch:
            if not images.is_dir():
                aside = Path(scratch, "images")
                aside.mkdir()
                for number, path in image_paths().items():
                    shutil.copyfile(path, aside / f"{number}.png")
                aside.rename(images)
            lines = Path(scratch, "rows.jsonl")
            with lines.open("w", encoding="utf-8") as file:
                for question, answer, number in zip(*questions(), strict=True):
                    file.write(json.dumps(_row(question, answer, f"images/{split}/{number}.png")) + "\n")
            os.replace(lines, written[split])
    return written
