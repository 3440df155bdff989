"""Kernels and launchers of `sample_gaussian`, forward and backward."""

import triton
import triton.language as tl
from torch import Tensor

from .blocks import append, block_mask, block_rows, block_start, load, part, row_number, row_offset, store
from .exponential import exp_half_both_ways
from .layout import on_device_of, plan
from .philox import philox_normal

_NUMBERS = ["sample_rows", "temperature", "stream", "rows"]


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=["mean", "logvar", "sample_ids"])
def sample_gaussian_forward_kernel(
    mean,
    logvar,
    seed,
    sample_ids,
    sample_rows,
    temperature,
    stream,
    z,
    mean_strides,
    logvar_strides,
    rows,
    inner,
    COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):
    row = block_rows(BLOCK_ROWS, WIDTH)
    number = row_number(row, rows, sample_ids, sample_rows, WIDTH)
    mean_offset = row_offset(row, inner, mean_strides, WIDTH)
    logvar_offset = row_offset(row, inner, logvar_strides, WIDTH)
    # Whatever the temperature arrives as: a float64 would drag everything after it along.
    temperature = tl.to_tensor(temperature).to(tl.float32)
    start = block_start(COLUMNS, BLOCK_COLUMNS)
    mask = block_mask(row, rows, start, COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS)
    mean_block = load(mean, mean_offset, start, mean_strides, mask, ALIGN[0], WIDTH)
    logvar_block = load(logvar, logvar_offset, start, logvar_strides, mask, ALIGN[1], WIDTH)
    z_block = None
    for i in tl.static_range(PARTS):
        deviation, _ = exp_half_both_ways(part(logvar_block, i, PARTS))
        noise = philox_normal(tl.load(seed), stream, number, start + 4 * i, BLOCK_ROWS, BLOCK_COLUMNS // PARTS, PARTS)
        value = part(mean_block, i, PARTS) + temperature * deviation * noise
        z_block = append(z_block, value, z.dtype.element_ty)
    store(z, row, start, z_block, mask, COLUMNS, WIDTH)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=["grad_z", "logvar", "sample_ids"])
def sample_gaussian_backward_kernel(
    grad_z,
    logvar,
    seed,
    sample_ids,
    sample_rows,
    temperature,
    stream,
    grad_logvar,
    grad_z_strides,
    logvar_strides,
    rows,
    inner,
    COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):
    row = block_rows(BLOCK_ROWS, WIDTH)
    number = row_number(row, rows, sample_ids, sample_rows, WIDTH)
    grad_z_offset = row_offset(row, inner, grad_z_strides, WIDTH)
    logvar_offset = row_offset(row, inner, logvar_strides, WIDTH)
    temperature = tl.to_tensor(temperature).to(tl.float32)
    start = block_start(COLUMNS, BLOCK_COLUMNS)
    mask = block_mask(row, rows, start, COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS)
    grad_z_block = load(grad_z, grad_z_offset, start, grad_z_strides, mask, ALIGN[0], WIDTH)
    logvar_block = load(logvar, logvar_offset, start, logvar_strides, mask, ALIGN[1], WIDTH)
    grad_block = None
    for i in tl.static_range(PARTS):
        deviation, _ = exp_half_both_ways(part(logvar_block, i, PARTS))
        noise = philox_normal(tl.load(seed), stream, number, start + 4 * i, BLOCK_ROWS, BLOCK_COLUMNS // PARTS, PARTS)
        value = 0.5 * part(grad_z_block, i, PARTS) * (temperature * deviation * noise)
        grad_block = append(grad_block, value, grad_logvar.dtype.element_ty)
    store(grad_logvar, row, start, grad_block, mask, COLUMNS, WIDTH)


def sample_gaussian_forward(
    mean: Tensor,
    logvar: Tensor,
    seed: Tensor,
    sample_ids: Tensor | None,
    temperature: float,
    stream: int,
    z: Tensor,
) -> None:
    """Write `mean + temperature * exp(logvar / 2) * eps` into `z`, contiguous; the inputs of any strides."""
    if z.numel() == 0:
        return
    launch = plan([mean, logvar], [z])
    with on_device_of(z):
        sample_gaussian_forward_kernel[launch.grid](
            mean,
            logvar,
            seed,
            *launch.samples(sample_ids),
            temperature,
            stream,
            z,
            *launch.geometry,
            **launch.options,
        )


def sample_gaussian_backward(
    grad_z: Tensor,
    logvar: Tensor,
    seed: Tensor,
    sample_ids: Tensor | None,
    temperature: float,
    stream: int,
    grad_logvar: Tensor,
) -> None:
    """Write `grad_z * temperature * exp(logvar / 2) * eps / 2` into `grad_logvar`, contiguous."""
    if grad_logvar.numel() == 0:
        return
    launch = plan([grad_z, logvar], [grad_logvar])
    with on_device_of(grad_logvar):
        sample_gaussian_backward_kernel[launch.grid](
            grad_z,
            logvar,
            seed,
            *launch.samples(sample_ids),
            temperature,
            stream,
            grad_logvar,
            *launch.geometry,
            **launch.options,
        )
