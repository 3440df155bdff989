"""Attention in which branches read the keys and values of prompts that ran before them.

It rests on transformers' `AttentionInterface`: what a decoder is called with beyond its own arguments reaches the
attention function of every layer, and so does a `prefix=` of ours, which records or reads. Without one an attention
function does what it did. No model file is patched, and the backbone's own attention computes everything.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from amvl_fast.errors import AMVLError

# Eager attention has no entry in the interface, so a decoder that uses it gets one under a name of our own.
EAGER = "amvl_fast_eager"
DENSE = ("sdpa", "flex_attention", EAGER)

Attention = Callable[..., tuple[Tensor, Any]]


class InAttention(Protocol):
    """What a layer's attention does with prefixes."""

    def attend(
        self,
        attention: Attention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        """Call `attention`, maybe with other keys; query, key and value are ``(batch, heads, rows, head_dim)``."""


def taking_prefix(attention: Attention) -> Attention:
    """An attention function that hands its work to `prefix`, if it gets one."""

    @wraps(attention)
    def attend(*args: Any, prefix: InAttention | None = None, **kwargs: Any) -> tuple[Tensor, Any]:
        if prefix is None:
            return attention(*args, **kwargs)
        return prefix.attend(attention, *args, **kwargs)

    attend.takes_prefix = True  # type: ignore[attr-defined]
    return attend


def eager_attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
    """The eager attention that stands in a module's own file, as transformers has it throughout."""
    for kind in type(module).__mro__:
        function = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
        if function is not None:
            return function(module, *args, **kwargs)
    raise AMVLError(f"{type(module).__name__} has no eager attention to be found; use attn_implementation='sdpa'.")


AttentionInterface.register(EAGER, taking_prefix(eager_attention))
AttentionMaskInterface.register(EAGER, eager_mask)


def is_flash(name: str) -> bool:
    """Whether an attention takes sequences of several lengths and no mask."""
    return name.startswith("flash_attention") or "flash-attn" in name  # or one of the hub's kernels


def take_prefix(decoder: PreTrainedModel) -> str:
    """Make the attention that a decoder uses take `prefix`; returns its name.

    Raises:
        AMVLError: for an attention of which nobody knows whether it takes a mask or sequences of several lengths.
    """
    name = str(decoder.config._attn_implementation)
    if name == "eager":
        decoder.set_attn_implementation(EAGER)
        return EAGER
    if name not in DENSE and not is_flash(name):
        raise AMVLError(
            f"shared_prefix cannot use attn_implementation={name!r}; use 'sdpa', 'eager', 'flex_attention' or a flash "
            "attention, or execution='three_pass'."
        )
    attention = ALL_ATTENTION_FUNCTIONS[name]
    if not hasattr(attention, "takes_prefix"):
        ALL_ATTENTION_FUNCTIONS[name] = taking_prefix(attention)  # comes before what others register
    return name
