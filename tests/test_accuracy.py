"""How far the latent op may be from the truth: the truth against mpmath, every backend against the truth.

The limits are those of the README: relative in norm, 4e-7 for z and 4e-6 for KLs and gradients, everywhere.
"""

import mpmath
import numpy as np
import pytest
import torch
from latent_ops import (
    BACKENDS,
    BOUND,
    INPUTS,
    KERNELS,
    NAMES,
    OUTPUTS,
    REGIMES,
    TINY,
    bound_of,
    budget,
    closed_form,
    draw,
    gradients,
    make_inputs,
    make_upstream,
    run,
    true_noise,
    truth,
    ulp,
)

from amvl_fast.reference import gaussian_dual_kl as oracle
from amvl_fast.reference.gaussian import phi

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SHAPE = (6, 48)


# --- the truth ---


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


# --- the kernels' exponentials ---


def test_device_exponentials(device):
    """`exp`, `expm1` and `phi` to a few roundings of their own size, up to where they overflow."""
    pytest.importorskip("triton")
    from kernel_probes import exponential_probe

    size = torch.logspace(-7, torch.log10(torch.tensor(88.7)).item(), 2048)
    t = torch.cat([-size, size]).to(device)
    out = torch.empty(5, 4096, device=device)
    exponential_probe[(1,)](t, out, 4096)
    exact = t.double()
    right = [exact.exp(), exact.expm1(), phi(exact), (-exact).expm1(), phi(-exact)]
    bounds = [2e-7, 3e-7, 6e-7, 3e-7, 6e-7]
    for value, correct, bound in zip(out.double(), right, bounds, strict=True):
        normal = correct.abs() > torch.finfo(torch.float32).tiny
        torch.testing.assert_close(value[normal], correct[normal], rtol=bound, atol=0)

    special = torch.tensor([0.0, 89.2, 1e4, -1e4, float("nan")] * 4, device=device)[:16]
    exponential_probe[(1,)](special, out := torch.empty(5, 16, device=device), 16)
    inf, nan = float("inf"), float("nan")
    expected = [
        [1, inf, inf, 0, nan],
        [0, inf, inf, -1, nan],
        [0, inf, inf, 9999, nan],
        [0, -1, -1, inf, nan],
        [0, 88.2, 9999, inf, nan],
    ]
    torch.testing.assert_close(out[:, :5].cpu(), torch.tensor(expected), rtol=1e-6, atol=1e-37, equal_nan=True)


# --- every backend against the truth ---


def norm(t):
    return t.norm().item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize("regime", REGIMES)
def test_float32(device, backend, stop_gradient, regime):
    """In norm by the limits, and each KL by itself: a row of small divergence hides behind no other."""
    inputs, upstream = make_inputs(regime, SHAPE, device=device), make_upstream(SHAPE, device=device)
    got = run(backend, inputs, upstream, seed=3, stop_gradient=stop_gradient)
    for name, right in truth(inputs, upstream, seed=3, stop_gradient=stop_gradient).items():
        assert got[name].dtype == torch.float32
        assert got[name].shape == right.value.shape
        error = got[name].double().cpu() - right.value
        allowed = bound_of(name) * norm(right.value) + 4 * TINY
        if backend == "torch":  # it rounds delta, and the limits are the kernels'
            allowed += norm(right.slack)
        assert norm(error) <= allowed, name
        if name.endswith("kl"):
            assert (error.abs() <= budget(name, right, torch.float32, backend)).all(), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1,), (5, 1), (1, 2, 1, 3), (70, 7), (3, 64), (2, 257), (3, 1030), (1, 8192)])
def test_shapes(device, backend, shape):
    """No leading dimension, one column, rows that share a block, rows that need several."""
    inputs, upstream = make_inputs(shape=shape, device=device), make_upstream(shape, device=device)
    got = run(backend, inputs, upstream, seed=-3, stop_gradient=False)
    for name, right in truth(inputs, upstream, seed=-3, stop_gradient=False).items():
        assert got[name].shape == right.value.shape
        assert norm(got[name].double().cpu() - right.value) <= bound_of(name) * norm(right.scale), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_distributions_are_exactly_zero_apart(device, backend):
    inputs = make_inputs("equal", (4, 32), device=device)
    got = run(backend, inputs, [None, *make_upstream((4, 32), device=device)[1:]], seed=0)
    for name in NAMES[1:]:
        assert torch.count_nonzero(got[name]) == 0, name


