"""Reading a local chat file into a memory-mapped table, with an error that names the line at fault."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from amvl_fast.errors import AMVLError

SUFFIXES = (".jsonl", ".json", ".parquet")


def read_table(path: Path) -> Any:
    """The ``datasets.Dataset`` of one file, read once and memory-mapped from the library's cache after that.

    Raises:
        AMVLError: ``datasets`` is not installed; the file is missing, empty, of another kind or not parsable.
    """
    try:
        from datasets import Dataset, Json  # noqa: F401 (older versions have no Json)
    except ImportError as error:
        raise AMVLError(
            "The datasets library, which reads data files, is not installed or too old: "
            "run `pip install amvl-fast[train]`."
        ) from error
    if path.suffix not in SUFFIXES:
        raise AMVLError(f"{path} is not of a known kind: use a file ending in {', '.join(SUFFIXES)}.")
    if not path.is_file():
        raise AMVLError(f"{path} does not exist: correct the path of the data file.")
    try:
        table = Dataset.from_parquet(str(path)) if path.suffix == ".parquet" else _read_json(path)
    except AMVLError:
        raise
    except Exception as error:  # the library raises whatever its readers did, often wrapped
        reason = str(error.__cause__ or error).strip().splitlines()[0].rstrip(".")
        raise AMVLError(
            f"{path} cannot be read ({reason}): write it again, or check that it was copied whole."
        ) from error
    if not len(table):
        raise AMVLError(f"{path} is empty: write at least one row into it.")
    return table


def _read_json(path: Path) -> Any:
    from datasets import Dataset, Features, Json

    def read(columns: set[str]) -> Any:
        # Left to itself the library infers types from the first 10 MB and silently turns content of another
        # type further down into a quoted string, so every column is declared to be any JSON value.
        return Dataset.from_json(str(path), features=Features({name: Json() for name in sorted(columns)}))

    if _is_array(path):
        return Dataset.from_json(str(path))  # read whole, so its inference sees every row
    rows = _json_lines(path)
    first = next(rows, None)
    if first is None:
        raise AMVLError(f"{path} is empty: write at least one row into it.")
    try:
        return read(set(first))
    except Exception:  # a bad line, which the scan names, or columns that appear further down
        return read(set(first).union(*rows))


def _is_array(path: Path) -> bool:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return file.read(1) == "["


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.rstrip())
                problem = "is not an object"
            except json.JSONDecodeError as fault:
                row, problem = None, f"is not valid JSON ({fault.msg} at column {fault.colno})"
            if not isinstance(row, dict):
                raise AMVLError(
                    f"Line {number} (counted from 1) of {path} {problem}: "
                    'write one {"messages": [...], "images": [...]} on each line.'
                )
            yield row
