"""The answer's negative log-likelihood, from its own rows alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# How many logits exist at once: 64 MiB in float32, little beside a step and much beside what a launch costs.
CHUNK = 2**24


def token_nll(logits: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, vocabulary: int) -> Tensor:
    """Nats of each token, ``(rows,)``, in float32 or wider.

    Logits are made for some rows at a time, and again in the backward pass: kept, with a vocabulary of 152k, they would
    be most of what a step keeps.

    Args:
        logits: hidden states ``(rows, hidden_size)`` -> ``(rows, vocabulary)``.
        hidden: ``(rows, hidden_size)``, the states that predict the targets.
        targets: ``(rows,)`` int64.
        vocabulary: how many logits a row has.
    """

    def nll(hidden: Tensor, targets: Tensor) -> Tensor:
        scores = logits(hidden)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return nn.functional.cross_entropy(scores, targets, reduction="none")

    rows = max(1, CHUNK // vocabulary)
    return torch.cat(
        [
            checkpoint(nll, some, wanted, use_reentrant=False, preserve_rng_state=False)
            for some, wanted in zip(hidden.split(rows), targets.split(rows), strict=True)
        ]
    )
