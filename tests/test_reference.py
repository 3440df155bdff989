"""What the other tests measure by: the oracle and the closed forms, against mpmath, gradcheck and torch."""

import mpmath
import pytest
import torch
from latent_ops import (
    INPUTS,
    NAMES,
    OUTPUTS,
    REGIMES,
    closed_form,
    gradients,
    make_inputs,
    make_upstream,
    true_noise,
)
from torch.distributions import Normal, kl_divergence

from amvl_fast.reference import gaussian_dual_kl as oracle
from amvl_fast.reference.gaussian import phi

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def exact(mean_q, logvar_q, mean_p, logvar_p, noise, upstream):
    """Outputs and gradients of one element in 200 digits, from the definitions of the Gaussians."""
    grad_z, forward, reverse = map(mpmath.mpf, upstream)
    mean_q, logvar_q, mean_p, logvar_p, noise = map(mpmath.mpf, (mean_q, logvar_q, mean_p, logvar_p, noise))
    variance_q, variance_p = mpmath.exp(logvar_q), mpmath.exp(logvar_p)
    gap = mean_q - mean_p
    ratio = variance_q / variance_p
    return {
        "z": mean_q + mpmath.sqrt(variance_q) * noise,
        "forward_kl": (ratio - 1 - mpmath.log(ratio) + gap**2 / variance_p) / 2,
        "reverse_kl": (1 / ratio - 1 + mpmath.log(ratio) + gap**2 / variance_q) / 2,
        "posterior_mean": grad_z + reverse * gap / variance_q,
        "posterior_logvar": (
            grad_z * mpmath.sqrt(variance_q) * noise / 2 - reverse * (1 / ratio - 1 + gap**2 / variance_q) / 2
        ),
        "prior_mean": -forward * gap / variance_p,
        "prior_logvar": -forward * (ratio - 1 + gap**2 / variance_p) / 2,
    }


@pytest.mark.parametrize("regime", REGIMES)
def test_the_truth_is_true(regime):
    """The formulas and the oracle, both in float64, against 200 digits; what float64 rounds is delta."""
    inputs = [t.detach().double().requires_grad_() for t in make_inputs(regime, (24, 1))]
    noise = true_noise((24, 1), 3)
    upstream = [w.double() for w in make_upstream((24, 1))]
    formulas = closed_form(inputs, noise, upstream, stop_gradient=True)
    outputs = oracle(*inputs, noise)
    in_torch = {**dict(zip(OUTPUTS, outputs, strict=True)), **gradients(outputs, inputs, upstream)}
    with mpmath.workdps(200):
        for row in range(24):
            numbers = [t[row].item() for t in (*inputs, noise)]
            right = exact(*numbers, [w[row].item() for w in upstream])
            for name in NAMES:
                result = formulas[name]
                # Rounding delta moves a float64 result 2**-29 as far as a float32 one; 1e-307 underflows.
                allowed = 2e-15 * result.scale[row].item() + result.slack[row].item() * 2.0**-29 + 1e-307
                assert abs(result.value[row].item() - right[name]) <= allowed, (name, numbers)
                assert abs(in_torch[name][row].item() - right[name]) <= 2 * allowed, (name, numbers)


def test_oracle_is_torch_distributions():
    mean_q, logvar_q, mean_p, logvar_p = (2 * t.detach().double() for t in make_inputs(shape=(5, 3, 16)))
    noise = torch.randn(5, 3, 16, dtype=torch.float64)
    q, p = Normal(mean_q, (logvar_q / 2).exp()), Normal(mean_p, (logvar_p / 2).exp())
    out = oracle(mean_q, logvar_q, mean_p, logvar_p, noise)
    torch.testing.assert_close(out.z, q.loc + q.scale * noise, rtol=1e-13, atol=0)
    torch.testing.assert_close(out.forward_kl, kl_divergence(q, p).sum(-1), rtol=1e-12, atol=0)
    torch.testing.assert_close(out.reverse_kl, kl_divergence(p, q).sum(-1), rtol=1e-12, atol=0)


class ClosedForm(torch.autograd.Function):
    """The formulas by which the kernels go backward, as a function for gradcheck."""

    @staticmethod
    def forward(ctx, mean_q, logvar_q, mean_p, logvar_p, noise, stop_gradient):
        inputs = (mean_q, logvar_q, mean_p, logvar_p)
        ctx.save_for_backward(*inputs, noise)
        ctx.stop_gradient = stop_gradient
        results = closed_form(inputs, noise, [None] * 3, stop_gradient)
        return tuple(results[name].value for name in OUTPUTS)

    @staticmethod
    def backward(ctx, *upstream):
        *inputs, noise = ctx.saved_tensors
        results = closed_form(inputs, noise, upstream, ctx.stop_gradient)
        return *(results[name].value for name in INPUTS), None, None


