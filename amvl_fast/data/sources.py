"""What a name in a configuration means: a file, a folder, tar shards, or a data set of the hub."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from amvl_fast.errors import AMVLError

# Kinds by suffix. Files of one source are of one kind.
SUFFIXES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow", ".tar": "tar"}
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# Other names that files of a split go by.
SPLITS = {"train": ("training",), "validation": ("valid", "val", "dev"), "test": ("testing", "eval", "evaluation")}
# What `Dataset.save_to_disk` and `DatasetDict.save_to_disk` write.
SAVED = ("state.json", "dataset_dict.json")


@dataclass(frozen=True)
class Source:
    """`folder` is what image paths are relative to unless there is an image_root; None on the hub."""

    name: str
    kind: str  # a value of SUFFIXES, or "saved" or "hub"
    files: tuple[str, ...]
    folder: Path | None


def find_sources(given: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], split: str) -> list[Source]:
    """The sources of a name or of a list of names, in their order.

    What exists locally is local; then ``org/name`` is a data set of the hub.

    Raises:
        AMVLError: a name is neither, a folder holds files of several kinds, or the list is empty.
    """
    names = [given] if isinstance(given, str | os.PathLike) else list(given)
    if not names:
        raise AMVLError("The list of data sources is empty: name at least one file, folder or hub data set.")
    return [_find(os.fspath(name), split) for name in names]


def _find(name: str, split: str) -> Source:
    path = Path(name)
    if path.is_dir():
        return _folder(name, path, split)
    if path.exists():
        if path.suffix not in SUFFIXES:
            raise AMVLError(f"{name} is not of a known kind: use a file ending in {', '.join(SUFFIXES)}.")
        return Source(name, SUFFIXES[path.suffix], (name,), path.parent)
    if glob.has_magic(name) and (matches := sorted(glob.glob(name))):
        return _files(name, [Path(match) for match in matches], Path(matches[0]).parent)
    if path.suffix not in SUFFIXES and HUB_NAME.fullmatch(name):
        return Source(name, "hub", (), None)
    raise AMVLError(f"{name} does not exist: correct the path of the data file or folder.")


def _folder(name: str, path: Path, split: str) -> Source:
    if any((path / mark).is_file() for mark in SAVED):
        return Source(name, "saved", (name,), path)
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
    if not files:  # the form of a repository of the hub, which the datasets library knows to read
        return Source(name, "hub", (), path)
    return _files(name, _of_split(files, split), path)


def _files(name: str, files: list[Path], folder: Path) -> Source:
    kinds = {SUFFIXES.get(file.suffix) for file in files}
    if len(kinds) > 1 or None in kinds:
        found = ", ".join(sorted({file.suffix or file.name for file in files}))
        raise AMVLError(
            f"{name} holds files of several kinds ({found}): name those to be read, as a list or a pattern."
        )
    return Source(name, SUFFIXES[files[0].suffix], tuple(map(str, files)), folder)


def _of_split(files: list[Path], split: str) -> list[Path]:
    """The files of one split where their names tell: a folder of train.jsonl and test.jsonl is not one training set."""
    known = {word for name, others in SPLITS.items() for word in (name, *others)}
    words = {file: set(re.split(r"[^a-z0-9]+", file.stem.lower())) for file in files}
    if not any(words[file] & known for file in files):
        return files
    wanted = {split, *SPLITS.get(split, ())}
    chosen = [file for file in files if words[file] & wanted]
    if not chosen:
        raise AMVLError(f"{files[0].parent} has no file of the split {split!r}: name a file, or another split.")
    return chosen
