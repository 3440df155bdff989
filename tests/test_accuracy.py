"""How far the latent op may be from the truth: every backend against the float64 truth (of which test_reference).

The limits are those of the README: relative in norm, 4e-7 for z and 4e-6 for KLs and gradients, everywhere.
"""

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

import amvl_fast
from amvl_fast.reference import gaussian_dual_kl as oracle
from amvl_fast.reference.gaussian import phi

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SHAPE = (6, 48)


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wide_prior_is_not_infinitely_wide(device, backend):
    """Its mean moves by exp(-60), little but exactly so; beside other elements that would not be seen in norm."""
    numbers = (1.0, 0.0, 0.0, 60.0)
    inputs = [torch.full((1, 5), number, device=device, requires_grad=True) for number in numbers]
    got = run(backend, inputs, [None, torch.ones(1, device=device), None], seed=0)["prior_mean"]
    torch.testing.assert_close(got.double().cpu(), torch.full((1, 5), -60.0).double().exp().neg(), rtol=BOUND, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("logvar_q", "logvar_p"), [(-200.0, -200.0), (-100.0, -200.0), (-1e4, -1e4)])
def test_no_gap_is_no_gap_in_any_unit(device, backend, logvar_q, logvar_p):
    """At a log-variance of -200 what the gap is divided by is no float32; 0 divided by it still is 0, and no NaN."""
    numbers = (0.0, logvar_q, 0.0, logvar_p)
    inputs = [torch.full((3, 5), number, device=device, requires_grad=True) for number in numbers]
    got = run(backend, inputs, [None, *make_upstream((3, 5), device=device)[1:]], seed=0)
    assert torch.count_nonzero(got["prior_mean"]) == torch.count_nonzero(got["posterior_mean"]) == 0
    assert not any(value.isnan().any() for value in got.values())
    if logvar_q == logvar_p:
        assert all(torch.count_nonzero(got[name]) == 0 for name in NAMES[1:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("logvar_q", "logvar_p", "gap"),
    [(-170, 10, 1e4), (10, -170, 1e-4), (-100, 100, 1e20), (-170, 170, 1), (-87, 87, 3)],
)
def test_kls_of_extremes(device, backend, logvar_q, logvar_p, gap):
    """Right where they are a float32, even if only one of the two is; inf where not."""
    compare_extremes(device, backend, logvar_q, logvar_p, gap)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_kls_of_deviations_that_are_no_normal_float32(device, backend):
    """Which the Triton kernels give up, for registers."""
    compare_extremes(device, backend, -200, -200, 1e-30)


def compare_extremes(device, backend, logvar_q, logvar_p, gap):
    numbers = [torch.full((1, 5), float(number)) for number in (gap, logvar_q, 0, logvar_p)]
    got = amvl_fast.gaussian_dual_kl(*(t.to(device) for t in numbers), seed=0, backend=backend)
    right = oracle(*(t.double() for t in numbers), torch.zeros(1, 5).double())
    for value, expected in zip(got[1:], right[1:], strict=True):
        torch.testing.assert_close(value.double().cpu(), expected.float().double(), rtol=BOUND, atol=0)


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_long_row_of_equal_terms_loses_nothing(device, backend):
    """Each addition in float32 would round the same way, and one after the other such a row has thousands of them."""
    columns = 2**18 if backend == "cpu" else 8192
    mean_q, logvar_q, mean_p, logvar_p = torch.tensor([0.3, -0.7, -0.4, 0.45], device=device)
    inputs = [t.expand(1, columns) for t in (mean_q, logvar_q, mean_p, logvar_p)]
    right = closed_form(inputs, torch.zeros(1, columns), [None] * 3, stop_gradient=True)
    got = run(backend, inputs, [None] * 3, seed=0)
    for name in ("forward_kl", "reverse_kl"):
        assert got[name].item() == pytest.approx(right[name].value.item(), rel=1e-6), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("logvar_q", "logvar_p"), [(90.0, -10.0), (2e4, 0.0)])
@pytest.mark.parametrize("mirrored", [False, True])
def test_what_overflows_spoils_nothing_else(device, backend, logvar_q, logvar_p, mirrored):
    """Where one KL overflows, the other and its gradients are right. An upstream gradient that is missing is no weight
    of 0, which would make NaN of an overflow; and neither is a gradient that is stopped a product with 0.
    """
    if mirrored:
        logvar_q, logvar_p = logvar_p, logvar_q
    values = [0.0, logvar_q, 0.0, logvar_p]
    inputs = [torch.tensor([[value]], device=device, requires_grad=True) for value in values]
    weight = torch.ones(1, device=device)
    upstream = [None, weight, None] if mirrored else [None, None, weight]
    got, right = run(backend, inputs, upstream, seed=0), truth(inputs, upstream, seed=0)
    overflown, finite = ("reverse_kl", "forward_kl") if mirrored else ("forward_kl", "reverse_kl")
    assert got[overflown].isinf()
    for name in (finite, *INPUTS):
        torch.testing.assert_close(got[name].detach().double().cpu(), right[name].value, rtol=BOUND, atol=TINY)
    got = run(backend, inputs, [None, weight, weight], seed=0)
    for name in INPUTS[2:] if mirrored else INPUTS[:2]:
        torch.testing.assert_close(got[name].double().cpu(), right[name].value, rtol=BOUND, atol=TINY)


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_numbers_are_read_exactly_and_written_to_nearest_even(device, backend, dtype):
    """As PyTorch casts them, bit for bit: with unit variances, the gradients of the means are the gap."""
    step = 101 if backend == "triton" else 1  # every number is much for the interpreter
    narrow = torch.arange(-(2**15), 2**15, step, dtype=torch.int32).to(torch.int16)
    larger = (narrow + 1).view(dtype).float()
    narrow = narrow.view(dtype)
    # The largest bfloat16s, doubled on the way by autograd, would not fit float32.
    fits = (larger.abs() < 2.0**126) & ((narrow == 0) | (narrow.float().abs() >= TINY))
    narrow, larger = narrow[fits].to(device), larger[fits].to(device)
    ones = torch.ones(1, device=device)

    def gap(mean_q, mean_p, name):
        means = [t.unsqueeze(0).requires_grad_() for t in (mean_q, mean_p)]
        zeros = torch.zeros_like(means[0], dtype=torch.float32)
        return run(backend, [means[0], zeros, means[1], zeros], [None, ones, ones], seed=0)[name][0]

    got = gap(torch.zeros_like(larger), narrow.clone(), "posterior_mean")
    assert torch.equal(got, -narrow.float())
    if backend == "triton" and device.type == "cpu" and dtype == torch.bfloat16:
        return  # the interpreter truncates
    # Each number, and what lies a quarter, half and three quarters of the way to the next; then float16's last.
    wide = torch.cat([narrow + (larger - narrow) * k for k in (0, 0.25, 0.5, 0.75)])
    wide = torch.cat([wide, wide.new_tensor([65519.0, 65520.0, 1e6])])
    assert torch.equal(gap(wide.clone(), torch.zeros_like(wide, dtype=dtype), "prior_mean"), -wide.to(dtype))


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
