"""The sentence of an error that has come from a worker of a DataLoader."""

from __future__ import annotations

import re

RAISED = re.compile(r"^(?:\w+\.)*AMVLError: (.+)$", re.MULTILINE)


def sentence(error: BaseException) -> str:
    """The message of an AMVLError as it was raised, also where a worker's traceback has been put around it."""
    text = str(error)
    raised = RAISED.findall(text) if text.startswith("Caught AMVLError in ") else []
    return raised[-1] if raised else text
