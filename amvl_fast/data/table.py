"""One source as a memory-mapped table, or as a stream, of the datasets library; a record is read where it is needed."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from amvl_fast.data.archives import is_array, json_rows, tar_rows
from amvl_fast.data.sources import Source
from amvl_fast.errors import AMVLError

# Fewer bytes than any row has that could be of use.
SHORT = 20
# Conversion depends on the code of `archives`: raise it when that changes what it yields.
VERSION = "1"
# Rows that are in memory at a time, fewer where they may hold the bytes of images; and of batches that only point into
# the cache.
BATCH = 1000
IMAGE_BATCH = 100
STEP = 10_000


class Table:
    """The records of one source, converted once into the datasets library's cache and memory-mapped from there.

    JSON is kept as text, one record a row: nothing is inferred from the first rows that the last could break, a
    broken line is one bad sample, and opening takes no time that grows with the rows. Blank lines do not count.

    Raises:
        AMVLError: `datasets` is not installed; the source is empty, cannot be read, or cannot be reached.
    """

    def __init__(self, source: Source, split: str) -> None:
        self.source = source
        self._data = open_source(source, split, streaming=False)
        self.is_text = source.kind in ("json", "tar")
        self._is_lines = source.kind == "json" and len(source.files) == 1 and not is_array(source.files[0])
        self._places = self._not_blank() if self.is_text else None
        if not len(self):
            raise empty(source)

    def __len__(self) -> int:
        return len(self._data) if self._places is None else len(self._places)

    @property
    def fingerprint(self) -> str:
        """Of the content: another one after the source has changed."""
        return self._data._fingerprint

    @property
    def batch(self) -> int:
        """How many rows to read at a time."""
        return IMAGE_BATCH if "images" in self._data.column_names else BATCH

    def where(self, row: int) -> str:
        return f"row {row} (counted from 0) of {self.source.name}"

    def records(self, rows: Sequence[int], *, images: bool = True) -> list[dict[str, Any]]:
        """The records of some rows as they are stored, see `parse`; without the column of images where told."""
        places: Any = rows if self._places is None else self._places[rows]
        data = self._data if images or "images" not in self._data.column_names else self._data.remove_columns("images")
        columns = data[places]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def parse(self, record: dict[str, Any], row: int) -> dict[str, Any]:
        """A stored record as the user wrote it.

        Raises:
            AMVLError: it is not a JSON object.
        """
        if not self.is_text:
            return record
        if self._is_lines:
            place = row if self._places is None else int(self._places[row])
            return parse_record(record, f"line {place + 1} (counted from 1) of {self.source.name}")
        return parse_record(record, self.where(row))

    def arrow_batches(self) -> Iterator[tuple[int, Any]]:
        """Place of the first row, and pyarrow table, of batches over everything that is stored."""
        data = self._data.with_format("arrow")
        for start in range(0, len(data), STEP):
            yield start, data[start : start + STEP]

    def rows_of(self, stored: np.ndarray) -> np.ndarray:
        """Of values for everything that is stored, those of rows."""
        return stored if self._places is None else stored[self._places]

    def _not_blank(self) -> np.ndarray | None:
        """Places of the lines that are not blank; None if that is all. Looks at lengths, and only into short lines."""
        import pyarrow.compute as pc

        short = []
        for start, batch in self.arrow_batches():
            sizes = pc.binary_length(batch["text"]).to_numpy()
            short += (start + np.flatnonzero(sizes < SHORT)).tolist()
        texts = self._data[short]["text"] if short else []
        blank = [place for place, text in zip(short, texts, strict=True) if is_blank(text)]
        if not blank or self.source.kind == "tar":  # a sample without its JSON is a bad sample, not a blank line
            return None
        return np.delete(np.arange(len(self._data)), blank)


def stream_records(source: Source, split: str) -> Iterator[dict[str, Any]]:
    """The stored records of a source in order, read through `datasets` without conversion.

    Raises:
        AMVLError: as `Table`.
    """
    data = open_source(source, split, streaming=True)
    try:
        # Not by iterating: in a worker of a DataLoader, the library would hand each its own files.
        for columns in data.iter(batch_size=32):
            for values in zip(*columns.values(), strict=True):
                record = dict(zip(columns, values, strict=True))
                if source.kind != "json" or not is_blank(record["text"]):
                    yield record
    except AMVLError:
        raise
    except Exception as error:
        raise unreadable(source, error) from error


def is_blank(text: str) -> bool:
    """Whether a line is no row; long ones are rows, so that nobody has to look into all of them."""
    return len(text.encode()) < SHORT and not text.strip()


def parse_record(record: dict[str, Any], where: str) -> dict[str, Any]:
    """What the JSON text of a stored record says, with the images that lie beside it."""
    problem = "no JSON object"
    row = None
    try:
        row = json.loads(record["text"].strip())
    except json.JSONDecodeError as fault:
        problem = f"no valid JSON ({fault.msg} at column {fault.colno})"
    except RecursionError:
        problem = "no valid JSON (it is nested too deep)"
    if not isinstance(row, dict):
        raise AMVLError(f'There is {problem} in {where}: write one {{"messages": [...], "images": [...]}} there.')
    return row | {"images": record["images"]} if record.get("images") else row


def open_source(source: Source, split: str, *, streaming: bool) -> Any:
    """The ``datasets.Dataset`` or ``IterableDataset`` of a source, with its images left undecoded."""
    try:
        import datasets
    except ImportError as error:
        raise AMVLError(
            "The datasets library, which reads data files, is not installed or too old: "
            "run `pip install amvl-fast[train]`."
        ) from error
    try:
        data = _open(datasets, source, split, streaming)
        if data.features is not None:
            data.info.features = _undecoded(datasets, data.features)
        return data
    except AMVLError:
        raise
    except Exception as error:  # the library raises whatever its readers did, often wrapped
        cause: Any = error
        while cause is not None and not isinstance(cause, AMVLError):
            cause = cause.__cause__
        raise cause or unreadable(source, error) from error


def _open(datasets: Any, source: Source, split: str, streaming: bool) -> Any:
    files = list(source.files)
    kind = datasets.IterableDataset if streaming else datasets.Dataset
    if source.kind == "hub":
        return datasets.load_dataset(source.name, split=split, streaming=streaming)
    if source.kind == "saved":
        saved = datasets.load_from_disk(files[0])
        saved = saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        return saved.to_iterable_dataset() if streaming else saved
    patterns = list(map(glob.escape, files))  # the library takes names for patterns
    if source.kind == "parquet":
        return kind.from_parquet(patterns)
    if source.kind == "arrow":
        return datasets.load_dataset("arrow", data_files=patterns, split="train", streaming=streaming)
    text = datasets.Features({"text": datasets.Value("string")})
    if source.kind == "json" and not any(map(is_array, files)):
        if not any(map(os.path.getsize, files)):  # of which the library says that they do not exist
            raise empty(source)
        return kind.from_text(patterns, features=text, encoding="utf-8-sig", encoding_errors="replace")
    if source.kind == "tar":
        image = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
        rows, features = tar_rows, datasets.Features({**text, "images": datasets.List(image)})
    else:
        rows, features = json_rows, text
    if streaming:
        return kind.from_generator(rows, features=features, gen_kwargs={"files": files})
    # Of a generator the library hashes the arguments alone, and would not see that a file has changed.
    state = [(os.path.abspath(file), os.path.getsize(file), os.stat(file).st_mtime_ns) for file in files]
    fingerprint = hashlib.sha256(json.dumps([VERSION, source.kind, state]).encode()).hexdigest()[:32]
    return kind.from_generator(
        rows,
        features=features,
        gen_kwargs={"files": files},
        fingerprint=fingerprint,
        writer_batch_size=100,  # images lie in memory until a batch is written
    )


def _undecoded(datasets: Any, feature: Any) -> Any:
    """Features whose images stay paths and bytes: the library would open any path or URL that it is given."""
    if isinstance(feature, dict):
        return type(feature)({name: _undecoded(datasets, value) for name, value in feature.items()})
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, datasets.List | datasets.LargeList):
        return type(feature)(_undecoded(datasets, feature.feature))
    return feature


def empty(source: Source) -> AMVLError:
    return AMVLError(f"{source.name} is empty: write at least one row into it.")


def unreadable(source: Source, error: Exception) -> AMVLError:
    reason = " ".join(str(error.__cause__ or error).split())[:300].rstrip(".") or type(error).__name__
    if "corresponds to no data" in reason:  # the library's words for a generator without rows
        return empty(source)
    if source.kind == "hub" and not Path(source.name).exists():
        return AMVLError(
            f"{source.name} is neither a local file or folder nor a data set of the hub that can be reached "
            f"({reason}): correct its name or split, or download it first."
        )
    return AMVLError(f"{source.name} cannot be read ({reason}): write it again, or check that it was copied whole.")
