"""Kernel and launcher of `gaussian_noise`."""

import triton
import triton.language as tl
from torch import Tensor

from .blocks import block_mask, block_rows, block_start, row_number, store
from .layout import on_device_of, plan
from .philox import philox_normal


@triton.jit(do_not_specialize=["sample_rows", "stream", "rows"], do_not_specialize_on_alignment=["sample_ids"])
def gaussian_noise_kernel(
    out,
    seed,
    sample_ids,
    sample_rows,
    stream,
    rows,
    COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr,  # this and PARTS only because every launch has them
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):
    row = block_rows(BLOCK_ROWS, WIDTH)
    number = row_number(row, rows, sample_ids, sample_rows, WIDTH)
    start = block_start(COLUMNS, BLOCK_COLUMNS)
    mask = block_mask(row, rows, start, COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS)
    noise = philox_normal(tl.load(seed), stream, number, start, BLOCK_ROWS, BLOCK_COLUMNS)
    store(out, row, start, noise, mask, COLUMNS, WIDTH)


def gaussian_noise(out: Tensor, seed: Tensor, sample_ids: Tensor | None, stream: int) -> None:
    """Fill `out`, `[..., d]` float32 and contiguous, with the noise of one seed and stream."""
    if out.numel() == 0:
        return
    launch = plan([], [out])
    with on_device_of(out):
        gaussian_noise_kernel[launch.grid](
            out, seed, *launch.samples(sample_ids), stream, launch.rows.rows, **launch.options
        )
