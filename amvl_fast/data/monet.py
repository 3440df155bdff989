"""Records of Monet-SFT-125K (Visual-CoT, ReFocus, CogCoM and Zebra-CoT) as chat rows."""

from __future__ import annotations

import re
from typing import Any

from amvl_fast.errors import AMVLError

VISUAL_THOUGHTS = ("drop", "text")
# Ours: what stands in an answer where a helper image was, with ``visual_thoughts="text"``.
PLACEHOLDER = "\n[visual thought]\n"
# The text before a helper image ends in this mark, most often empty.
THOUGHT = re.compile(r"<abs_vis_token>(.*?)</abs_vis_token>", re.DOTALL)
# Around words that say what a helper image shows. The words are text and stay; stray marks go too.
MARKS = re.compile(r"</?(?:observation|abs_vis_token)>")


def monet_row(record: dict[str, Any], visual_thoughts: str = "drop", where: str = "the record") -> dict[str, Any]:
    """A record as a chat row; the result is not checked, see `amvl_fast.data.rows.check_row`.

    A record is ``{"metadata": ..., "data": [{"role": ..., "content": [part, ...]}, ...]}``, its parts
    ``{"type": "text", "text": ...}`` and ``{"type": "image", "image": path}``. Images of user and system turns are
    those of the row. Images of assistant turns, helper images, are visual thoughts; so are assistant turns right
    before another assistant turn. The last turn is the answer. `visual_thoughts` says what becomes of them:

    - ``"drop"``: nothing of them is left;
    - ``"text"``: such a turn keeps its text, and `PLACEHOLDER` stands where a helper image was.

    The tags ``<abs_vis_token>`` and ``<observation>`` of assistant turns are removed either way, the words
    between the latter kept. Where the record also has ``images``, as samples of tar shards do, the n-th of them is
    that of its n-th image part. Everything but ``data`` stays as it is.

    Raises:
        AMVLError: ``data`` is not a list of turns whose content is a string or a list of parts.
    """
    turns = record.get("data")
    if not isinstance(turns, list) or not all(_is_turn(turn) for turn in turns):
        raise AMVLError(
            f"The `data` of {where} is not a list of turns: write turns of the form "
            '{"role": ..., "content": [{"type": "text", "text": ...}, {"type": "image", "image": ...}]}.'
        )
    messages, images = [], []
    given = iter(record.get("images") or ())
    for turn, following in zip(turns, [*turns[1:], {}], strict=True):
        said = turn["role"] == "assistant"
        parts = []
        for part in _parts(turn):
            if part.get("type") == "image":
                image = next(given, part.get("image"))
                if not said:
                    images.append(image)
                    parts.append({"type": "image"})
                elif visual_thoughts == "text":
                    parts.append({"type": "text", "text": PLACEHOLDER})
            elif said and isinstance(part.get("text"), str):
                parts.append({"type": "text", "text": _without_marks(part["text"], visual_thoughts)})
            else:
                parts.append(part)
        is_thought = said and following.get("role") == "assistant"
        if not (is_thought and (visual_thoughts == "drop" or not parts)):
            messages.append({"role": turn["role"], "content": parts})
    rest = {name: value for name, value in record.items() if name != "data"}
    return rest | {"messages": messages, "images": images}


def _is_turn(turn: Any) -> bool:
    return (
        isinstance(turn, dict)
        and "role" in turn
        and isinstance(turn.get("content"), str | list)
        and all(isinstance(part, dict) for part in _parts(turn))
    )


def _parts(turn: dict[str, Any]) -> list[dict[str, Any]]:
    content = turn["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _without_marks(text: str, visual_thoughts: str) -> str:
    return MARKS.sub("", THOUGHT.sub(r"\1" if visual_thoughts == "text" else "", text))
