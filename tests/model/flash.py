"""flash-attn's two functions as its documentation describes them, in plain PyTorch, and a way to put them in place.

https://github.com/Dao-AILab/flash-attention: tensors are (rows, heads, head_dim), key and value may have fewer heads,
a causal mask and a window are aligned to the bottom right corner.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import modeling_flash_attention_utils as utils


class StandIn:
    """Counts its calls, so that nobody tests another attention by mistake."""

    def __init__(self) -> None:
        self.calls = {"dense": 0, "varlen": 0}

    def flash_attn_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        deterministic: bool = False,
    ) -> Tensor:
        self.calls["dense"] += 1
        options = (dropout_p, softmax_scale, causal, window_size, softcap)
        return torch.stack([attend(*qkv, *options) for qkv in zip(q, k, v, strict=True)])

    def flash_attn_varlen_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        deterministic: bool = False,
    ) -> Tensor:
        self.calls["varlen"] += 1
        assert q.dim() == k.dim() == v.dim() == 3 and k.shape == v.shape
        for ends, rows, longest in ((cu_seqlens_q, q, max_seqlen_q), (cu_seqlens_k, k, max_seqlen_k)):
            assert ends.dtype == torch.int32 and ends[0] == 0 and ends[-1] == len(rows)
            assert ends.diff().min() > 0 and type(longest) is int and ends.diff().max() <= longest
        sequences = zip(
            q.split(cu_seqlens_q.diff().tolist()),
            k.split(cu_seqlens_k.diff().tolist()),
            v.split(cu_seqlens_k.diff().tolist()),
            strict=True,
        )
        return torch.cat([attend(*s, dropout_p, softmax_scale, causal, window_size, softcap) for s in sequences])


def attend(
    q: Tensor, k: Tensor, v: Tensor, dropout: float, scale: Any, causal: bool, window: tuple[int, int], softcap: float
) -> Tensor:
    """One sequence."""
    assert dropout == 0 and softcap == 0
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    behind = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
    hidden = torch.zeros_like(behind, dtype=torch.bool)
    if causal:
        hidden |= behind < 0
    if window[0] >= 0:
        hidden |= behind > window[0]
    if window[1] >= 0:
        hidden |= -behind > window[1]
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def use_flash(monkeypatch: Any, model: Any) -> StandIn:
    """Run the model's decoder through transformers' FlashAttention-2 code and the stand-in."""
    stand_in = StandIn()
    functions = (stand_in.flash_attn_func, stand_in.flash_attn_varlen_func, None, utils._pad_input, utils._unpad_input)
    monkeypatch.setattr(utils, "_lazy_imports", lambda *_, **__: functions)
    monkeypatch.setattr(utils, "_loaded_implementation", None)
    # set_attn_implementation asks for the package itself.
    model.adapter.decoder.config._attn_implementation_internal = "flash_attention_2"
    return stand_in


def use_attention(monkeypatch: Any, model: Any, name: str) -> None:
    """Any attention by its name; flash attention through the stand-in."""
    if name == "flash_attention_2":
        use_flash(monkeypatch, model)
    else:
        model.backbone.set_attn_implementation(name)
