"""`gaussian_dual_kl`: sample the posterior and measure both KL divergences to the prior, in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from amvl_fast.ops.arguments import broadcast_inputs, check_sample_ids, seed_tensor
from amvl_fast.ops.backends import choose_backend, kernels_of
from amvl_fast.ops.boundary import boundary, first_derivatives_only, no_transforms
from amvl_fast.ops.philox import philox_normal
from amvl_fast.reference.gaussian import DualKL
from amvl_fast.reference.gaussian import gaussian_dual_kl as reference_gaussian_dual_kl


def _outputs(mean_q: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    z = torch.empty(mean_q.shape, dtype=mean_q.dtype, device=mean_q.device)
    forward_kl = torch.empty(mean_q.shape[:-1], dtype=torch.float32, device=mean_q.device)
    return z, forward_kl, torch.empty_like(forward_kl)


@boundary(
    "gaussian_dual_kl_forward(Tensor mean_q, Tensor logvar_q, Tensor mean_p, Tensor logvar_p, Tensor seed, "
    "Tensor? sample_ids, str backend) -> (Tensor, Tensor, Tensor)",
    fake=_outputs,
)
def _forward(
    mean_q: Tensor,
    logvar_q: Tensor,
    mean_p: Tensor,
    logvar_p: Tensor,
    seed: Tensor,
    sample_ids: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _outputs(mean_q)
    kernels_of(backend).gaussian_dual_kl_forward(mean_q, logvar_q, mean_p, logvar_p, seed, sample_ids, *outputs)
    return outputs


def _gradients(
    mean_q: Tensor, logvar_q: Tensor, mean_p: Tensor, logvar_p: Tensor, needed: list[bool]
) -> list[Tensor | None]:
    inputs = (mean_q, logvar_q, mean_p, logvar_p)
    return [
        torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) if is_needed else None
        for tensor, is_needed in zip(inputs, needed, strict=True)
    ]


def _fake_backward(*arguments: Any) -> list[Tensor]:
    mean_q, logvar_q, mean_p, logvar_p, *_, needed, _, _ = arguments
    return [grad for grad in _gradients(mean_q, logvar_q, mean_p, logvar_p, needed) if grad is not None]


@boundary(
    "gaussian_dual_kl_backward(Tensor mean_q, Tensor logvar_q, Tensor mean_p, Tensor logvar_p, Tensor seed, "
    "Tensor? sample_ids, Tensor? grad_z, Tensor? grad_forward_kl, Tensor? grad_reverse_kl, bool[] needed, "
    "bool stop_gradient, str backend) -> Tensor[]",
    fake=_fake_backward,
)
def _backward(
    mean_q: Tensor,
    logvar_q: Tensor,
    mean_p: Tensor,
    logvar_p: Tensor,
    seed: Tensor,
    sample_ids: Tensor | None,
    grad_z: Tensor | None,
    grad_forward_kl: Tensor | None,
    grad_reverse_kl: Tensor | None,
    needed: list[bool],
    stop_gradient: bool,
    backend: str,
) -> list[Tensor]:
    """The gradients that are needed, in the order of the inputs."""
    inputs, upstream = (mean_q, logvar_q, mean_p, logvar_p), (grad_z, grad_forward_kl, grad_reverse_kl)
    grads = _gradients(*inputs, needed)
    kernels = kernels_of(backend)
    kernels.gaussian_dual_kl_backward(*inputs, seed, sample_ids, *upstream, *grads, stop_gradient=stop_gradient)
    return [grad for grad in grads if grad is not None]


class _DualKL(torch.autograd.Function):
    """One launch forward, one backward. Only inputs, seed and sample ids are saved: the noise is recomputed."""

    @staticmethod
    def forward(
        ctx: Any,
        mean_q: Tensor,
        logvar_q: Tensor,
        mean_p: Tensor,
        logvar_p: Tensor,
        seed: Tensor,
        sample_ids: Tensor | None,
        stop_gradient: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(mean_q, logvar_q, mean_p, logvar_p, seed, sample_ids)
        ctx.stop_gradient, ctx.backend = stop_gradient, backend
        # The gradient of an output that nobody differentiated stays None instead of becoming zeros.
        ctx.set_materialize_grads(False)
        return _forward(mean_q, logvar_q, mean_p, logvar_p, seed, sample_ids, backend)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        first_derivatives_only("gaussian_dual_kl")
        needed = list(ctx.needs_input_grad[:4])
        grads = iter(_backward(*ctx.saved_tensors, *upstream, needed, ctx.stop_gradient, ctx.backend))
        return *(next(grads) if is_needed else None for is_needed in needed), None, None, None, None


def gaussian_dual_kl(
    posterior_mean: Tensor,
    posterior_logvar: Tensor,
    prior_mean: Tensor,
    prior_logvar: Tensor,
    *,
    seed: int | Tensor | None = None,
    stop_gradient: bool = True,
    backend: str | None = None,
    sample_ids: Tensor | None = None,
) -> DualKL:
    """Sample the posterior and compare it with the prior both ways.

    With q the posterior, p the prior and `eps = gaussian_noise(shape, seed, sample_ids=sample_ids)`:

        z          = mean_q + exp(logvar_q / 2) * eps
        forward_kl = KL(q || p), which with `stop_gradient` moves the prior only
        reverse_kl = KL(p || q), which with `stop_gradient` moves the posterior only

    These are the terms of AMVL (arXiv 2607.00461). The forms that are computed, accurate where posterior and
    prior nearly agree, and their gradients are our derivation: see `amvl_fast.reference.gaussian_dual_kl`.
    A NaN or inf in one of the inputs makes NaN of its element of z and of both KLs of its row, and of no other
    row. The kernels give first derivatives only, and none under the transforms of `torch.func`;
    `backend="torch"` gives all.

    Args:
        posterior_mean, posterior_logvar, prior_mean, prior_logvar: `[..., d]`, floating, broadcastable to
            each other, any strides (halves of a chunked tensor and expanded priors are not copied). Dtypes
            may differ; what is narrower than float32 is computed in float32.
        seed: an int, a one-element int64 tensor on the inputs' device, or None to draw one from PyTorch's
            generator.
        stop_gradient: if false, both KLs flow into posterior and prior, as in a plain ELBO.
        backend: `"triton"`, `"cpu"`, `"torch"`, or None to choose by device.
        sample_ids: int64 `[n]` on the inputs' device, a number for each index of the leading dimension, of inputs
            `[n, ..., d]`; or None for 0 to n - 1. A sample's noise follows its number instead of its place, so
            that in training it stays the same however a batch is sorted or split over micro-batches and
            processes. With m rows in a sample, row r is row `sample_ids[r // m] * m + r % m` of the noise,
            modulo 2**64.

    Returns:
        `DualKL(z, forward_kl, reverse_kl)`: z `[..., d]` in the dtype of `posterior_mean`; the KLs `[...]`,
        summed over the last dimension, in float32 (float64 if an input is float64).

    Raises:
        AMVLError: (a ValueError) for inputs that do not fit together, a bad seed, bad sample ids, or a backend
            that cannot run here; in the backward pass for `create_graph=True`, unless the backend is `"torch"`.

    Example:
        >>> import torch
        >>> from torch.distributions import Normal, kl_divergence
        >>> mean_q, logvar_q, mean_p, logvar_p = torch.randn(4, 3, 8)
        >>> q, p = Normal(mean_q, (logvar_q / 2).exp()), Normal(mean_p, (logvar_p / 2).exp())
        >>> out = gaussian_dual_kl(mean_q, logvar_q, mean_p, logvar_p, seed=0)
        >>> torch.testing.assert_close(out.forward_kl, kl_divergence(q, p).sum(-1))
        >>> torch.testing.assert_close(out.reverse_kl, kl_divergence(p, q).sum(-1))
    """
    op = "gaussian_dual_kl"
    inputs = broadcast_inputs(
        op,
        posterior_mean=posterior_mean,
        posterior_logvar=posterior_logvar,
        prior_mean=prior_mean,
        prior_logvar=prior_logvar,
    )
    shape, device = inputs[0].shape, inputs[0].device
    name = choose_backend(backend, inputs, device)
    if name != "torch":
        no_transforms(op)
    sample_ids = check_sample_ids(op, sample_ids, shape, device)
    seed = seed_tensor(op, seed, device)
    if name != "torch":
        return DualKL(*_DualKL.apply(*inputs, seed, sample_ids, stop_gradient, name))
    noise = philox_normal(shape, seed, sample_ids=sample_ids)
    mean_q, logvar_q, mean_p, logvar_p = inputs
    return reference_gaussian_dual_kl(mean_q, logvar_q, mean_p, logvar_p, noise, stop_gradient=stop_gradient)
