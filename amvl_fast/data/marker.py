"""Marks beside the datasets library's cache: what has been checked once is not walked through again."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any


class Marker:
    """A file that says that something, of which `facts` (JSON) are all that matters, was found good."""

    def __init__(self, facts: Any) -> None:
        from datasets import config

        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
        self.path = Path(config.HF_DATASETS_CACHE) / "amvl_fast" / f"{key}.checked"
        self._facts = facts

    def is_set(self) -> bool:
        return self.path.is_file()

    def set(self) -> None:
        """Written whole or not at all; where the cache cannot be written to, the check runs again next time."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, suffix=".unfinished", delete=False) as aside:
                json.dump(self._facts, aside)
            os.replace(aside.name, self.path)
        except OSError:
            pass
