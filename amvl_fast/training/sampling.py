"""The order in which rows are trained on: whole steps, the same however these are split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class WholeSteps(Sampler[int]):
    """Rows of one epoch, as many as fill whole steps.

    Left to themselves, PyTorch and accelerate fill an epoch's last batches up, or leave them out, by processes and
    accumulation, so that another split would see other rows.

    Args:
        rows: how many there are.
        samples: of one step, over accumulation and processes.
        seed: of the order, with the epoch; None leaves rows in order.
        lengths: where given, rows of like lengths come together, within fifty steps.
        drop_last: leave out what does not fill a step; else the epoch's first rows fill it up.
    """

    def __init__(
        self,
        rows: int,
        samples: int,
        *,
        seed: int | None,
        lengths: Sequence[int] | None = None,
        drop_last: bool = False,
    ) -> None:
        self.rows, self.samples, self.seed, self.lengths, self.epoch = rows, samples, seed, lengths, 0
        # Fewer rows than a step has are repeated in any case.
        self.steps = rows // samples if drop_last and rows >= samples else -(-rows // samples)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps * self.samples

    def __iter__(self) -> Iterator[int]:
        order = self._order()
        for position in range(len(self)):
            yield order[position % self.rows]

    def _order(self) -> Sequence[int]:
        if self.seed is None:
            return range(self.rows)
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.lengths is None:
            return torch.randperm(self.rows, generator=generator).tolist()
        return get_length_grouped_indices(self.lengths, self.samples, generator=generator)