def in_autograd(*leaves, stop_gradient):
    return tuple(oracle(*leaves, stop_gradient=stop_gradient))


def in_closed_form(*leaves, stop_gradient):
    return ClosedForm.apply(*leaves, stop_gradient)


@pytest.mark.parametrize("function", [in_autograd, in_closed_form])
@pytest.mark.parametrize("stop_gradient", [True, False])
def test_gradcheck(function, stop_gradient):
    inputs = [t.detach().double().requires_grad_() for t in make_inputs(shape=(3, 5))]
    noise = torch.randn(3, 5, dtype=torch.float64)
    constants = [t.detach().clone() for t in inputs]

    def stopped(*leaves):
        """What the stops mean, said with constants: numeric differences would see through a detach."""
        mean_q, logvar_q, mean_p, logvar_p = leaves
        q, p = constants[:2], constants[2:]
        z = function(*leaves, noise, stop_gradient=True)[0]
        forward_kl = function(*q, mean_p, logvar_p, noise, stop_gradient=True)[1]
        reverse_kl = function(mean_q, logvar_q, *p, noise, stop_gradient=True)[2]
        return z, forward_kl, reverse_kl

    def plain(*leaves):
        return function(*leaves, noise, stop_gradient=False)

    checked = stopped if stop_gradient else plain
    assert torch.autograd.gradcheck(checked, inputs)
    if function is in_autograd:
        assert torch.autograd.gradgradcheck(checked, inputs)
    # And the stops do what the constants say.
    for output in range(3):
        got = function(*inputs, noise, stop_gradient=stop_gradient)[output].sum()
        right = checked(*inputs)[output].sum()
        pair = [torch.autograd.grad(loss, inputs, materialize_grads=True) for loss in (got, right)]
        for grad, expected in zip(*pair, strict=True):
            torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("dtype", "first"), [(torch.float32, 177.0), (torch.float64, 1419.0)])
def test_no_gap_is_no_gap_up_to_where_the_unit_ends(dtype, first):
    """Through the log-variances at which what the gap is divided by leaves the dtype."""
    logvar = torch.linspace(-first, -first - 1, 10001, dtype=dtype)[:, None].requires_grad_()
    mean = torch.zeros_like(logvar, requires_grad=True)
    for kl in oracle(mean, logvar, mean, logvar, torch.zeros_like(mean))[1:]:
        assert torch.count_nonzero(kl) == 0
        for grad in torch.autograd.grad(kl.sum(), [mean, logvar]):
            assert torch.count_nonzero(grad) == 0


def test_a_gap_in_too_small_a_unit_overflows():
    mean, logvar, zero = torch.tensor([[1e-3], [-200.0], [0.0]])
    assert all(kl.isinf() for kl in oracle(mean, logvar, zero, logvar, zero)[1:])


def test_no_gap_has_its_second_derivative():
    logvar = torch.tensor([-2.0, 3.0], dtype=torch.float64)
    zeros = torch.zeros_like(logvar)
    hessian = torch.func.hessian(lambda mean: oracle(mean, logvar, zeros, logvar, zeros).reverse_kl)(zeros)
    torch.testing.assert_close(hessian.diagonal(), torch.exp(-logvar), rtol=1e-14, atol=0)


def test_phi_and_its_derivatives_are_accurate_and_smooth():
    sizes = [10.0**-k for k in range(1, 13)] + [0.3, 0.4999999, 0.5, 0.50001, 1.0, 3.0, 30.0, 85.0]
    t = torch.tensor([sign * size for size in sizes for sign in (1, -1)], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(phi(t).sum(), t)
    with mpmath.workdps(200):
        right = [mpmath.exp(x) - 1 - x for x in map(mpmath.mpf, t.tolist())]
        right_slope = [mpmath.expm1(x) for x in map(mpmath.mpf, t.tolist())]
        in_float32 = phi(t.detach().float())
        right_in_float32 = [mpmath.exp(x) - 1 - x for x in map(mpmath.mpf, t.detach().float().tolist())]
    for got, truths, bound in [
        (phi(t), right, 1e-15),
        (slope, right_slope, 1e-15),
        (in_float32, right_in_float32, 4e-7),
    ]:
        for x, value, number in zip(t.tolist(), got.tolist(), truths, strict=True):
            assert abs(value / number - 1) < bound, x
    assert phi(torch.zeros(1)) == 0
    assert torch.isnan(phi(torch.tensor(float("nan"))))
