"""The one exception for mistakes a user can fix."""

from __future__ import annotations


class AMVLError(ValueError):
    """A user's mistake. The message is one sentence: what is wrong, where, and what to do about it.

    The command line prints the message without a traceback; anything else that escapes is a bug of ours.
    """
