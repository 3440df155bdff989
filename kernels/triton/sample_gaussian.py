"""Kernels and launchers of `sample_gaussian`, forward and backward."""

import triton
import triton.language as tl
from torch import Tensor

from .exponential import exp
from .layout import as_rows, block_for, load, on_device_of, row_offset
from .philox import philox_normal


@triton.jit(do_not_specialize=["temperature", "stream", "rows", "inner"])
def sample_gaussian_forward_kernel(
    mean,
    logvar,
    seed,
    temperature,
    stream,
    z,
    mean_strides,
    logvar_strides,
    rows,
    inner,
    columns: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mean_offset = row_offset(row, inner, mean_strides)
    logvar_offset = row_offset(row, inner, logvar_strides)
    seed = tl.load(seed)
    temperature = tl.to_tensor(temperature).to(tl.float32)
    for start in range(0, columns, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        deviation = temperature * exp(0.5 * load(logvar, logvar_offset, column, logvar_strides, mask))
        noise = philox_normal(seed, stream, row, start, BLOCK_ROWS, BLOCK_COLUMNS)
        value = load(mean, mean_offset, column, mean_strides, mask) + deviation * noise
        tl.store(z + row[:, None] * columns + column[None, :], value.to(z.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["temperature", "stream", "rows", "inner"])
def sample_gaussian_backward_kernel(
    grad_z,
    logvar,
    seed,
    temperature,
    stream,
    grad_logvar,
    grad_z_strides,
    logvar_strides,
    rows,
    inner,
    columns: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    grad_z_offset = row_offset(row, inner, grad_z_strides)
    logvar_offset = row_offset(row, inner, logvar_strides)
    seed = tl.load(seed)
    temperature = tl.to_tensor(temperature).to(tl.float32)
    for start in range(0, columns, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        deviation = temperature * exp(0.5 * load(logvar, logvar_offset, column, logvar_strides, mask))
        noise = philox_normal(seed, stream, row, start, BLOCK_ROWS, BLOCK_COLUMNS)
        value = 0.5 * load(grad_z, grad_z_offset, column, grad_z_strides, mask) * deviation * noise
        where = grad_logvar + row[:, None] * columns + column[None, :]
        tl.store(where, value.to(grad_logvar.dtype.element_ty), mask=mask)


def _launch(kernel, first: Tensor, logvar: Tensor, seed: Tensor, temperature: float, stream: int, out: Tensor) -> None:
    if out.numel() == 0:
        return
    columns = out.shape[-1]
    folded = as_rows(out.shape, [first, logvar])
    block = block_for(columns)
    with on_device_of(out):
        kernel[(triton.cdiv(folded.rows, block.rows),)](
            folded.tensors[0],
            folded.tensors[1],
            seed,
            temperature,
            stream,
            out,
            *folded.strides,
            folded.rows,
            folded.inner,
            columns,
            block.rows,
            block.columns,
            num_warps=block.warps,
        )


def sample_gaussian_forward(
    mean: Tensor, logvar: Tensor, seed: Tensor, temperature: float, stream: int, z: Tensor
) -> None:
    """Write `mean + temperature * exp(logvar / 2) * eps` into `z`, contiguous; the inputs of any strides."""
    _launch(sample_gaussian_forward_kernel, mean, logvar, seed, temperature, stream, z)


def sample_gaussian_backward(
    grad_z: Tensor, logvar: Tensor, seed: Tensor, temperature: float, stream: int, grad_logvar: Tensor
) -> None:
    """Write `grad_z * temperature * exp(logvar / 2) * eps / 2` into `grad_logvar`, contiguous."""
    _launch(sample_gaussian_backward_kernel, grad_z, logvar, seed, temperature, stream, grad_logvar)
