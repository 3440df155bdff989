"""Chat rows of any size as a map-style dataset, memory-mapped, and the check that runs before training."""

from __future__ import annotations

import copy
import hashlib
import os
import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from amvl_fast.data.lengths import estimate
from amvl_fast.data.marker import Marker
from amvl_fast.data.reader import CHECKER_VERSION, Reader
from amvl_fast.data.rows import image_source, text_of
from amvl_fast.data.skipped import SkippedFile, require_options, require_share
from amvl_fast.data.sources import find_sources
from amvl_fast.data.table import IMAGE_BATCH, Table
from amvl_fast.errors import AMVLError


class ChatDataset(Dataset):
    """Rows of files, folders, tar shards or hub datasets, in the chat form or that of Monet-SFT-125K.

    A row is ``{"messages": [...], "images": [image, ...]}`` and any further columns. A message is
    ``{"role": ..., "content": ...}``, its content a string or a list of parts, ``{"type": "image"}`` and
    ``{"type": "text", "text": ...}``; the last message is the assistant's and is the answer. The n-th image
    part of a row stands for its n-th image: a path, or bytes as the datasets library stores them. A record with
    ``data`` in place of ``messages`` is read by `amvl_fast.data.monet.monet_row`.

    The ``datasets`` library converts a source once and memory-maps it from its cache (``HF_DATASETS_CACHE``) after
    that; several processes may open it at once.

    Args:
        source: one or a list of: a ``.jsonl``, ``.json``, ``.parquet``, ``.arrow`` or ``.tar`` file; a folder or a
            pattern of such files, or a folder written by ``save_to_disk``; the name ``org/name`` of a hub dataset,
            where there is no such local path. Samples of tar shards are ``7.json`` and ``7.png`` or ``7.0.png``, ...
        image_root: the folder that image paths are relative to and may not leave; each source's own by default.
        max_rows: keep only the first rows, at most this many.
        split: of hub datasets, and of folders whose file names tell one.
        visual_thoughts: ``"drop"`` or ``"text"``, of Monet records.
        on_bad_sample: ``"error"``, or ``"skip"``: a bad row is left out when it is met, and the next readable one
            takes its place, so that batches keep their size.
        max_bad_share: with ``"skip"``, the share of bad rows above which reading stops; one is always allowed.
        skipped_file: where each bad row is named, as a JSON line ``{"row": ..., "source": ..., "reason": ...}``, its
            row counted from 0 within its source. Rows that it names already, from an earlier part of a run or by
            another process, count and are not named again.
        special_tokens: no text may hold one of these; give the tokenizer's ``all_special_tokens``.

    Item ``i`` is ``{"messages": [...], "images": [RGB PIL image, ...], "answer": str, "row": int}`` and the
    further columns; ``row`` is the number in all sources, counted from 0, also in a subset.

    Raises:
        AMVLError: ``datasets`` is not installed; a source is missing, empty, not readable or of an unknown form; an
            option has no meaning. A bad row raises it when it is read, or, with ``"skip"``, when there are too many.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        image_root: str | os.PathLike[str] | None = None,
        max_rows: int | None = None,
        split: str = "train",
        visual_thoughts: str = "drop",
        on_bad_sample: str = "error",
        max_bad_share: float = 0.01,
        skipped_file: str | os.PathLike[str] | None = None,
        special_tokens: Sequence[str] = (),
    ) -> None:
        if max_rows is not None and max_rows < 1:
            raise AMVLError(f"max_rows is {max_rows}: use at least 1, or leave it out for every row.")
        require_options(on_bad_sample, max_bad_share)
        self.special_tokens = tuple(special_tokens)
        self.max_bad_share = max_bad_share
        sources = find_sources(source, split)
        self.path = Path(sources[0].name)
        self._readers = [Reader(each.folder if image_root is None else image_root, visual_thoughts) for each in sources]
        self.image_root = self._readers[0].root
        self._tables = [Table(each, split) for each in sources]
        self._starts = [0, *accumulate(map(len, self._tables))]
        self._rows: range | np.ndarray = range(self._starts[-1])[:max_rows]
        self._skipped: SkippedFile | None = None
        if on_bad_sample == "skip":
            self._skipped = SkippedFile(skipped_file)
            self._total = len(self._rows)
            # A byte for each row, shared with the workers of a DataLoader: two that set it do no harm.
            self._is_bad = torch.zeros(self._starts[-1], dtype=torch.uint8).share_memory_()
            self._note_named()
        else:
            for table, reader in zip(self._tables, self._readers, strict=True):  # tell a wrong form at once
                reader.chat(table.parse(table.records([0])[0], 0), table.source.name)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        position = range(len(self))[index]
        for place in range(position, position + len(self)):
            row = int(self._rows[place % len(self)])
            try:
                return self._item(row)
            except AMVLError as error:
                if self._skipped is None:
                    raise
                self._skip(row, str(error))
        raise AMVLError(f"No row of {self.path} can be read: repair the data.")

    @property
    def skipped(self) -> int:
        """How many rows were found bad and left out so far, by this process and those that share its file."""
        if self._skipped is None:
            return 0
        self._skipped.catch_up()
        self._note_named()
        return int(self._is_bad.sum())

    def subset(self, count: int, *, seed: int = 0) -> ChatDataset:
        """``count`` rows drawn without replacement, in file order; all of them when there are fewer."""
        chosen = copy.copy(self)
        if count < len(self):
            drawn = sorted(random.Random(seed).sample(range(len(self)), count))
            chosen._rows = np.asarray(self._rows, dtype=np.int64)[drawn]
        return chosen

    def column(self, name: str) -> list[Any]:
        """One column of every row, without decoding images. Takes time and memory for every row."""
        absent = object()
        values = [row.get(name, absent) for _, _, row in self._chat_rows(images=name == "images")]
        if all(value is absent for value in values):
            columns = ", ".join(sorted(next(self._chat_rows())[2]))
            raise AMVLError(f"{self.path} has no column `{name}` (it has {columns}): add it, or ask for another.")
        return [None if value is absent else value for value in values]

    def answers(self) -> list[str]:
        """The answer text of every row, without decoding images."""
        return [text_of(row["messages"][-1]) for _, _, row in self._chat_rows(images=False)]

    def lengths(self) -> np.ndarray:
        """An estimate of each row's length in tokens, int64 (rows,), for grouping rows of like length.

        Bytes of text and a constant for each image: no tokenizer is asked, and rows of different sources are
        comparable only roughly. Takes about a second for a million rows.
        """
        parts = []
        for table in self._tables:
            stored = np.concatenate([estimate(batch, is_text=table.is_text) for _, batch in table.arrow_batches()])
            parts.append(table.rows_of(stored))
        every = np.concatenate(parts)
        return every[: len(self)] if isinstance(self._rows, range) else every[self._rows]

    def validate(
        self, *, decode_images: bool = True, special_tokens: Sequence[str] | None = None, again: bool = False
    ) -> None:
        """Check every row, and every distinct image file once, before any training step.

        What has passed is marked in the datasets library's cache and not walked through at the next start. The mark
        is of rows, not of image files: these are read here once, and again when they are used. With
        ``on_bad_sample="skip"`` nothing is checked here.

        Args:
            decode_images: decode each image in full. False reads headers only, which is quicker on large
                photographs but does not notice a truncated file.
            special_tokens: in place of those given before, here and for reading.
            again: check although there is a mark.

        Raises:
            AMVLError: a bad row or image, the first of those of every hundred rows: what is wrong, in which row of
                which file, and what to do about it.
        """
        if special_tokens is not None:
            self.special_tokens = tuple(special_tokens)
        if self._skipped is not None:
            return
        mark = self._mark(decode_images)
        if not again and mark.is_set():
            return
        seen: set[tuple[int, str]] = set()
        # Pillow decodes without holding the interpreter lock, so threads help once images are large.
        with (
            ThreadPoolExecutor(os.cpu_count()) as pool,
            tqdm(None, "Checking rows", len(self), leave=False, delay=2, unit="row") as progress,
        ):
            waiting: list[Any] = []
            for count, (number, row, chat) in enumerate(self._chat_rows(), start=1):
                reader, where = self._readers[number], self._tables[number].where(row)
                reader.check(chat, where, self.special_tokens)
                for image in chat.get("images", ()):
                    name = image_source(image)
                    if isinstance(name, str) and (number, name) in seen:
                        continue
                    if isinstance(name, str):
                        seen.add((number, name))
                    waiting.append(pool.submit(_look, reader, image, where, not decode_images))
                if count % IMAGE_BATCH == 0 or count == len(self):
                    for check in waiting:
                        check.result()
                    waiting.clear()
                    progress.update(count - progress.n)
        mark.set()

    def _item(self, row: int) -> dict[str, Any]:
        number, local = self._locate(row)
        table = self._tables[number]
        record = table.parse(table.records([local])[0], local)
        return self._readers[number].item(record, table.where(local), row, self.special_tokens)

    def _locate(self, row: int) -> tuple[int, int]:
        """Which table a row is in, and its number there."""
        number = bisect_right(self._starts, row) - 1
        return number, row - self._starts[number]

    def _chat_rows(self, *, images: bool = True) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """Number of the table, of the row in it, and the row in the chat form, unchecked, of every row."""
        for number, table in enumerate(self._tables):
            first, last = self._starts[number : number + 2]
            rows = self._rows
            chosen = (
                range(first, min(last, len(rows))) if isinstance(rows, range) else rows[(rows >= first) & (rows < last)]
            )
            for start in range(0, len(chosen), table.batch):
                local = [int(row) - first for row in chosen[start : start + table.batch]]
                for row, record in zip(local, table.records(local, images=images), strict=True):
                    yield number, row, self._readers[number].chat(table.parse(record, row), table.where(row))

    def _skip(self, row: int, reason: str) -> None:
        assert self._skipped is not None
        number, local = self._locate(row)
        self._skipped.add(self._tables[number].source.name, local, reason)
        self._is_bad[row] = 1
        self._note_named()
        require_share(int(self._is_bad.sum()), self._total, self.max_bad_share, 1, self._skipped)

    def _note_named(self) -> None:
        """Count what the file names, also what other processes have put there."""
        assert self._skipped is not None
        starts = {table.source.name: start for table, start in zip(self._tables, self._starts, strict=False)}
        for source, local in self._skipped.news():
            if source in starts and starts[source] + local < len(self._is_bad):
                self._is_bad[starts[source] + local] = 1

    def _mark(self, decode_images: bool) -> Marker:
        rows = str(self._rows) if isinstance(self._rows, range) else hashlib.sha256(self._rows.tobytes()).hexdigest()
        roots = [None if reader.root is None else os.path.abspath(reader.root) for reader in self._readers]
        return Marker(
            {
                "checker": CHECKER_VERSION,
                "tables": [table.fingerprint for table in self._tables],
                "rows": rows,
                "image_roots": roots,
                "special_tokens": sorted(self.special_tokens),
                "visual_thoughts": self._readers[0].visual_thoughts,
                "decode_images": decode_images,
            }
        )


def _look(reader: Reader, image: Any, where: str, header_only: bool) -> None:
    reader.image(image, where, header_only=header_only)
