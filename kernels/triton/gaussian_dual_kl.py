"""Kernels and launchers of `gaussian_dual_kl`: one launch forward, one backward.

The formulas, with q the posterior, p the prior, `delta = logvar_p - logvar_q`, `diff = mean_q - mean_p` and
`phi(t) = exp(t) - 1 - t`:

    z                       = mean_q + exp(logvar_q / 2) * eps
    KL(q || p)              = 1/2 * sum_d [ phi(-delta) + diff^2 * exp(-logvar_p) ]
    KL(p || q)              = 1/2 * sum_d [ phi( delta) + diff^2 * exp(-logvar_q) ]

    d KL(q||p) / d mean_p   = -diff * exp(-logvar_p)
    d KL(q||p) / d logvar_p = -1/2 * ( expm1(-delta) + diff^2 * exp(-logvar_p) )
    d KL(p||q) / d mean_q   =  diff * exp(-logvar_q)
    d KL(p||q) / d logvar_q = -1/2 * ( expm1( delta) + diff^2 * exp(-logvar_q) )

and, where the gradients are not stopped, also d KL(q||p)/d mean_q = diff * exp(-logvar_p),
d KL(q||p)/d logvar_q = 1/2 * expm1(-delta), and their mirror images for KL(p || q).
"""

import triton
import triton.language as tl
from torch import Tensor

from .exponential import exp, expm1_and_phi_both_ways
from .layout import as_rows, block_for, load, on_device_of, row_offset
from .philox import philox_normal

STREAM = tl.constexpr(0)


