"""`sample_gaussian`: a reparameterised sample of one Gaussian, with a temperature."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from amvl_fast.errors import AMVLError
from amvl_fast.ops.arguments import broadcast_inputs, check_sample_ids, check_stream, seed_tensor
from amvl_fast.ops.backends import choose_backend, kernels_of
from amvl_fast.ops.boundary import boundary, first_derivatives_only, no_transforms
from amvl_fast.ops.philox import philox_normal


def _like(tensor: Tensor, *_: Any) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


@boundary(
    "sample_gaussian_forward(Tensor mean, Tensor logvar, Tensor seed, Tensor? sample_ids, float temperature, "
    "int stream, str backend) -> Tensor",
    fake=_like,
)
def _forward(
    mean: Tensor,
    logvar: Tensor,
    seed: Tensor,
    sample_ids: Tensor | None,
    temperature: float,
    stream: int,
    backend: str,
) -> Tensor:
    z = _like(mean)
    kernels_of(backend).sample_gaussian_forward(mean, logvar, seed, sample_ids, temperature, stream, z)
    return z


@boundary(
    "sample_gaussian_backward(Tensor logvar, Tensor grad_z, Tensor seed, Tensor? sample_ids, float temperature, "
    "int stream, str backend) -> Tensor",
    fake=_like,
)
def _backward(
    logvar: Tensor,
    grad_z: Tensor,
    seed: Tensor,
    sample_ids: Tensor | None,
    temperature: float,
    stream: int,
    backend: str,
) -> Tensor:
    grad_logvar = _like(logvar)
    kernels_of(backend).sample_gaussian_backward(grad_z, logvar, seed, sample_ids, temperature, stream, grad_logvar)
    return grad_logvar


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mean: Tensor,
        logvar: Tensor,
        seed: Tensor,
        sample_ids: Tensor | None,
        temperature: float,
        stream: int,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(logvar, seed, sample_ids)
        ctx.options = temperature, stream, backend
        return _forward(mean, logvar, seed, sample_ids, temperature, stream, backend)

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor) -> tuple[Tensor | None, ...]:
        first_derivatives_only("sample_gaussian")
        logvar, *numbers = ctx.saved_tensors
        grad_mean = grad_z if ctx.needs_input_grad[0] else None
        grad_logvar = _backward(logvar, grad_z, *numbers, *ctx.options) if ctx.needs_input_grad[1] else None
        return grad_mean, grad_logvar, None, None, None, None, None


def sample_gaussian(
    mean: Tensor,
    logvar: Tensor,
    *,
    temperature: float = 1.0,
    seed: int | Tensor | None = None,
    backend: str | None = None,
    stream: int = 0,
    sample_ids: Tensor | None = None,
) -> Tensor:
    """`mean + temperature * exp(logvar / 2) * eps`, differentiable in `mean` and `logvar`.

    The reparameterised sample by which inference draws latents from the prior (arXiv 2607.00461). `eps` is
    `gaussian_noise(shape, seed, stream=stream, sample_ids=sample_ids)`; it is recomputed in the backward pass,
    never stored, by the kernels. They give first derivatives only, and none under the transforms of `torch.func`;
    `backend="torch"` gives all.

    Args:
        mean, logvar: `[..., d]`, floating, broadcastable to each other, any strides. NaN and inf do what they
            do in the formula: a log-variance of -inf gives the mean.
        temperature: scales the standard deviation. 0 gives the mean exactly, whatever `logvar` is.
        seed: an int, a one-element int64 tensor on the inputs' device, or None to draw one from PyTorch's
            generator.
        backend: `"triton"`, `"cpu"`, `"torch"`, or None to choose by device.
        stream: number of an independent sequence of noise for the same seed, 0 to 2**32 - 1.
        sample_ids: int64 `[n]` on the inputs' device, a number for each index of the leading dimension, of inputs
            `[n, ..., d]`; or None for 0 to n - 1. A sample's noise follows its number instead of its place, so
            that in training it stays the same however a batch is sorted or split over micro-batches and
            processes. With m rows in a sample, row r is row `sample_ids[r // m] * m + r % m` of the noise,
            modulo 2**64.

    Returns:
        The sample, in the broadcast shape and the dtype of `mean`.

    Raises:
        AMVLError: (a ValueError) for a temperature that is negative or not finite, inputs that do not fit
            together, a bad seed or stream, bad sample ids, or a backend that cannot run here.

    Example:
        >>> import torch
        >>> from amvl_fast import gaussian_noise
        >>> mean, logvar = torch.randn(2, 5, 8)
        >>> z = sample_gaussian(mean, logvar, temperature=0.5, seed=3)
        >>> torch.testing.assert_close(z, mean + 0.5 * (logvar / 2).exp() * gaussian_noise((5, 8), 3))
    """
    op = "sample_gaussian"
    if not isinstance(temperature, (int, float)) or not 0.0 <= temperature < math.inf:
        raise AMVLError(f"{op}: temperature is {temperature!r}; pass a finite float that is not negative.")
    temperature = float(temperature)
    mean, logvar = broadcast_inputs(op, mean=mean, logvar=logvar)
    stream = check_stream(op, stream)
    name = choose_backend(backend, (mean, logvar), mean.device)
    if name != "torch":
        no_transforms(op)
    sample_ids = check_sample_ids(op, sample_ids, mean.shape, mean.device)
    seed = seed_tensor(op, seed, mean.device)
    if temperature == 0.0:
        # Not 0 * exp(logvar / 2): that is NaN where the exponential overflows.
        return mean.clone(memory_format=torch.contiguous_format)
    if name != "torch":
        return _Sample.apply(mean, logvar, seed, sample_ids, temperature, stream, name)
    compute = torch.float64 if torch.float64 in (mean.dtype, logvar.dtype) else torch.float32
    noise = philox_normal(mean.shape, seed, stream=stream, sample_ids=sample_ids).to(compute)
    return (mean.to(compute) + temperature * torch.exp(logvar.to(compute) / 2) * noise).to(mean.dtype)
