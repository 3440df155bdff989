"""Generators of rows as text from files that no reader of the datasets library takes as we need them."""

from __future__ import annotations

import json
import os
import posixpath
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from amvl_fast.errors import AMVLError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
CHUNK = 1 << 20
SPACE = " \t\r\n"
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, Zstandard


def is_array(path: str | Path) -> bool:
    """Whether a JSON file is one array, not one object on each line."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        while (start := file.read(1)) and start in SPACE:
            pass
        return start == "["


def json_rows(files: list[str]) -> Iterator[dict[str, Any]]:
    """``{"text": the JSON of a row}`` from files of JSON arrays or lines, of which a part is in memory at a time."""
    for name in files:
        if is_array(name):
            yield from ({"text": text} for text in _array(name))
        else:
            with open(name, encoding="utf-8-sig", errors="replace") as lines:
                yield from ({"text": line.strip()} for line in lines if line.strip())


def _array(name: str) -> Iterator[str]:
    decode = json.JSONDecoder().raw_decode
    with open(name, encoding="utf-8-sig", errors="replace") as file:
        text, start, size = file.read(CHUNK), 0, CHUNK
        start = text.index("[") + 1
        while True:
            while start < len(text) and text[start] in SPACE + ",":
                start += 1
            try:
                if start < len(text) and text[start] == "]":
                    return
                end = decode(text, start)[1]
                if end == len(text):  # a number may go on
                    raise json.JSONDecodeError("Unfinished array", text, end)
            except json.JSONDecodeError as fault:
                more = file.read(size)
                if not more:
                    raise AMVLError(
                        f"{name} cannot be read (its JSON array is broken: {fault.msg}): write it again, or check that "
                        "it was copied whole."
                    ) from None
                text, start, size = text[start:] + more, 0, 2 * size  # a row of many megabytes is not read too often
            else:
                yield text[start:end]
                start = end
                if start > CHUNK:
                    text, start, size = text[start:], 0, CHUNK


def tar_rows(files: list[str]) -> Iterator[dict[str, Any]]:
    """``{"text": the JSON of a row, "images": [{"bytes": ..., "path": ...}, ...]}`` from tar shards.

    Members of one sample stand together and share a stem: ``7.json``, ``7.0.png``, ``7.1.png``. Images come by
    their number, else in the order of the shard; members of other kinds are passed over.
    """
    for name in files:
        _require_end(name)
        with tarfile.open(name, "r|*") as shard:  # front to back, never the whole
            sample: dict[str, bytes] = {}
            current = None
            for member in shard:
                folder, base = posixpath.split(member.name)
                stem, _, suffix = base.partition(".")
                if not member.isfile() or not stem or not suffix:
                    continue
                if sample and (folder, stem) != current:
                    yield _sample(sample)
                    sample = {}
                current = (folder, stem)
                file = shard.extractfile(member)
                if file is not None and f".{suffix}".lower().endswith((".json", *IMAGE_SUFFIXES)):
                    sample[suffix.lower()] = file.read()
            if sample:
                yield _sample(sample)


def _require_end(name: str) -> None:
    """Refuse a shard that was cut off: ``tarfile`` takes the end of a file within a header for that of the archive."""
    with open(name, "rb") as file:
        if file.read(6).startswith(COMPRESSED):
            return  # whose readers see to it
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - tarfile.BLOCKSIZE))
        if size % tarfile.BLOCKSIZE or any(file.read()):
            raise AMVLError(
                f"{name} cannot be read (its end is missing): write it again, or check that it was copied whole."
            )


def _sample(members: dict[str, bytes]) -> dict[str, Any]:
    images = [suffix for suffix in members if suffix != "json"]
    images.sort(key=lambda suffix: int(number) if (number := suffix.partition(".")[0]).isdecimal() else -1)
    return {
        "text": members.get("json", b"").decode("utf-8-sig", "replace"),
        "images": [{"bytes": members[suffix], "path": suffix} for suffix in images],
    }
