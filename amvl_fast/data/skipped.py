"""Which samples were left out, in a file that several processes share, and when there are too many."""

from __future__ import annotations

import json
import os
from itertools import islice
from pathlib import Path

from amvl_fast.errors import AMVLError

ON_BAD_SAMPLE = ("error", "skip")


class SkippedFile:
    """One JSON line ``{"row": ..., "source": ..., "reason": ...}`` for each bad sample, named once.

    Processes append to the file and read what the others have appended; so does a run that is resumed. Without
    a path only this process's own samples are known.

    Raises:
        AMVLError: the file cannot be written to or read.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.path = None if path is None else Path(path)
        self.named: dict[tuple[str, int], None] = {}  # in the order in which they became known
        self._told = 0
        self._offset = 0
        self.catch_up()

    def __str__(self) -> str:
        return "no skipped_file names them" if self.path is None else f"{self.path} names them"

    def catch_up(self) -> None:
        """Read the lines that were appended since the last time."""
        try:
            if self.path is None or not self.path.exists():
                return
            with self.path.open("rb") as file:
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
        except OSError as error:
            raise self._unusable(error) from error
        self._offset += len(whole) + len(newline)
        for line in whole.splitlines():
            try:
                entry = json.loads(line)
                self.named[entry["source"], int(entry["row"])] = None
            except (ValueError, KeyError, TypeError):
                continue  # cut off by a crash

    def news(self) -> list[tuple[str, int]]:
        """Source and row of the samples that became known since the last call."""
        fresh = list(islice(self.named, self._told, None))
        self._told = len(self.named)
        return fresh

    def add(self, source: str, row: int, reason: str) -> None:
        """Name a sample unless it has been named."""
        self.catch_up()
        if (source, row) in self.named:
            return
        self.named[source, row] = None
        if self.path is None:
            return
        line = json.dumps({"row": row, "source": source, "reason": reason}, ensure_ascii=False) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # One write to a file opened for appending is not mixed with another process's.
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(file, line.encode())
            finally:
                os.close(file)
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> AMVLError:
        return AMVLError(f"The skipped_file {self.path} cannot be used ({error}): give the path of a file to write.")


def require_share(bad: int, total: int, share: float, least: int, file: SkippedFile) -> None:
    """Stop above a share of bad samples, of which `least` are always allowed.

    Raises:
        AMVLError: there are more.
    """
    if bad > max(least, share * total):
        raise AMVLError(
            f"{bad:,} of {total:,} samples are bad ({bad / max(total, 1):.2%}, max_bad_share is {share:.2%}; {file}): "
            "repair the data, or allow a larger share."
        )


def require_options(on_bad_sample: str, max_bad_share: float) -> None:
    """Raises AMVLError if one of the two has no meaning."""
    if on_bad_sample not in ON_BAD_SAMPLE:
        raise AMVLError(f"on_bad_sample is {on_bad_sample!r}: use one of {', '.join(ON_BAD_SAMPLE)}.")
    if not 0 <= max_bad_share <= 1:
        raise AMVLError(f"max_bad_share is {max_bad_share}: use a share from 0 to 1.")
