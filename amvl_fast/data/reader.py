"""From a record of any form to the item that the collator takes."""

from __future__ import annotations

import os
from typing import Any

from PIL import Image

from amvl_fast.data.images import UNREADABLE, confined, peek_image, read_image
from amvl_fast.data.monet import VISUAL_THOUGHTS, monet_row
from amvl_fast.data.rows import check_row, check_special, image_source, text_of
from amvl_fast.errors import AMVLError

# Of what `check` looks at. Raise it when it becomes stricter, so that data checked before are checked again.
CHECKER_VERSION = 1


class Reader:
    """Reads records of one source.

    Args:
        root: what image paths are relative to and may not leave; None where there may be no paths.
        visual_thoughts: see `amvl_fast.data.monet.monet_row`.
    """

    def __init__(self, root: str | os.PathLike[str] | None, visual_thoughts: str = "drop") -> None:
        if visual_thoughts not in VISUAL_THOUGHTS:
            raise AMVLError(f"visual_thoughts is {visual_thoughts!r}: use one of {', '.join(VISUAL_THOUGHTS)}.")
        self.root = root
        self.visual_thoughts = visual_thoughts

    def chat(self, record: dict[str, Any], where: str) -> dict[str, Any]:
        """The record as a chat row without nulls, unchecked.

        Raises:
            AMVLError: it is of another form.
        """
        if "messages" not in record and "data" not in record:
            columns = ", ".join(sorted(record))
            raise AMVLError(
                f"There is neither a column `messages` nor `data` in {where} (it has {columns}): "
                'write rows of the form {"messages": [...], "images": [...]}.'
            )
        if record.get("messages") is None and record.get("data") is not None:
            record = monet_row(without_nulls(record), self.visual_thoughts, where)
        return {
            name: without_nulls(value)
            for name, value in record.items()
            if value is not None or name not in CHAT_COLUMNS
        }

    def check(self, row: dict[str, Any], where: str, special_tokens: tuple[str, ...]) -> None:
        """Check a chat row but for its images; raises AMVLError."""
        check_row(row, where)
        check_special(row, where, special_tokens)

    def item(self, record: dict[str, Any], where: str, number: int, special_tokens: tuple[str, ...]) -> dict[str, Any]:
        """A checked row with its images decoded, its answer, and its number.

        Raises:
            AMVLError: the first thing that is wrong with it.
        """
        row = self.chat(record, where)
        self.check(row, where, special_tokens)
        images = [self.image(image, where) for image in row.get("images", ())]
        return row | {"images": images, "answer": text_of(row["messages"][-1]), "row": number}

    def image(self, image: Any, where: str, *, header_only: bool = False) -> Image.Image | None:
        """An image of a checked row as RGB, or, of its header alone, a look without a result.

        Raises:
            AMVLError: it cannot be read, and why.
        """
        source = image_source(image)
        try:
            assert source is not None  # `check_row` has seen to it
            if header_only:
                peek_image(source, self.root)
                return None
            return read_image(source, self.root)
        except UNREADABLE as error:
            raise self._bad_image(source, where, error) from error

    def _bad_image(self, source: Any, where: str, error: Exception) -> AMVLError:
        try:
            name = confined(source, self.root) if isinstance(source, str) else "of bytes"
        except ValueError as refusal:  # as it was written, for it means no file
            return AMVLError(f"Image {source} of {where} is refused ({refusal}): write a path below `image_root`.")
        if isinstance(error, FileNotFoundError):
            problem, advice = "does not exist", "put it there, or correct its path or `image_root`"
        else:
            reason = " ".join(str(error).split()) or type(error).__name__
            problem, advice = f"cannot be read ({reason})", "replace the file, or remove the row"
        return AMVLError(f"Image {name} of {where} {problem}: {advice}.")


CHAT_COLUMNS = ("messages", "images", "data")


def without_nulls(value: Any) -> Any:
    """Drop keys whose value is None: Parquet gives every part the keys of all parts."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
