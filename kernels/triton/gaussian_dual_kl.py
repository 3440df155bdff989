"""Kernels and launchers of `gaussian_dual_kl`: one launch forward, one backward.

With q the posterior, p the prior, `delta = logvar_p - logvar_q`, `diff = mean_q - mean_p`,
`phi(t) = exp(t) - 1 - t`, and the gap in units of either deviation, `u_p = diff * exp(-logvar_p / 2)`:

    z                       = mean_q + exp(logvar_q / 2) * eps
    KL(q || p)              = sum_d [ phi(-delta) / 2 + u_p^2 / 2 ]
    KL(p || q)              = sum_d [ phi( delta) / 2 + u_q^2 / 2 ]

    d KL(q||p) / d mean_p   = -u_p * exp(-logvar_p / 2)
    d KL(q||p) / d logvar_p = -( expm1(-delta) / 2 + u_p^2 / 2 )
    d KL(p||q) / d mean_q   =  u_q * exp(-logvar_q / 2)
    d KL(p||q) / d logvar_q = -( expm1( delta) / 2 + u_q^2 / 2 )

and, where the gradients are not stopped, also d KL(q||p)/d mean_q = u_p * exp(-logvar_p / 2),
d KL(q||p)/d logvar_q = expm1(-delta) / 2, and their mirror images for KL(p || q).
"""

import triton
import triton.language as tl
from torch import Tensor

from .blocks import (
    add,
    append,
    append_gradient,
    block_mask,
    block_rows,
    block_start,
    load,
    load_row,
    part,
    row_number,
    row_offset,
    store,
    sum_of_fours,
)
from .exponential import exp_half_both_ways, exp_minus_half, half_expm1_and_phi, limit, subtract
from .layout import on_device_of, plan
from .philox import philox_normal

STREAM = tl.constexpr(0)

# What loads may assume of rows is ALIGN's to say: the same for one row as for many, so that it is summed alike.
_UNALIGNED = ["mean_q", "logvar_q", "mean_p", "logvar_p", "sample_ids"]


@triton.jit
def gap_and_poison(mq, lq, mp, lp):
    """`mean_q - mean_p`, and a number that is NaN if one of the four is NaN or infinite, else 0.

    The gap has it added. Left alone, an infinite log-variance would vanish in exp(-inf).
    """
    diff = mq - mp
    poison = 0.0 * (diff + (lp - lq))
    return diff + poison, poison