@pytest.mark.parametrize("backend", KERNELS)
def test_delta_is_not_rounded(device, backend):
    """Near 80 a float32 can be off by 4e-6, and then exp(delta) is by as much of itself. Here each delta is off
    by nearly that and in the same direction, so that no sum averages it away.
    """
    nothing = torch.zeros(1, 64, device=device)
    inputs = [t.requires_grad_() for t in (nothing.clone(), nothing + 2.0**-18 * 0.499, nothing.clone(), nothing + 80)]
    upstream = [None, None, torch.ones(1, device=device)]
    got, right = run(backend, inputs, upstream, seed=0), truth(inputs, upstream, seed=0)
    for name in ("reverse_kl", "posterior_logvar"):
        error = norm(got[name].double().cpu() - right[name].value) / norm(right[name].value)
        lost = norm(right[name].slack) / norm(right[name].value)
        assert error < 6e-7 < lost / 2, (name, error, lost)


# --- narrow dtypes ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize("regime", ["ordinary", "1e-2 apart", "log-variances to 30", "mean gaps of 1e4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(device, backend, stop_gradient, regime, dtype):
    """At most twice the error of the same PyTorch code in the same dtype, and one unit in the last place.

    The unit is for Triton's interpreter, which truncates a bfloat16 store.
    """
    inputs, upstream = make_inputs(regime, SHAPE, dtype, device), make_upstream(SHAPE, dtype, device)
    got = run(backend, inputs, upstream, seed=3, stop_gradient=stop_gradient)
    outputs = oracle(*inputs, true_noise(SHAPE, 3).float().to(device), stop_gradient=stop_gradient)
    eager = {**dict(zip(OUTPUTS, outputs, strict=True)), **gradients(outputs, inputs, upstream)}
    for name, right in truth(inputs, upstream, seed=3, stop_gradient=stop_gradient).items():
        assert got[name].dtype == (torch.float32 if name.endswith("kl") else dtype)
        fits = right.scale < torch.finfo(got[name].dtype).max
        error, eager_error = (torch.where(fits, t.double().cpu() - right.value, 0) for t in (got[name], eager[name]))
        unit = torch.where(fits, ulp(right.value, got[name].dtype), 0)
        assert norm(error) <= 2 * norm(eager_error) + norm(unit), name
        assert error.abs().max() <= 2 * eager_error.abs().max() + unit.max(), name
        if name.endswith("kl"):
            assert (error.abs() <= BOUND * right.scale + right.slack).all(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_dtypes(device, backend):
    dtypes = [torch.float16, torch.float32, torch.bfloat16, torch.float32]
    inputs = [
        t.detach().to(dtype).requires_grad_() for t, dtype in zip(make_inputs(device=device), dtypes, strict=True)
    ]
    upstream = make_upstream((3, 8), torch.float16, device)
    got = run(backend, inputs, upstream, seed=3)
    right = truth(inputs, upstream, seed=3)
    for name, dtype in zip(NAMES, [torch.float16, torch.float32, torch.float32, *dtypes], strict=True):
        assert got[name].dtype == dtype
        error = (got[name].double().cpu() - right[name].value).abs()
        assert (error <= budget(name, right[name], dtype, backend)).all(), name


def test_float64_inputs_stay_float64():
    rng = np.random.default_rng(0)
    inputs = [torch.from_numpy(a).requires_grad_() for a in draw("ordinary", (3, 8), rng)]
    upstream = [t.double() for t in make_upstream((3, 8))]
    got = run("torch", inputs, upstream, seed=0)
    assert {got[name].dtype for name in OUTPUTS + INPUTS} == {torch.float64}
    for name, right in truth(inputs, upstream, seed=0).items():
        # The noise itself is float32.
        bound = 6e-8 if name in ("z", "posterior_logvar") else 1e-14
        assert norm(got[name].detach() - right.value) <= bound * norm(right.scale), name
