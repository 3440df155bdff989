"""Kernel and launcher of `gaussian_noise`."""

import math

import triton
import triton.language as tl
from torch import Tensor

from .layout import block_for, on_device_of
from .philox import philox_normal


@triton.jit(do_not_specialize=["stream", "rows"])
def gaussian_noise_kernel(
    out, seed, stream, rows, columns: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    # int64 before any multiplication: rows * columns may pass 2**31.
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    seed = tl.load(seed)
    for start in range(0, columns, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        noise = philox_normal(seed, stream, row, start, BLOCK_ROWS, BLOCK_COLUMNS)
        tl.store(out + row[:, None] * columns + column[None, :], noise, mask=mask)


def gaussian_noise(out: Tensor, seed: Tensor, stream: int) -> None:
    """Fill `out`, `[..., d]` float32 and contiguous, with the noise of one seed and stream."""
    if out.numel() == 0:
        return
    columns = out.shape[-1]
    rows = math.prod(out.shape[:-1])
    block = block_for(columns)
    with on_device_of(out):
        gaussian_noise_kernel[(triton.cdiv(rows, block.rows),)](
            out, seed, stream, rows, columns, block.rows, block.columns, num_warps=block.warps
        )
