"""The latent op in plain PyTorch, written to be read beside the formulas rather than to be fast.

It is the oracle that every kernel is tested against, the fallback where no kernel runs, and the peer
that benchmarks compare with. Of the optimised code only the ops import it, for `backend="torch"` and `DualKL`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class DualKL(NamedTuple):
    """What `gaussian_dual_kl` returns.

    Attributes:
        z: the reparameterised posterior sample, `[..., d]`, in the dtype of `posterior_mean`.
        forward_kl: KL(q || p) with q the posterior, summed over the last dimension, `[...]`.
        reverse_kl: KL(p || q), likewise.
    """

    z: Tensor
    forward_kl: Tensor
    reverse_kl: Tensor


# 1/2!, 1/3!, ... 1/16!: at |t| < 1/2 the first term left out is below float64 rounding.
_PHI_SERIES = [1.0 / math.factorial(k) for k in range(2, 17)]


def phi(t: Tensor) -> Tensor:
    """`exp(t) - 1 - t`, to full relative accuracy in the dtype of `t`, and so are its derivatives.

    Written out, the three terms cancel: in float32 at t = 1e-4 the value is 5e-9 and one rounding of the
    terms 6e-8. `expm1(t) - t` only moves the trouble, so a Taylor series takes over for |t| < 1/2.
    """
    near = t.abs() < 0.5
    # Both branches are evaluated (and differentiated) everywhere, so each gets an argument it can bear:
    # an overflow in the branch not taken would still turn gradients into NaN.
    small = torch.where(near, t, torch.zeros_like(t))
    series = torch.full_like(small, _PHI_SERIES[-1])
    for coefficient in reversed(_PHI_SERIES[:-1]):
        series = series * small + coefficient
    large = torch.where(near, torch.zeros_like(t), t)
    return torch.where(near, small * small * series, torch.expm1(large) - large)


def in_deviations(gap: Tensor, logvar: Tensor) -> Tensor:
    """`gap * exp(-logvar / 2)`, whose square overflows only where `gap**2 * exp(-logvar)` does; no gap is 0."""
    exponent = logvar / -4
    overflows = exponent >= math.log(torch.finfo(exponent.dtype).max)
    # 0 * inf would be NaN.
    root = torch.exp(torch.where(overflows & (gap == 0), 0.0, exponent))
    return gap * root * root


def gaussian_dual_kl(
    posterior_mean: Tensor,
    posterior_logvar: Tensor,
    prior_mean: Tensor,
    prior_logvar: Tensor,
    noise: Tensor,
    *,
    stop_gradient: bool = True,
) -> DualKL:
    """Sample the posterior and compare it with the prior both ways, in plain PyTorch.

    With q the posterior, p the prior, `delta = logvar_p - logvar_q`, `diff = mean_q - mean_p` and
    `phi(t) = exp(t) - 1 - t`:

        z          = mean_q + exp(logvar_q / 2) * noise
        KL(q || p) = 1/2 * sum(phi(-delta) + diff**2 * exp(-logvar_p))      forward_kl
        KL(p || q) = 1/2 * sum(phi(+delta) + diff**2 * exp(-logvar_q))      reverse_kl

    The two KLs and where their gradients stop are those of AMVL (arXiv 2607.00461); writing them with `phi`,
    which keeps its accuracy where posterior and prior nearly agree, is our derivation.

    Args:
        posterior_mean, posterior_logvar, prior_mean, prior_logvar: `[..., d]`, floating, broadcastable to
            each other. Anything narrower than float32 is computed in float32.
        noise: standard normal, broadcastable to them.
        stop_gradient: if true, the forward KL moves the prior only and the reverse KL the posterior only;
            if false both flow into both, as in a plain ELBO.

    Returns:
        `DualKL(z, forward_kl, reverse_kl)`: z `[..., d]` like `posterior_mean`; the KLs `[...]` in float32,
        or in float64 when an input is float64.

    Example:
        >>> import torch
        >>> from torch.distributions import Normal, kl_divergence
        >>> mean_q, logvar_q, mean_p, logvar_p, noise = torch.randn(5, 3, 8, dtype=torch.float64)
        >>> q, p = Normal(mean_q, (logvar_q / 2).exp()), Normal(mean_p, (logvar_p / 2).exp())
        >>> out = gaussian_dual_kl(mean_q, logvar_q, mean_p, logvar_p, noise)
        >>> torch.testing.assert_close(out.forward_kl, kl_divergence(q, p).sum(-1))
        >>> torch.testing.assert_close(out.reverse_kl, kl_divergence(p, q).sum(-1))
    """
    inputs = (posterior_mean, posterior_logvar, prior_mean, prior_logvar)
    compute = torch.float64 if any(t.dtype == torch.float64 for t in inputs) else torch.float32
    mean_q, logvar_q, mean_p, logvar_p = (t.to(compute) for t in torch.broadcast_tensors(*inputs))
    # A NaN or inf in one of the four makes NaN of all four, here and in every kernel: left alone, an infinity
    # would come out as inf in one place and vanish as exp(-inf) in another.
    poison = 0 * (mean_q - mean_p + (logvar_p - logvar_q)).detach()
    mean_q, logvar_q, mean_p, logvar_p = mean_q + poison, logvar_q + poison, mean_p + poison, logvar_p + poison

    z = mean_q + torch.exp(logvar_q / 2) * noise.to(compute)

    def stopped(t: Tensor) -> Tensor:
        return t.detach() if stop_gradient else t

    gap = in_deviations(stopped(mean_q) - mean_p, logvar_p)
    forward_kl = 0.5 * (phi(stopped(logvar_q) - logvar_p) + gap.square()).sum(-1)
    gap = in_deviations(mean_q - stopped(mean_p), logvar_q)
    reverse_kl = 0.5 * (phi(stopped(logvar_p) - logvar_q) + gap.square()).sum(-1)
    return DualKL(z.to(posterior_mean.dtype), forward_kl, reverse_kl)
