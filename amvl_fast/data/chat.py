"""A local chat file (JSONL or Parquet) as a map-style dataset, and the check that runs before training."""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from amvl_fast.data.rows import check_row, check_special, text_of
from amvl_fast.data.table import read_table
from amvl_fast.errors import AMVLError

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class ChatDataset(Dataset):
    """Rows of a local ``.jsonl``, ``.json`` or ``.parquet`` file in the chat form.

    A row of the file is ``{"messages": [...], "images": [path, ...]}`` and any further columns. A message is
    ``{"role": ..., "content": ...}``, its content a string or a list of parts, ``{"type": "image"}`` and
    ``{"type": "text", "text": ...}``; the last message is the assistant's and is the answer. The n-th image
    part of a row stands for its n-th path. The ``datasets`` library reads the file, memory-mapped.

    Args:
        path: the file.
        image_root: the folder that image paths are relative to; the file's own folder by default.
        max_rows: keep only the first rows, at most this many.

    Item ``i`` is ``{"messages": [...], "images": [RGB PIL image, ...], "answer": str, "row": int}`` and the
    further columns; ``row`` is the number in the file, counted from 0, also in a subset.

    Raises:
        AMVLError: ``datasets`` is not installed; the file is missing, empty, not parsable or has no column
            ``messages``; ``max_rows`` is below 1. An item whose image cannot be read raises it too.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        image_root: str | os.PathLike[str] | None = None,
        max_rows: int | None = None,
    ) -> None:
        if max_rows is not None and max_rows < 1:
            raise AMVLError(f"max_rows is {max_rows}: use at least 1, or leave it out for every row.")
        self.path = Path(path)
        self.image_root = self.path.parent if image_root is None else Path(image_root)
        self._table = read_table(self.path)
        self._require("messages", 'write rows of the form {"messages": [...], "images": [...]}')
        self._rows: Sequence[int] = range(len(self._table))[:max_rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._rows[index]
        item = self._table[row]
        messages = _without_nulls(item["messages"])
        images = [self._decode(name, row) for name in item.get("images") or ()]
        answer = text_of(messages[-1]) if messages[-1]["role"] == "assistant" else ""
        return item | {"messages": messages, "images": images, "answer": answer, "row": row}

    def subset(self, count: int, *, seed: int = 0) -> ChatDataset:
        """``count`` rows drawn without replacement, in file order; all of them when there are fewer."""
        chosen = copy.copy(self)
        chosen._rows = sorted(random.Random(seed).sample(self._rows, min(count, len(self))))
        return chosen

    def column(self, name: str) -> list[Any]:
        """One column of every row, without decoding images."""
        self._require(name, "add it, or ask for another")
        return self._table.select_columns([name]).select(self._rows)[:][name]

    def answers(self) -> list[str]:
        """The answer text of every row, without decoding images."""
        return [text_of(messages[-1]) for messages in self.column("messages")]

    def validate(self, *, decode_images: bool = True, special_tokens: Sequence[str] = ()) -> None:
        """Check every row, and every distinct image file once, before any training step.

        Args:
            decode_images: decode each image in full. False reads headers only, which is quicker on large
                photographs but does not notice a truncated file.
            special_tokens: no text may hold one of these; give the tokenizer's ``all_special_tokens``.

        Raises:
            AMVLError: the first bad row, else the first bad image: what is wrong, in which row of which file,
                and what to do about it.
        """
        images: dict[str, int] = {}
        rows = tqdm(self._raw_rows(), "Checking rows", len(self), leave=False, delay=2, unit="row")
        for row, item in rows:
            where = f"row {row} (counted from 0) of {self.path}"
            check_row(item, where)
            check_special(item, where, special_tokens)
            for name in item.get("images", ()):
                images.setdefault(name, row)
        # Pillow decodes without holding the interpreter lock, so threads help once images are large.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            look = self._decode if decode_images else self._peek
            checks = pool.map(lambda image: look(*image) and None, images.items())
            for _ in tqdm(checks, "Checking images", len(images), leave=False, delay=2, unit="image"):
                pass

    def _raw_rows(self, batch: int = 1000) -> Iterator[tuple[int, dict[str, Any]]]:
        table = self._table.select_columns([name for name in ("messages", "images") if self._has(name)])
        for start in range(0, len(self), batch):
            rows = self._rows[start : start + batch]
            yield from zip(rows, map(_without_nulls, table.select(rows).to_list()), strict=True)

    def _has(self, column: str) -> bool:
        return column in self._table.column_names

    def _require(self, column: str, advice: str) -> None:
        if not self._has(column):
            columns = ", ".join(self._table.column_names)
            raise AMVLError(f"{self.path} has no column `{column}` (it has {columns}): {advice}.")

    def _decode(self, name: str, row: int) -> Image.Image:
        try:
            return _read_image(self.image_root / name)
        except UNREADABLE as error:
            raise self._bad_image(name, row, error) from error

    def _peek(self, name: str, row: int) -> None:
        try:
            with Image.open(self.image_root / name) as image:
                _require_depth(image)
        except UNREADABLE as error:
            raise self._bad_image(name, row, error) from error

    def _bad_image(self, name: str, row: int, error: Exception) -> AMVLError:
        if isinstance(error, FileNotFoundError):
            problem, advice = "does not exist", "put it there, or correct its path or `image_root`"
        else:
            problem, advice = f"cannot be read ({error})", "replace the file, or remove the row"
        image = self.image_root / name
        return AMVLError(f"Image {image} of row {row} (counted from 0) of {self.path} {problem}: {advice}.")


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """An image file as RGB, upright.

    Raises:
        AMVLError: the file is missing or cannot be read.
    """
    try:
        return _read_image(Path(path))
    except UNREADABLE as error:
        raise AMVLError(f"The image {path} cannot be read ({error}): give the path of an image file.") from error


def _read_image(path: Path) -> Image.Image:
    with Image.open(path) as image:
        _require_depth(image)
        ImageOps.exif_transpose(image, in_place=True)  # phones store photographs lying on their side
        if image.mode.startswith("I;16"):  # converting would clip all but the darkest 256 values to white
            levels = np.asarray(image).astype(np.uint32)
            return Image.fromarray(((levels + 128) // 257).astype(np.uint8)).convert("RGB")
        return image.convert("RGB")


def _require_depth(image: Image.Image) -> None:
    if image.mode in ("I", "F"):  # no saying which values are black and white
        raise ValueError(f"its pixel mode is {image.mode!r}; save it with 8 or 16 bits a channel")


def _without_nulls(value: Any) -> Any:
    """Drop keys whose value is None: Parquet gives every part the keys of all parts."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
