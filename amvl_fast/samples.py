"""Prompt and answer, read off Hugging Face labels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from amvl_fast.errors import AMVLError
from amvl_fast.latents import Gaussian

IGNORE = -100

# Of the noise: one seed makes independent samples of both.
POSTERIOR_STREAM, PRIOR_STREAM = 0, 1


class Samples(NamedTuple):
    """A batch as the decoder reads it, still with its padding (on either side).

    Attributes:
        embeds: ``(batch, length, hidden_size)``, images in place.
        extras: whatever else the backbone's decoder takes for each row, by name, ``(batch, length, ...)``.
        positions: ``(axes, batch, length)``, rotary positions; only the prompt's are used.
        prompt: ``(batch, length)`` bool, the rows of `x`.
        answer: ``(batch, length)`` bool, the rows of `y`.
        labels: ``(batch, length)`` int64, token ids on `answer`, -100 elsewhere.
    """

    embeds: Tensor
    extras: dict[str, Tensor]
    positions: Tensor
    prompt: Tensor
    answer: Tensor
    labels: Tensor


class Rows(NamedTuple):
    """Rows of one sample, unpadded.

    Attributes:
        embeds: ``(rows, hidden_size)``.
        extras: as in `Samples`, ``(rows, ...)`` each.
        positions: ``(axes, rows)``.
    """

    embeds: Tensor
    extras: dict[str, Tensor]
    positions: Tensor


def with_prompt(samples: Samples, rows: Sequence[Tensor]) -> list[Rows]:
    """Each sample's prompt, followed by its own `rows` of embeddings, ``(n, hidden_size)``.

    Rows after the prompt take the text positions that follow the prompt's largest, whatever the rotary scheme.
    """
    whole = []
    for i, extra in enumerate(rows):
        mask = samples.prompt[i]
        before = samples.positions[:, i, mask]
        after = before.max() + 1 + torch.arange(len(extra), device=extra.device)
        extras = {name: value[i, mask] for name, value in samples.extras.items()}
        whole.append(
            Rows(
                embeds=torch.cat([samples.embeds[i, mask], extra]),
                extras={n: torch.cat([v, v.new_zeros(len(extra), *v.shape[1:])]) for n, v in extras.items()},
                positions=torch.cat([before, after.expand(len(before), -1)], dim=1),
            )
        )
    return whole


def pad_rows(rows: Sequence[Rows], side: str) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """A batch of unpadded rows: embeddings, attention mask, positions and extras, as adapters take them."""
    pad = partial(pad_sequence, batch_first=True, padding_side=side)
    return (
        pad([row.embeds for row in rows]),
        pad([torch.ones(len(row.embeds), dtype=torch.long, device=row.embeds.device) for row in rows]),
        pad([row.positions.T for row in rows]).permute(2, 0, 1),
        {name: pad([row.extras[name] for row in rows]) for name in rows[0].extras},
    )


class AnswerNLL(NamedTuple):
    """What decoding the answer cost: per sample, so that any batch of samples can be averaged correctly.

    Attributes:
        total: ``(..., batch)`` float32, negative log-likelihood summed over the answer's tokens, in nats.
        tokens: ``(batch,)`` int64, the number of answer tokens.
    """

    total: Tensor
    tokens: Tensor

    def average(self) -> AnswerNLL:
        """Over the first dimension, that of samples."""
        return AnswerNLL(self.total.mean(0), self.tokens)

    def mean(self, tokens: int | Tensor | None = None) -> Tensor:
        """``(...)``: nats per answer token over the batch, the loss that transformers' models report.

        `tokens` is how many there are where the batch is a part of one; None means the batch's own.
        """
        return self.total.sum(-1) / (self.tokens.sum() if tokens is None else tokens)


class Branches(NamedTuple):
    """What one step computes, before it is weighed into a loss.

    Attributes:
        posterior, prior: `Gaussian`, ``(batch, k, d)`` each.
        z: ``(samples, batch, k, d)``, samples of the posterior.
        forward_kl, reverse_kl: ``(batch, k)`` float32: KL(q || p) and KL(p || q), q the posterior, summed over d.
        nll: `AnswerNLL` of the answer decoded from each `z`, ``(samples, batch)``.
        prior_nll: `AnswerNLL` of the answer decoded from a sample of the prior, ``(batch,)``, if that was asked for.
    """

    posterior: Gaussian
    prior: Gaussian
    z: Tensor
    forward_kl: Tensor
    reverse_kl: Tensor
    nll: AnswerNLL
    prior_nll: AnswerNLL | None


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
        # Both always reach the sum, which is quicker than looking at each; it may overflow on its own.
        if not tensor.sum().isfinite() and not tensor.isfinite().all():
            raise AMVLError(f"The input {name} holds NaN or infinity; check the images and their preprocessing.")
