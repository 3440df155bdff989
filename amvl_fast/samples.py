"""Prompt and answer, read off Hugging Face labels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from amvl_fast.errors import AMVLError

IGNORE = -100


class Samples(NamedTuple):
    """A batch as the decoder reads it, still with its padding (on either side).

    Attributes:
        embeds: ``(batch, length, hidden_size)``, images in place.
        positions: ``(axes, batch, length)``, rotary positions; only the prompt's are used.
        prompt: ``(batch, length)`` bool, the rows of `x`.
        answer: ``(batch, length)`` bool, the rows of `y`.
        labels: ``(batch, length)`` int64, token ids on `answer`, -100 elsewhere.
    """

    embeds: Tensor
    positions: Tensor
    prompt: Tensor
    answer: Tensor
    labels: Tensor


class AnswerNLL(NamedTuple):
    """What decoding the answer cost: per sample, so that any batch of samples can be averaged correctly.

    Attributes:
        total: ``(batch,)`` float32, negative log-likelihood summed over the answer's tokens, in nats.
        tokens: ``(batch,)`` int64, the number of answer tokens.
    """

    total: Tensor
    tokens: Tensor

    def mean(self) -> Tensor:
        """Nats per answer token over the batch, the loss that transformers' models report."""
        return self.total.sum() / self.tokens.sum()


def split_prompt_and_answer(labels: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Boolean masks ``(batch, length)`` of prompt and answer.

    The answer is the labelled rows, the prompt every attended row before them; attended rows after the answer
    (such as a template's closing newline) belong to neither.

    Raises:
        AMVLError: a row has no labelled token, no prompt before it, labels on padding, or labels in several pieces.
    """
    attended = attention_mask.bool()
    answer = labels != IGNORE
    started = answer.cumsum(-1) > 0
    prompt = attended & ~started
    pieces = (answer[:, 1:] & ~answer[:, :-1]).sum(-1) + answer[:, 0]
    for bad, what, todo in (
        (~answer.any(-1), "no answer: every label is -100", "label the answer's tokens with their ids"),
        (
            ~prompt.any(-1),
            "no prompt: the labels begin at the first token",
            "set the prompt's labels to -100",
        ),
        ((answer & ~attended).any(-1), "labels on padding", "set the labels of padding to -100"),
        (pieces > 1, "labels in several pieces", "give one contiguous answer per row"),
    ):
        if bad.any():
            raise AMVLError(f"Row {int(bad.int().argmax())} of the batch has {what}; {todo}.")
    return prompt, answer


def require_finite(**tensors: Tensor | None) -> None:
    """Refuse NaN and infinity in floating-point inputs.

    Only tensors on the CPU are looked at: asking a GPU would stall it at every step.

    Raises:
        AMVLError: naming the input.
    """
    for name, tensor in tensors.items():
        if tensor is None or tensor.device.type != "cpu" or not tensor.is_floating_point():
            continue
        if not torch.isfinite(tensor).all():
            raise AMVLError(f"The input {name} holds NaN or infinity; check the images and their preprocessing.")
