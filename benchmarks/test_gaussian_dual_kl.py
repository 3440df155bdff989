"""`gaussian_dual_kl`, forward and backward, beside the same in torch.distributions; the table gives the ratios.

Plain PyTorch on both sides so far: what is compared is the price of the accurate form near equality.
"""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from amvl_fast import gaussian_dual_kl

SHAPES = [(8, 8, 512), (128, 8, 512)]  # the paper's latents at a training batch, and a large one


def ours(mean_q, logvar_q, mean_p, logvar_p):
    z, forward_kl, reverse_kl = gaussian_dual_kl(mean_q, logvar_q, mean_p, logvar_p, seed=0, backend="torch")
    return z.sum() + forward_kl.sum() + reverse_kl.sum()


def distributions(mean_q, logvar_q, mean_p, logvar_p):
    def normal(mean, logvar):
        return Normal(mean, (logvar / 2).exp(), validate_args=False)

    z = normal(mean_q, logvar_q).rsample()
    forward_kl = kl_divergence(normal(mean_q.detach(), logvar_q.detach()), normal(mean_p, logvar_p))
    reverse_kl = kl_divergence(normal(mean_p.detach(), logvar_p.detach()), normal(mean_q, logvar_q))
    return z.sum() + forward_kl.sum() + reverse_kl.sum()


@pytest.mark.parametrize("provider", [distributions, ours])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gaussian_dual_kl(benchmark, shape, provider):
    benchmark.group = f"gaussian_dual_kl {shape}"
    torch.manual_seed(0)
    inputs = [torch.randn(shape, requires_grad=True) for _ in range(4)]

    def step():
        return torch.autograd.grad(provider(*inputs), inputs)

    assert all(torch.isfinite(grad).all() for grad in step())
    benchmark(step)
