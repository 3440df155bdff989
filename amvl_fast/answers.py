"""The answer's negative log-likelihood, from its own rows alone."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# How many logits exist at once: 64 MiB in float32, little beside a step and much beside what a launch costs.
CHUNK = 2**24

# The first whose gradients are right where each token's loss has a weight of its own.
LIGER = Version("0.8.5")


def token_nll(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """Nats of each token, ``(rows,)``, in float32 or wider.

    Logits are made for some rows at a time, and again in the backward pass: kept, with a vocabulary of 152k, they would
    be most of what a step keeps. On CUDA, Liger's fused kernel does so where it is installed.

    Args:
        head: hidden states ``(rows, hidden_size)`` -> logits ``(rows, vocabulary)``.
        hidden: ``(rows, hidden_size)``, the states that predict the targets.
        targets: ``(rows,)`` int64.
    """
    if hidden.is_cuda and is_plain(head, hidden.device) and fused_nll() is not None:
        return fused_nll()(head.weight, hidden, targets, head.bias)

    def nll(hidden: Tensor, targets: Tensor) -> Tensor:
        scores = head(hidden)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return nn.functional.cross_entropy(scores, targets, reduction="none")

    rows = max(1, CHUNK // getattr(head, "out_features", CHUNK))
    return torch.cat(
        [
            checkpoint(nll, some, wanted, use_reentrant=False, preserve_rng_state=False)
            for some, wanted in zip(hidden.split(rows), targets.split(rows), strict=True)
        ]
    )


def is_plain(head: nn.Module, device: torch.device) -> bool:
    """Whether a head is its weight and nothing else, and the weight is here: no adapter, no offloading."""
    hooks = (head._forward_hooks, head._forward_pre_hooks, hasattr(head, "_hf_hook"))
    return type(head) is nn.Linear and head.weight.device == device and not any(hooks)


@cache
def fused_nll() -> Any:
    """Liger's linear layer and cross-entropy in one, ``(weight, hidden, targets, bias) -> nats``, or None."""
    try:
        if Version(version("liger-kernel")) < LIGER:
            return None
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except (PackageNotFoundError, ImportError):
        return None
    return LigerFusedLinearCrossEntropyLoss(reduction="none")
