"""The measurement: all providers of a case in turn, round after round, so that whatever slows one slows its rivals.

A speed-up is the median over rounds of a ratio of two times from the same round, never of two separate runs.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import Any, TypeVar

Given = TypeVar("Given")
Times = list[tuple[float, float]]  # of each round: seconds on the device, seconds on the host


@dataclass(frozen=True)
class Budget:
    """When a case has been measured enough.

    Attributes:
        seconds: spent on a case whose rounds are short.
        max_rounds: at most.
        min_rounds: at least,
        patience: unless they take more seconds than this; then `fewest_rounds` will do.
    """

    seconds: float = 1.5
    max_rounds: int = 300
    min_rounds: int = 7
    patience: float = 12.0
    fewest_rounds: int = 3

    def asks_for_more(self, rounds: int, elapsed: float) -> bool:
        if rounds < self.fewest_rounds:
            return True
        if rounds < self.min_rounds:
            return elapsed < self.patience
        return rounds < self.max_rounds and elapsed < self.seconds


QUICK = Budget(seconds=0.1, max_rounds=50, min_rounds=3)
OVERHEAD = Budget(seconds=0.5)


def interleave(
    contestants: dict[str, Callable[[Given], Callable[[], Any]]],
    rotation: Sequence[Given],
    stopwatch: Callable[[Callable[[], Any]], tuple[float, float]],
    budget: Budget,
) -> dict[str, Times]:
    """Time everybody once a round, in an order drawn anew for each so that nobody always follows the same rival.

    The first round is left out where there is time for more than the fewest.
    """
    order, dice, sets = list(contestants), random.Random(0), cycle(rotation)
    times: dict[str, Times] = {name: [] for name in order}
    begin, rounds = time.perf_counter(), 0
    while budget.asks_for_more(rounds, time.perf_counter() - begin):
        dice.shuffle(order)
        for name in order:
            times[name].append(stopwatch(contestants[name](next(sets))))
        rounds += 1
    warm_up = 1 if rounds > budget.fewest_rounds else 0
    return {name: taken[warm_up:] for name, taken in times.items()}


@contextmanager
def no_collection() -> Iterator[None]:
    """Keep Python's garbage collector from running inside somebody's time."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between neighbours, as numpy's default."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def speedup(baseline: Times, times: Times) -> float:
    """How many times faster than the baseline: the median over the rounds they were both in."""
    return statistics.median(theirs / own for (theirs, _), (own, _) in zip(baseline, times, strict=True))
