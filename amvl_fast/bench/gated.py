"""Results that are kept for as long as nobody was wrong."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from amvl_fast.bench.gate import GateError

AnyCase = TypeVar("AnyCase", bound=Hashable)


@dataclass
class Measured:
    """One provider on one case: its row of the table, and its time in each round, in seconds."""

    row: dict[str, Any]
    samples: list[float]


class Gated(ABC, Generic[AnyCase]):
    """Measures each case when it is first asked for, and keeps what it found.

    After a red gate there are no results, neither new ones nor those from before.
    """

    def __init__(self) -> None:
        self.red: GateError | None = None
        self._results: dict[AnyCase, dict[str, Measured]] = {}

    @abstractmethod
    def _measure(self, case: AnyCase) -> dict[str, Measured]:
        """Everybody on a case, by name; raises GateError."""

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [measured.row for group in self._results.values() for measured in group.values()]

    def results(self, case: AnyCase) -> dict[str, Measured]:
        """Everybody's results on a case, by provider.

        Raises:
            GateError: somebody was wrong, on this case or an earlier one.
        """
        if self.red is not None:
            raise self.red
        try:
            if case not in self._results:
                self._results[case] = self._measure(case)
        except GateError as error:
            self.red = error
            self._results.clear()
            raise
        return self._results[case]
