"""What a chat row must look like: the checks that need no image."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from amvl_fast.errors import AMVLError

ROLES = ("system", "user", "assistant", "tool")


def parts_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The content of a message as a list of parts, whether it was written as a string or as parts."""
    content = message.get("content", "")
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def text_of(message: dict[str, Any]) -> str:
    """The text parts of a message, joined."""
    return "".join(part.get("text") or "" for part in parts_of(message))


def check_row(row: dict[str, Any], where: str) -> None:
    """Check that a row, freed of nulls, is a prompt, its images and an answer that the prompt does not hold.

    Args:
        row: ``{"messages": [...], "images": [image, ...]}``; ``images`` may be absent. An image is a path, the bytes
            of an image file, or ``{"bytes": ..., "path": ...}`` with either.
        where: the words that name the row in a message, such as ``"row 17 (counted from 0) of train.jsonl"``.

    Raises:
        AMVLError: the first thing that is wrong, where, and what to do.
    """
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise AMVLError(f"There are no messages in {where}: write a user message and the assistant's answer.")
    for message in messages:
        _check_message(message, where)
    answer = text_of(messages[-1]).strip()
    if messages[-1]["role"] != "assistant" or not answer:
        raise AMVLError(
            f"There is no answer in {where}: end its messages with an assistant message that has text, "
            "or remove the row."
        )
    if any(part["type"] != "text" for part in parts_of(messages[-1])):
        raise AMVLError(f"The answer in {where} holds an image: answer with text only.")
    if not any(message["role"] == "user" for message in messages[:-1]):
        raise AMVLError(f"There is no question in {where}: put a user message before the answer.")
    images = row.get("images", [])
    if not isinstance(images, list) or any(image_source(image) is None for image in images):
        raise AMVLError(f"The images of {where} are not a list of paths or bytes: list the paths of image files.")
    slots = sum(part["type"] == "image" for message in messages for part in parts_of(message))
    if slots != len(images):
        raise AMVLError(
            f"The messages of {where} have {_count(slots, 'image part')} for {_count(len(images), 'image')}: "
            'write one {"type": "image"} part for each image.'
        )
    if _holds_answer(messages[:-1], answer):
        raise AMVLError(
            f"The prompt of {where} already holds the answer {answer!r}: remove it from the prompt, "
            "or the model learns to copy it."
        )


def image_source(image: Any) -> str | bytes | None:
    """The path or the bytes of an image of a row; None where it is neither."""
    if isinstance(image, dict):  # as the datasets library stores them: the path of bytes is a mere name
        content = image.get("bytes")
        image = image.get("path") if content is None else content if isinstance(content, bytes) else None
    return image if isinstance(image, str | bytes) else None


def check_special(row: dict[str, Any], where: str, tokens: Iterable[str]) -> None:
    """Check that no text of a row that `check_row` passed holds one of the tokenizer's special tokens.

    Raises:
        AMVLError: one does.
    """
    for text in map(text_of, row["messages"]):
        for token in tokens:
            if token in text:
                raise AMVLError(
                    f"A message in {where} holds the special token {token!r}, which the tokenizer would read as a "
                    "control token: remove it from the text."
                )


def _check_message(message: Any, where: str) -> None:
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ROLES:
        raise AMVLError(f"A message in {where} has the role {role!r}: use one of {', '.join(ROLES)}.")
    parts = parts_of(message)
    for part in parts if isinstance(parts, list) else [parts]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "image") or not isinstance(part.get("text", ""), str):
            raise AMVLError(
                f"A message in {where} has content that is neither text nor image: write a string, or a list "
                'of {"type": "text", "text": ...} and {"type": "image"} parts.'
            )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _holds_answer(prompt: list[dict[str, Any]], answer: str) -> bool:
    """Whether an earlier turn already gave it to the same question, or a message ends in "answer: ...".

    Naming the answer is not enough: "is it red or blue?" is a fair question about something blue, and a chat may hold
    two questions whose answer is "yes".
    """
    users = [message for message in prompt if message["role"] == "user"]
    question = text_of(users[-1])
    asked = None
    for message in prompt:
        if message["role"] == "user":
            asked = text_of(message)
        elif message["role"] == "assistant" and text_of(message).strip().casefold() == answer.casefold():
            if asked is None or asked.strip().casefold() == question.strip().casefold():
                return True
    if not any(answer.casefold() in text_of(message).casefold() for message in prompt):
        return False  # which is quicker told than by a pattern of its own for each answer
    given = rf"\banswer(?:\s+is\b\s*:?|\s*:)\s*\W?{re.escape(answer)}\W*$"
    return any(re.search(given, text_of(message), re.IGNORECASE) for message in prompt)