@triton.jit(do_not_specialize=["rows", "inner"])
def gaussian_dual_kl_forward_kernel(
    mean_q,
    logvar_q,
    mean_p,
    logvar_p,
    seed,
    z,
    forward_kl,
    reverse_kl,
    mean_q_strides,
    logvar_q_strides,
    mean_p_strides,
    logvar_p_strides,
    rows,
    inner,
    columns: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    # int64 before any multiplication: rows * columns may pass 2**31.
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mean_q_offset = row_offset(row, inner, mean_q_strides)
    logvar_q_offset = row_offset(row, inner, logvar_q_strides)
    mean_p_offset = row_offset(row, inner, mean_p_strides)
    logvar_p_offset = row_offset(row, inner, logvar_p_strides)
    seed = tl.load(seed)
    forward_sum = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    reverse_sum = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for start in range(0, columns, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        # Masked elements are loaded as 0, which makes every term of both sums exactly 0.
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        mq = load(mean_q, mean_q_offset, column, mean_q_strides, mask)
        lq = load(logvar_q, logvar_q_offset, column, logvar_q_strides, mask)
        mp = load(mean_p, mean_p_offset, column, mean_p_strides, mask)
        lp = load(logvar_p, logvar_p_offset, column, logvar_p_strides, mask)

        noise = philox_normal(seed, STREAM, row, start, BLOCK_ROWS, BLOCK_COLUMNS)
        sample = mq + exp(0.5 * lq) * noise
        tl.store(z + row[:, None] * columns + column[None, :], sample.to(z.dtype.element_ty), mask=mask)

        diff = mq - mp
        _, phi_delta, _, phi_minus_delta = expm1_and_phi_both_ways(lp - lq)
        # Each factor of diff apart: its square may overflow where the product does not.
        forward_sum += phi_minus_delta + diff * (diff * exp(-lp))
        reverse_sum += phi_delta + diff * (diff * exp(-lq))
    tl.store(forward_kl + row, 0.5 * tl.sum(forward_sum, axis=1), mask=row < rows)
    tl.store(reverse_kl + row, 0.5 * tl.sum(reverse_sum, axis=1), mask=row < rows)


@triton.jit
def load_row(pointer, row, inner, strides, rows):
    """One number per row, `[rows, 1]` in float32; no tensor (None) stands for zeros."""
    if pointer is None:
        value = tl.zeros([row.shape[0]], tl.float32)
    else:
        value = tl.load(pointer + row_offset(row, inner, strides), mask=row < rows, other=0.0).to(tl.float32)
    return value[:, None]


@triton.jit(do_not_specialize=["rows", "inner"])
def gaussian_dual_kl_backward_kernel(
    mean_q,
    logvar_q,
    mean_p,
    logvar_p,
    seed,
    grad_z,
    grad_forward_kl,
    grad_reverse_kl,
    grad_mean_q,
    grad_logvar_q,
    grad_mean_p,
    grad_logvar_p,
    mean_q_strides,
    logvar_q_strides,
    mean_p_strides,
    logvar_p_strides,
    grad_z_strides,
    grad_forward_kl_strides,
    grad_reverse_kl_strides,
    rows,
    inner,
    columns: tl.constexpr,
    STOP_GRADIENT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    # A gradient that is None, upstream or because nobody asked for it, is left out at compile time.
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mean_q_offset = row_offset(row, inner, mean_q_strides)
    logvar_q_offset = row_offset(row, inner, logvar_q_strides)
    mean_p_offset = row_offset(row, inner, mean_p_strides)
    logvar_p_offset = row_offset(row, inner, logvar_p_strides)
    grad_z_offset = row_offset(row, inner, grad_z_strides)
    seed = tl.load(seed)
    forward_weight = load_row(grad_forward_kl, row, inner, grad_forward_kl_strides, rows)
    reverse_weight = load_row(grad_reverse_kl, row, inner, grad_reverse_kl_strides, rows)
    for start in range(0, columns, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        out = row[:, None] * columns + column[None, :]
        mq = load(mean_q, mean_q_offset, column, mean_q_strides, mask)
        lq = load(logvar_q, logvar_q_offset, column, logvar_q_strides, mask)
        mp = load(mean_p, mean_p_offset, column, mean_p_strides, mask)
        lp = load(logvar_p, logvar_p_offset, column, logvar_p_strides, mask)
        diff = mq - mp
        expm1_delta, _, expm1_minus_delta, _ = expm1_and_phi_both_ways(lp - lq)

        # The gradients that survive the stop: the forward KL moves p, the reverse KL moves q ...
        forward_slope = forward_weight * (diff * exp(-lp))
        reverse_slope = reverse_weight * (diff * exp(-lq))
        to_mean_p = -forward_slope
        to_logvar_p = -0.5 * (forward_weight * expm1_minus_delta + diff * forward_slope)
        to_mean_q = reverse_slope
        to_logvar_q = -0.5 * (reverse_weight * expm1_delta + diff * reverse_slope)
        if not STOP_GRADIENT:  # ... and without it each also moves the other one.
            to_mean_p -= reverse_slope
            to_logvar_p += 0.5 * (reverse_weight * expm1_delta)
            to_mean_q += forward_slope
            to_logvar_q += 0.5 * (forward_weight * expm1_minus_delta)
        if grad_z is not None:
            upstream = load(grad_z, grad_z_offset, column, grad_z_strides, mask)
            to_mean_q += upstream
            if grad_logvar_q is not None:
                noise = philox_normal(seed, STREAM, row, start, BLOCK_ROWS, BLOCK_COLUMNS)
                to_logvar_q += 0.5 * upstream * (exp(0.5 * lq) * noise)

        if grad_mean_q is not None:
            tl.store(grad_mean_q + out, to_mean_q.to(grad_mean_q.dtype.element_ty), mask=mask)
        if grad_logvar_q is not None:
            tl.store(grad_logvar_q + out, to_logvar_q.to(grad_logvar_q.dtype.element_ty), mask=mask)
        if grad_mean_p is not None:
            tl.store(grad_mean_p + out, to_mean_p.to(grad_mean_p.dtype.element_ty), mask=mask)
        if grad_logvar_p is not None:
            tl.store(grad_logvar_p + out, to_logvar_p.to(grad_logvar_p.dtype.element_ty), mask=mask)


def gaussian_dual_kl_forward(
    mean_q: Tensor,
    logvar_q: Tensor,
    mean_p: Tensor,
    logvar_p: Tensor,
    seed: Tensor,
    z: Tensor,
    forward_kl: Tensor,
    reverse_kl: Tensor,
) -> None:
    """Write `z` `[..., d]` and the float32 KLs `[...]`, all contiguous; the inputs may have any strides."""
    if z.numel() == 0:
        forward_kl.zero_()
        reverse_kl.zero_()
        return
    columns = z.shape[-1]
    folded = as_rows(z.shape, [mean_q, logvar_q, mean_p, logvar_p])
    block = block_for(columns)
    with on_device_of(z):
        gaussian_dual_kl_forward_kernel[(triton.cdiv(folded.rows, block.rows),)](
            *folded.tensors,
            seed,
            z,
            forward_kl,
            reverse_kl,
            *folded.strides,
            folded.rows,
            folded.inner,
            columns,
            block.rows,
            block.columns,
            num_warps=block.warps,
        )


def gaussian_dual_kl_backward(
    mean_q: Tensor,
    logvar_q: Tensor,
    mean_p: Tensor,
    logvar_p: Tensor,
    seed: Tensor,
    grad_z: Tensor | None,
    grad_forward_kl: Tensor | None,
    grad_reverse_kl: Tensor | None,
    grad_mean_q: Tensor | None,
    grad_logvar_q: Tensor | None,
    grad_mean_p: Tensor | None,
    grad_logvar_p: Tensor | None,
    *,
    stop_gradient: bool,
) -> None:
    """Write the gradients that are not None, contiguous. Upstream: None, or a tensor of any strides."""
    shape = mean_q.shape
    if mean_q.numel() == 0:
        return
    # Seen as [..., d] like the rest, the weights of the KLs fold into rows together with everything else.
    weights = [None if w is None else w.unsqueeze(-1).expand(shape) for w in (grad_forward_kl, grad_reverse_kl)]
    folded = as_rows(shape, [mean_q, logvar_q, mean_p, logvar_p, grad_z, *weights])
    block = block_for(shape[-1])
    with on_device_of(mean_q):
        gaussian_dual_kl_backward_kernel[(triton.cdiv(folded.rows, block.rows),)](
            *folded.tensors[:4],
            seed,
            *folded.tensors[4:],
            grad_mean_q,
            grad_logvar_q,
            grad_mean_p,
            grad_logvar_p,
            *folded.strides,
            folded.rows,
            folded.inner,
            shape[-1],
            stop_gradient,
            block.rows,
            block.columns,
            num_warps=block.warps,
        )