@triton.jit(do_not_specialize=["rows", "sample_rows"], do_not_specialize_on_alignment=_UNALIGNED)
def gaussian_dual_kl_forward_kernel(
    mean_q,
    logvar_q,
    mean_p,
    logvar_p,
    seed,
    sample_ids,
    sample_rows,
    z,
    forward_kl,
    reverse_kl,
    mean_q_strides,
    logvar_q_strides,
    mean_p_strides,
    logvar_p_strides,
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
    mean_q_offset = row_offset(row, inner, mean_q_strides, WIDTH)
    logvar_q_offset = row_offset(row, inner, logvar_q_strides, WIDTH)
    mean_p_offset = row_offset(row, inner, mean_p_strides, WIDTH)
    logvar_p_offset = row_offset(row, inner, logvar_p_strides, WIDTH)
    # Summed over all columns only at the end: inside the loop that would make the warps wait for each other.
    forward_sum = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS // PARTS // 4], tl.float32)
    reverse_sum = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS // PARTS // 4], tl.float32)
    for start in tl.range(0, COLUMNS, BLOCK_COLUMNS, loop_unroll_factor=1, disable_licm=True):
        # Masked elements are loaded as 0, which makes every term of both sums exactly 0.
        mask = block_mask(row, rows, start, COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS)
        mean_q_block = load(mean_q, mean_q_offset, start, mean_q_strides, mask, ALIGN[0], WIDTH)
        logvar_q_block = load(logvar_q, logvar_q_offset, start, logvar_q_strides, mask, ALIGN[1], WIDTH)
        mean_p_block = load(mean_p, mean_p_offset, start, mean_p_strides, mask, ALIGN[2], WIDTH)
        logvar_p_block = load(logvar_p, logvar_p_offset, start, logvar_p_strides, mask, ALIGN[3], WIDTH)
        z_block = None
        for i in tl.static_range(PARTS):
            noise = philox_normal(
                tl.load(seed), STREAM, number, start + 4 * i, BLOCK_ROWS, BLOCK_COLUMNS // PARTS, PARTS
            )
            mq, lq = part(mean_q_block, i, PARTS), part(logvar_q_block, i, PARTS)
            mp, lp = part(mean_p_block, i, PARTS), part(logvar_p_block, i, PARTS)
            diff, poison = gap_and_poison(mq, lq, mp, lp)
            deviation, inverse_q = exp_half_both_ways(lq)
            z_block = append(z_block, (mq + poison) + deviation * noise, z.dtype.element_ty)

            u_q = diff * limit(inverse_q)
            u_p = diff * exp_minus_half(lp)
            delta, remainder = subtract(lp, lq)
            _, half_phi, _, half_phi_minus = half_expm1_and_phi(delta, remainder)
            forward_sum += sum_of_fours(half_phi_minus + 0.5 * u_p * u_p)
            reverse_sum += sum_of_fours(half_phi + 0.5 * u_q * u_q)
        store(z, row, start, z_block, mask, COLUMNS, WIDTH)
    tl.store(forward_kl + row, tl.sum(forward_sum, axis=1), mask=row < rows)
    tl.store(reverse_kl + row, tl.sum(reverse_sum, axis=1), mask=row < rows)


@triton.jit(do_not_specialize=["rows", "sample_rows"], do_not_specialize_on_alignment=[*_UNALIGNED, "grad_z"])
def gaussian_dual_kl_backward_kernel(
    mean_q,
    logvar_q,
    mean_p,
    logvar_p,
    seed,
    sample_ids,
    sample_rows,
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
    STOP_GRADIENT: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):
    # A gradient that is None, upstream or because nobody asked for it, is left out at compile time, and with
    # it whatever only it needs, loads included.
    row = block_rows(BLOCK_ROWS, WIDTH)
    number = row_number(row, rows, sample_ids, sample_rows, WIDTH)
    mean_q_offset = row_offset(row, inner, mean_q_strides, WIDTH)
    logvar_q_offset = row_offset(row, inner, logvar_q_strides, WIDTH)
    mean_p_offset = row_offset(row, inner, mean_p_strides, WIDTH)
    logvar_p_offset = row_offset(row, inner, logvar_p_strides, WIDTH)
    grad_z_offset = row_offset(row, inner, grad_z_strides, WIDTH)
    forward_weight = load_row(grad_forward_kl, row, inner, grad_forward_kl_strides, rows, WIDTH)
    reverse_weight = load_row(grad_reverse_kl, row, inner, grad_reverse_kl_strides, rows, WIDTH)
    start = block_start(COLUMNS, BLOCK_COLUMNS)
    mask = block_mask(row, rows, start, COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS)
    mean_q_block = load(mean_q, mean_q_offset, start, mean_q_strides, mask, ALIGN[0], WIDTH)
    logvar_q_block = load(logvar_q, logvar_q_offset, start, logvar_q_strides, mask, ALIGN[1], WIDTH)
    mean_p_block = load(mean_p, mean_p_offset, start, mean_p_strides, mask, ALIGN[2], WIDTH)
    logvar_p_block = load(logvar_p, logvar_p_offset, start, logvar_p_strides, mask, ALIGN[3], WIDTH)
    if grad_z is not None:
        grad_z_block = load(grad_z, grad_z_offset, start, grad_z_strides, mask, ALIGN[4], WIDTH)
    mean_q_grad, logvar_q_grad, mean_p_grad, logvar_p_grad = None, None, None, None
    for i in tl.static_range(PARTS):
        if i > 0 and COLUMNS > BLOCK_COLUMNS and sample_ids is None:
            # Nothing to wait for; but here the assembler would mix the two parts, and need registers for both.
            tl.debug_barrier()
        mq, lq = part(mean_q_block, i, PARTS), part(logvar_q_block, i, PARTS)
        mp, lp = part(mean_p_block, i, PARTS), part(logvar_p_block, i, PARTS)
        diff, _ = gap_and_poison(mq, lq, mp, lp)
        deviation, inverse_q = exp_half_both_ways(lq)

        to_mean_q, to_logvar_q, to_mean_p, to_logvar_p = None, None, None, None
        if grad_z is not None:
            to_mean_q = part(grad_z_block, i, PARTS)
            if grad_logvar_q is not None:
                # With sample ids it is a volatile load that keeps the parts apart, and the round keys of each.
                key = tl.load(seed, volatile=sample_ids is not None)
                noise = philox_normal(key, STREAM, number, start + 4 * i, BLOCK_ROWS, BLOCK_COLUMNS // PARTS, PARTS)
                to_logvar_q = 0.5 * to_mean_q * (deviation * noise)
        delta, remainder = subtract(lp, lq)
        half_expm1, _, half_expm1_minus, _ = half_expm1_and_phi(delta, remainder)
        if forward_weight is not None:
            inverse_p = exp_minus_half(lp)
            u_p = diff * inverse_p
            slope = forward_weight * u_p * inverse_p
            to_mean_p = -slope
            to_logvar_p = -forward_weight * (half_expm1_minus + 0.5 * u_p * u_p)
            if not STOP_GRADIENT:
                to_mean_q = add(to_mean_q, slope)
                to_logvar_q = add(to_logvar_q, forward_weight * half_expm1_minus)
        if reverse_weight is not None:
            inverse_q = limit(inverse_q)
            u_q = diff * inverse_q
            slope = reverse_weight * u_q * inverse_q
            to_mean_q = add(to_mean_q, slope)
            to_logvar_q = add(to_logvar_q, -reverse_weight * (half_expm1 + 0.5 * u_q * u_q))
            if not STOP_GRADIENT:
                to_mean_p = add(to_mean_p, -slope)
                to_logvar_p = add(to_logvar_p, reverse_weight * half_expm1)
        mean_q_grad = append_gradient(grad_mean_q, mean_q_grad, to_mean_q, mq.shape)
        logvar_q_grad = append_gradient(grad_logvar_q, logvar_q_grad, to_logvar_q, mq.shape)
        mean_p_grad = append_gradient(grad_mean_p, mean_p_grad, to_mean_p, mq.shape)
        logvar_p_grad = append_gradient(grad_logvar_p, logvar_p_grad, to_logvar_p, mq.shape)

    store(grad_mean_q, row, start, mean_q_grad, mask, COLUMNS, WIDTH)
    store(grad_logvar_q, row, start, logvar_q_grad, mask, COLUMNS, WIDTH)
    store(grad_mean_p, row, start, mean_p_grad, mask, COLUMNS, WIDTH)
    store(grad_logvar_p, row, start, logvar_p_grad, mask, COLUMNS, WIDTH)


def gaussian_dual_kl_forward(
    mean_q: Tensor,
    logvar_q: Tensor,
    mean_p: Tensor,
    logvar_p: Tensor,
    seed: Tensor,
    sample_ids: Tensor | None,
    z: Tensor,
    forward_kl: Tensor,
    reverse_kl: Tensor,
) -> None:
    """Write `z` `[..., d]` and the float32 KLs `[...]`, all contiguous; the inputs may have any strides."""
    if z.numel() == 0:
        forward_kl.zero_()
        reverse_kl.zero_()
        return
    inputs = [mean_q, logvar_q, mean_p, logvar_p]
    launch = plan(inputs, [z], walked=True)
    with on_device_of(z):
        gaussian_dual_kl_forward_kernel[launch.grid](
            *inputs, seed, *launch.samples(sample_ids), z, forward_kl, reverse_kl, *launch.geometry, **launch.options
        )


def gaussian_dual_kl_backward(
    mean_q: Tensor,
    logvar_q: Tensor,
    mean_p: Tensor,
    logvar_p: Tensor,
    seed: Tensor,
    sample_ids: Tensor | None,
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
    if mean_q.numel() == 0:
        return
    grads = [grad_mean_q, grad_logvar_q, grad_mean_p, grad_logvar_p]
    inputs, weights = [mean_q, logvar_q, mean_p, logvar_p], [grad_forward_kl, grad_reverse_kl]
    launch = plan([*inputs, grad_z], grads, weights)
    with on_device_of(mean_q):
        gaussian_dual_kl_backward_kernel[launch.grid](
            *inputs,
            seed,
            *launch.samples(sample_ids),
            grad_z,
            *weights,
            *grads,
            *launch.geometry,
            stop_gradient,
            **launch.options,
        )
