"""A clock that replays recorded times, so that pytest-benchmark reports what was measured in turns."""

from __future__ import annotations

from collections.abc import Iterator


class RecordedClock:
    """Stands still but for calls of `advance`, each of which takes as long as the next recorded time."""

    now = 0.0

    def read(self) -> float:
        return self.now

    def advance(self, samples: Iterator[float]) -> None:
        self.now += next(samples)
