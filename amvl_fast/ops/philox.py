"""Counter-based Gaussian noise in plain PyTorch: the definition that every kernel reproduces.

Philox 4x32 with 10 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011). The key is
the 64-bit seed; the counter is (column // 4, row's low half, row's high half, stream), where the row is the
flattened leading index, or what `row_numbers` makes of the numbers of samples. Each counter yields four 32-bit
words and, by Box-Muller, the normals of four neighbouring columns. So a normal depends on (seed, stream, row,
column) and on nothing else: not on the shape around it, the device, the block size or the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox4x32(counter: Sequence[Tensor], key: Sequence[Tensor], rounds: int = 10) -> list[Tensor]:
    """Four 32-bit words for each counter.

    Args:
        counter: four int64 tensors with values in [0, 2**32), broadcastable to each other and to the key.
        key: two such tensors.
        rounds: 10 is the published choice.

    Returns:
        Four int64 tensors with values in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # int64 products wrap, but shifted and masked their upper half is that of the unsigned product.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> 32 & _MASK) ^ c1 ^ k0,
            product1 & _MASK,
            (product0 >> 32 & _MASK) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = k0 + _KEY_STEPS[0] & _MASK, k1 + _KEY_STEPS[1] & _MASK
    return [c0, c1, c2, c3]


def box_muller(words: Sequence[Tensor]) -> Tensor:
    """Four normals from four words, `[...]` int64 each to `[..., 4]` float32.

    A radius comes from words 0 and 2 as sqrt(-2 ln u) with u = (word + 1/2) / 2**32, which is never 0 and
    lets normals reach 6.77; an angle of 2 pi word / 2**32 from words 1 and 3. In float64, rounded at the end.
    """
    scale = 2.0**-32
    radius = [torch.sqrt(-2.0 * torch.log((w.double() + 0.5) * scale)) for w in (words[0], words[2])]
    angle = [w.double() * (2.0 * math.pi * scale) for w in (words[1], words[3])]
    normals = [f(a) * r for r, a in zip(radius, angle, strict=True) for f in (torch.cos, torch.sin)]
    return torch.stack(normals, dim=-1).float()


def row_numbers(shape: Sequence[int], sample_ids: Tensor | None, device: torch.device) -> Tensor:
    """What the rows of a `[..., d]` tensor enter the counter as: an int64 tensor of as many.

    Row r as r, or, with `sample_ids` `[shape[0]]` and m rows in each sample, as `sample_ids[r // m] * m + r % m`
    modulo 2**64: what a tensor of all samples, in the order of their numbers, has for that row.
    """
    if sample_ids is None:
        return torch.arange(math.prod(shape[:-1]), device=device)
    rows = math.prod(shape[1:-1])
    return (sample_ids[:, None] * rows + torch.arange(rows, device=device)).flatten()


def philox_words(row: Tensor, columns: int, seed: Tensor, *, stream: int = 0) -> list[Tensor]:
    """The words behind a block of noise: four `[rows, ceil(columns / 4)]` int64 tensors.

    Args:
        row: the numbers of the block's rows, `[rows]` int64, all 64 bits of them used.
        columns: the width of the block.
        seed: one-element int64 tensor; the block is made on its device, and the host never reads its value.
        stream: number of an independent sequence for the same seed, in [0, 2**32).
    """
    seed, row = seed.reshape(1, 1), row[:, None]
    group = torch.arange((columns + 3) // 4, device=seed.device)[None, :]
    counter = [group, row & _MASK, row >> 32 & _MASK, torch.full_like(seed, stream)]
    return [w.expand(row.shape[0], -1) for w in philox4x32(counter, [seed & _MASK, seed >> 32 & _MASK])]


def philox_normal(shape: Sequence[int], seed: Tensor, *, stream: int = 0, sample_ids: Tensor | None = None) -> Tensor:
    """Standard normals of the given shape (at least one dimension), float32, on the seed's device."""
    columns = shape[-1]
    normals = box_muller(philox_words(row_numbers(shape, sample_ids, seed.device), columns, seed, stream=stream))
    return normals.flatten(-2)[:, :columns].reshape(tuple(shape))
