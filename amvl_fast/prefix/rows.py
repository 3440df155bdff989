"""Where the rows of branches lie, and which keys each may read."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from amvl_fast.errors import AMVLError


class Prompts(NamedTuple):
    """Where prompts lie among the rows that ran, `(batch, rows)` flattened.

    Attributes:
        starts, lengths: ``(batch,)`` int64 each.
        longest: rows of the longest.
        rows: as many, or those of all where they are packed.
        packed: whether all prompts lie in one row, one behind the other.
    """

    starts: Tensor
    lengths: Tensor
    longest: int
    rows: int
    packed: bool

    def sequences(self) -> dict[str, Any]:
        """What flash attention has to be told of packed prompts; nothing of others."""
        if not self.packed:
            return {}
        ends = offsets(self.lengths).int()
        return dict(cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=self.longest, max_length_k=self.longest)


def lay_out(mask: Tensor, *, packed: bool) -> tuple[Prompts, Tensor]:
    """Where prompts are to lie, and there the numbers of their rows among ``(batch, length)``, flattened.

    Padding goes to the right, where nobody reads it, and no mask is needed: attention is causal, and branches mask it.

    Args:
        mask: ``(batch, length)`` bool, True on the rows of prompts, wherever they are.
        packed: all into one row, without padding.

    Raises:
        AMVLError: a prompt is empty.
    """
    lengths = mask.sum(1)
    shortest, longest = torch.stack(lengths.aminmax()).tolist()
    if shortest == 0:
        raise AMVLError(f"Row {int(lengths.argmin())} of the batch has no prompt; give each at least one token.")
    batch = torch.arange(len(mask), device=mask.device)
    if packed:
        index = mask.flatten().nonzero().squeeze(1)[None]
        return Prompts(offsets(lengths)[:-1], lengths, longest, index.shape[1], packed), index
    order = (~mask).to(torch.int8).argsort(dim=1, stable=True)[:, :longest]
    return Prompts(longest * batch, lengths, longest, longest, packed), order + mask.shape[1] * batch[:, None]


class BranchRows:
    """Branches of a batch side by side: rows that read their prompt and the earlier rows of their own branch.

    Args:
        masks: for each branch ``(batch, rows)`` bool, False on padding, which may be anywhere.
        prompts: what they continue.
    """

    def __init__(self, masks: list[Tensor], prompts: Prompts) -> None:
        self.prompts = prompts
        self.branches = len(masks)
        self.valid = torch.cat(masks, dim=1)
        # Of each row the place in its branch; its place in the whole sequence comes after the prompt.
        self.order = torch.cat([mask.cumsum(1) - 1 for mask in masks], dim=1)
        sizes = torch.tensor([mask.shape[1] for mask in masks], device=self.valid.device)
        self.branch = torch.arange(self.branches, device=self.valid.device).repeat_interleave(
            sizes, output_size=self.valid.shape[1]
        )

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """What is added to scores, ``(batch, 1, rows, prompt rows + rows)``: 0 or the dtype's lowest number."""
        allowed = self.allowed(window)[:, None]
        return torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min)

    def block_mask(self, window: int | None) -> BlockMask:
        """The mask as flex attention takes it."""
        allowed = self.allowed(window)
        batch, rows, keys = allowed.shape
        # It is asked about whole blocks, beyond the last row and key, too.
        size = 128
        padded = nn.functional.pad(allowed, (0, -keys % size, 0, -rows % size))
        return create_block_mask(
            lambda b, _, q, k: padded[b, q, k], batch, None, rows, keys, device=str(allowed.device), BLOCK_SIZE=size
        )

    def allowed(self, window: int | None) -> Tensor:
        """Which keys each row reads, ``(batch, rows, prompt rows + rows)`` bool.

        Args:
            window: how many rows back a row may look, itself included; None for all.
        """
        batch, rows = self.valid.shape
        lengths = self.prompts.lengths[:, None, None]
        place = torch.arange(self.prompts.rows, device=self.valid.device).expand(batch, 1, -1)
        of_prompt = (place < lengths).expand(-1, rows, -1)
        query, key = self.order[:, :, None], self.order[:, None, :]
        own = (self.branch[:, None] == self.branch) & (key <= query) & self.valid[:, None, :]
        if window is not None:
            of_prompt = of_prompt & (lengths + query - place < window)
            own = own & (query - key < window)
        # Padding reads itself, for a softmax over nothing would be NaN.
        own = own | torch.eye(rows, dtype=torch.bool, device=self.valid.device)
        return torch.cat([of_prompt, own], dim=2)

    @cached_property
    def packed(self) -> PackedRows:
        """The rows without padding, for attention over sequences of several lengths."""
        batch, device = len(self.valid), self.valid.device
        counts = torch.zeros(batch, self.branches, dtype=torch.int64, device=device)
        counts.scatter_add_(1, self.branch.expand(batch, -1), self.valid.long())
        queries = counts.flatten()
        prompt = self.prompts.lengths.repeat_interleave(self.branches)
        keys = queries + prompt
        ends_q, ends_k = (offsets(lengths) for lengths in (queries, keys))
        sequence = torch.arange(len(keys), device=device).repeat_interleave(keys)
        place = torch.arange(len(sequence), device=device) - ends_k[sequence]
        starts = self.prompts.starts.repeat_interleave(self.branches)[sequence]
        all_prompts = self.prompts.rows * (1 if self.prompts.packed else batch)
        own = all_prompts + ends_q[sequence] + place - prompt[sequence]
        longest_q, longest_k = torch.stack([queries.max(), keys.max()]).tolist()
        return PackedRows(
            rows=self.valid.flatten().nonzero().squeeze(1),
            keys=torch.where(place < prompt[sequence], starts + place, own),
            lengths={
                "cu_seq_lens_q": ends_q.int(),
                "cu_seq_lens_k": ends_k.int(),
                "max_length_q": longest_q,
                "max_length_k": longest_k,
            },
        )


class PackedRows(NamedTuple):
    """Branches as sequences one behind the other.

    Attributes:
        rows: ``(n,)`` int64, which rows of ``(batch, rows)``, flattened, are no padding.
        keys: ``(m,)`` int64, for all sequences the keys they read: of prompts, flattened, then of the rows themselves.
        lengths: as `transformers`' flash attention takes them.
    """

    rows: Tensor
    keys: Tensor
    lengths: dict[str, Any]


def offsets(lengths: Tensor) -> Tensor:
    """Where each of several sequences begins, and where the last ends: one more than there are lengths."""
    return nn.functional.pad(lengths.cumsum(0), (1, 0))
