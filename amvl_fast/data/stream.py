"""Chat rows read front to back, each process and worker its own batches of them."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from amvl_fast.data.reader import Reader
from amvl_fast.data.skipped import SkippedFile, require_options, require_share
from amvl_fast.data.sources import find_sources
from amvl_fast.data.table import empty, parse_record, stream_records
from amvl_fast.errors import AMVLError

MAX_WORKERS = 1024
LEAST_BAD = 10


class ChatStream(IterableDataset):
    """The rows of `amvl_fast.data.ChatDataset` as a stream, with nothing converted and nothing kept.

    Rows are dealt in blocks: row ``i`` belongs to batch ``i // batch_size``, batch ``b`` to the process
    ``b % world_size``, and of a process's batches the n-th to the worker ``n % num_workers``. So a ``DataLoader`` of
    that ``batch_size`` over the stream gives process ``r`` the batches ``r``, ``r + world_size``, ... in order, for any
    number of workers. Every worker reads the whole stream, but decodes its own images only.

    Args:
        source, image_root, max_rows, split, visual_thoughts, special_tokens: as for `ChatDataset`.
        batch_size: of the ``DataLoader``, on one process.
        rank, world_size: of the process, and how many there are.
        seed: shuffles rows in a buffer, another way each epoch (`set_epoch`); None leaves them in order.
        buffer_size: how many rows, undecoded, the buffer holds; images in bytes count.
        endless: begin again at the end, with the next epoch's order, so that no process runs out before another.
        on_bad_sample: ``"error"``, or ``"skip"``: the next readable row of the process's rows stands in a bad one's
            place, besides its own; at the very end the place stays empty.
        max_bad_share: with ``"skip"``, the share of bad rows among those that this process has read, over all epochs,
            above which reading stops; ten are always allowed.
        skipped_file: as for `ChatDataset`.

    Items are those of `ChatDataset`; ``row`` is the number in the stream as it is stored, whatever the order.

    Raises:
        AMVLError: as `ChatDataset`, those about rows when they are read.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        batch_size: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int | None = None,
        buffer_size: int = 1000,
        endless: bool = False,
        image_root: str | os.PathLike[str] | None = None,
        max_rows: int | None = None,
        split: str = "train",
        visual_thoughts: str = "drop",
        on_bad_sample: str = "error",
        max_bad_share: float = 0.01,
        skipped_file: str | os.PathLike[str] | None = None,
        special_tokens: Sequence[str] = (),
    ) -> None:
        sizes = {"batch_size": batch_size, "world_size": world_size, "buffer_size": buffer_size, "max_rows": max_rows}
        for name, value in sizes.items():
            if value is not None and value < 1:
                raise AMVLError(f"{name} is {value}: use at least 1.")
        if not 0 <= rank < world_size:
            raise AMVLError(f"rank is {rank}: use a number from 0 to world_size - 1, {world_size - 1}.")
        require_options(on_bad_sample, max_bad_share)
        self.special_tokens = tuple(special_tokens)
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.seed, self.buffer_size, self.max_rows, self.split = seed, buffer_size, max_rows, split
        self.max_bad_share, self.endless = max_bad_share, endless
        self._sources = find_sources(source, split)
        self._readers = [
            Reader(each.folder if image_root is None else image_root, visual_thoughts) for each in self._sources
        ]
        self._skipped = SkippedFile(skipped_file) if on_bad_sample == "skip" else None
        # Shared with workers, each of which writes to a column of its own: rows read, and bad ones among them.
        self._counts = torch.zeros(2, MAX_WORKERS + 1, dtype=torch.int64).share_memory_()
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's order; workers that live on learn of it too."""
        self._epoch.fill_(epoch)

    @property
    def skipped(self) -> int:
        """How many times this process and its workers have met a bad row and left it out."""
        return int(self._counts[1].sum())

    def validate(self, *, special_tokens: Sequence[str] | None = None, **_: Any) -> None:
        """Check that every source can be opened and that its first row is of a known form, and no more.

        Args:
            special_tokens: in place of those given before.
        """
        if special_tokens is not None:
            self.special_tokens = tuple(special_tokens)
        for source, reader in zip(self._sources, self._readers, strict=True):
            first = next(stream_records(source, self.split), None)
            if first is None:
                raise empty(source)
            if self._skipped is None:
                reader.chat(self._parse(source, first, f"row 0 (counted from 0) of {source.name}"), source.name)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        counts = self._counts[:, 0 if worker is None else 1 + number]
        waiting = 0
        for position, record in enumerate(self._epochs()):
            batch = position // self.batch_size
            if batch % self.world_size != self.rank:
                continue
            is_own = batch // self.world_size % workers == number
            if not is_own and not waiting:
                continue
            item = self._item(record, counts if is_own else None)
            if item is None:
                waiting += is_own
                continue
            for _ in range(waiting):
                yield dict(item)
            waiting = 0
            if is_own:
                yield item

    def _epochs(self) -> Iterator[Any]:
        for epoch in itertools.count(int(self._epoch)):
            yield from self._shuffled(self._records(), epoch)
            if not self.endless:
                return

    def _records(self) -> Iterator[tuple[int, int, int, dict[str, Any]]]:
        """Number in the stream, number of the source, row in it, and the stored record."""
        count = 0
        for number, source in enumerate(self._sources):
            for local, record in enumerate(stream_records(source, self.split)):
                if self.max_rows is not None and count >= self.max_rows:
                    return
                yield count, number, local, record
                count += 1

    def _shuffled(self, rows: Iterator[Any], epoch: int) -> Iterator[Any]:
        # Not by the library, which would shuffle files as well and with them the numbers that name rows.
        if self.seed is None:
            yield from rows
            return
        draw = random.Random(f"{self.seed} {epoch}")  # a text seeds by its SHA-512, the same everywhere
        buffer: list[Any] = []
        for row in rows:
            if len(buffer) < self.buffer_size:
                buffer.append(row)
                continue
            place = draw.randrange(self.buffer_size)
            buffer[place], row = row, buffer[place]
            yield row
        draw.shuffle(buffer)
        yield from buffer

    def _item(self, entry: Any, counts: torch.Tensor | None) -> dict[str, Any] | None:
        """The item of one of `_records`; None if it is bad and may be left out. Counted where `counts` are given."""
        row, number, local, record = entry
        source = self._sources[number]
        where = f"row {local} (counted from 0) of {source.name}"
        if counts is not None:
            counts[0] += 1
        try:
            parsed = self._parse(source, record, where)
            return self._readers[number].item(parsed, where, row, self.special_tokens)
        except AMVLError as error:
            if self._skipped is None:
                raise
            if counts is not None:
                counts[1] += 1
                self._skipped.add(source.name, local, str(error))
                seen, bad = self._counts.sum(1).tolist()
                require_share(bad, seen, self.max_bad_share, LEAST_BAD, self._skipped)
            return None

    def _parse(self, source: Any, record: dict[str, Any], where: str) -> dict[str, Any]:
        return parse_record(record, where) if source.kind in ("json", "tar") else record
