"""`gaussian_dual_kl`: the oracle against float64 truths, every backend against the oracle."""

import doctest
import importlib

import pytest
import torch
from torch.distributions import Normal, kl_divergence

import amvl_fast
from amvl_fast.reference import gaussian_dual_kl as oracle
from amvl_fast.reference.gaussian import phi

BACKENDS = ["torch", "triton"]
NAMES = ["z", "forward_kl", "reverse_kl", "posterior_mean", "posterior_logvar", "prior_mean", "prior_logvar"]


def random_inputs(shape, dtype=torch.float32, scale=1.0, device="cpu"):
    torch.manual_seed(0)
    return [(torch.randn(shape) * scale).to(device, dtype) for _ in range(4)]


def near_equal_inputs(gap, device="cpu"):
    """Posterior and prior that differ by `gap` in every parameter, as training leaves them."""
    mean_q, logvar_q, d_mean, d_logvar = random_inputs((4, 32), device=device)
    return [mean_q, logvar_q, mean_q + gap * d_mean, logvar_q + gap * d_logvar]


def relative_error(value, right):
    return ((value.double().cpu() - right.cpu()).norm() / right.norm().cpu().clamp_min(1e-300)).item()


def run(function, inputs, weights, **options):
    """Outputs and gradients of `sum(weight * output)`, by name."""
    outputs = function(*inputs, **options)
    loss = sum((w * o).sum() for w, o in zip(weights, outputs, strict=True) if w is not None)
    grads = torch.autograd.grad(loss, [t for t in inputs if t.requires_grad])
    names = NAMES[:3] + [name for name, t in zip(NAMES[3:], inputs, strict=True) if t.requires_grad]
    return dict(zip(names, [*outputs, *grads], strict=True))


def run_in_float64(inputs, seed, weights, stop_gradient):
    """The oracle in float64 on the very numbers that the inputs hold."""
    inputs = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
    weights = [None if w is None else w.double() for w in weights]
    shape = torch.broadcast_shapes(*(t.shape for t in inputs))
    noise = amvl_fast.gaussian_noise(shape, seed).to(inputs[0].device)
    return run(oracle, inputs, weights, noise=noise, stop_gradient=stop_gradient)


def random_weights(shape, device="cpu", z_dtype=torch.float32):
    """Upstream weights of z and the KLs; z's hold in its dtype, so that autograd passes them on unrounded."""
    torch.manual_seed(1)
    weights = [torch.randn(size, device=device) for size in (shape, shape[:-1], shape[:-1])]
    return [weights[0].to(z_dtype).float(), *weights[1:]]


# --- the oracle ---


def test_oracle_is_torch_distributions():
    mean_q, logvar_q, mean_p, logvar_p = (t.double() for t in random_inputs((5, 3, 16), scale=2.0))
    noise = torch.randn(5, 3, 16, dtype=torch.float64)
    q, p = Normal(mean_q, (logvar_q / 2).exp()), Normal(mean_p, (logvar_p / 2).exp())
    out = oracle(mean_q, logvar_q, mean_p, logvar_p, noise)
    torch.testing.assert_close(out.z, q.loc + q.scale * noise, rtol=1e-13, atol=0)
    torch.testing.assert_close(out.forward_kl, kl_divergence(q, p).sum(-1), rtol=1e-12, atol=0)
    torch.testing.assert_close(out.reverse_kl, kl_divergence(p, q).sum(-1), rtol=1e-12, atol=0)


def test_phi_and_its_derivatives_are_accurate_and_smooth():
    """Near 0 three terms are exact in float64; from there phi(t) = (exp(t/2) - 1)^2 + 2 phi(t/2), which does
    not cancel, carries the truth across the seam at 1/2.
    """
    small = torch.logspace(-8, -5, 100, dtype=torch.float64)
    small = torch.cat([small, -small])
    torch.testing.assert_close(phi(small), small**2 / 2 * (1 + small / 3 + small**2 / 12), rtol=1e-14, atol=0)
    t = torch.cat([torch.linspace(-3, 3, 601, dtype=torch.float64), small]).requires_grad_()
    doubled = torch.expm1(t / 2) ** 2 + 2 * phi(t / 2)
    torch.testing.assert_close(phi(t), doubled, rtol=2e-15, atol=0)
    (slope,) = torch.autograd.grad(phi(t).sum(), t)
    torch.testing.assert_close(slope, torch.expm1(t), rtol=1e-14, atol=0)
    in_float32 = phi(t.detach().float())
    torch.testing.assert_close(in_float32.double(), phi(t.detach().float().double()), rtol=4e-7, atol=0)
    assert torch.isnan(phi(torch.tensor(float("nan"))))


@pytest.mark.parametrize("stop_gradient", [True, False])
def test_gradcheck(stop_gradient):
    inputs = [t.double().requires_grad_() for t in random_inputs((3, 5))]
    noise = torch.randn(3, 5, dtype=torch.float64)
    constants = [t.detach().clone() for t in inputs]

    def detached(*leaves):
        """What the stops mean, said with constants: numeric differences would see through a detach."""
        mean_q, logvar_q, mean_p, logvar_p = leaves
        q, p = constants[:2], constants[2:]
        z = oracle(*leaves, noise, stop_gradient=False).z
        forward_kl = oracle(*q, mean_p, logvar_p, noise, stop_gradient=False).forward_kl
        reverse_kl = oracle(mean_q, logvar_q, *p, noise, stop_gradient=False).reverse_kl
        return z, forward_kl, reverse_kl

    def plain(*leaves):
        return tuple(oracle(*leaves, noise, stop_gradient=False))

    function = detached if stop_gradient else plain
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
    for output in range(3):
        loss = oracle(*inputs, noise, stop_gradient=stop_gradient)[output].sum()
        grads = torch.autograd.grad(loss, inputs, materialize_grads=True)
        expected = torch.autograd.grad(function(*inputs)[output].sum(), inputs, materialize_grads=True)
        for grad, right in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, right, rtol=1e-12, atol=1e-14)


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
    for value, truth, bound in zip(out.double(), right, bounds, strict=True):
        normal = truth.abs() > torch.finfo(torch.float32).tiny
        torch.testing.assert_close(value[normal], truth[normal], rtol=bound, atol=0)

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


# --- every backend against the oracle ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize(
    ("shape", "scale"),
    [
        ((2, 3, 64), 1.0),
        ((1,), 1.0),  # no leading dimension, one column
        ((5, 1), 1.0),
        ((70, 7), 1.0),  # rows share blocks and do not fill the last one
        ((3, 1030), 1.0),  # a row longer than a block
        ((4, 33), 7.0),  # log-variances beyond +-20
    ],
)
def test_float32_against_float64(device, backend, stop_gradient, shape, scale):
    inputs = [t.requires_grad_() for t in random_inputs(shape, scale=scale, device=device)]
    weights = random_weights(shape, device)
    got = run(amvl_fast.gaussian_dual_kl, inputs, weights, seed=3, stop_gradient=stop_gradient, backend=backend)
    right = run_in_float64(inputs, 3, weights, stop_gradient)
    assert got["z"].dtype == got["forward_kl"].dtype == got["reverse_kl"].dtype == torch.float32
    for name in NAMES:
        assert got[name].shape == right[name].shape
        assert relative_error(got[name], right[name]) < (4e-7 if name == "z" else 4e-6), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gap", [1e-1, 1e-3, 1e-5])
def test_near_equal_distributions(device, backend, gap):
    inputs = [t.requires_grad_() for t in near_equal_inputs(gap, device)]
    weights = random_weights((4, 32), device)
    for stop_gradient in (True, False):
        got = run(amvl_fast.gaussian_dual_kl, inputs, weights, seed=3, stop_gradient=stop_gradient, backend=backend)
        right = run_in_float64(inputs, 3, weights, stop_gradient)
        for name in NAMES:
            assert relative_error(got[name], right[name]) < 4e-6, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_distributions_are_exactly_zero_apart(device, backend):
    mean, logvar = (t * 10 for t in random_inputs((4, 32), device=device)[:2])
    inputs = [t.clone().requires_grad_() for t in (mean, logvar, mean, logvar)]
    got = run(amvl_fast.gaussian_dual_kl, inputs, [None, torch.ones(4), torch.ones(4)], seed=0, backend=backend)
    for name in NAMES[1:]:
        assert torch.count_nonzero(got[name]) == 0, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(device, backend, dtype):
    """Inside, float32: the KLs are as good as float32's, the rest is off by the rounding to its dtype.

    Triton's interpreter truncates a bfloat16 store, hence a whole unit in the last place and not half of one.
    """
    inputs = [t.requires_grad_() for t in random_inputs((6, 48), dtype, device=device)]
    weights = random_weights((6, 48), device, dtype)
    got = run(amvl_fast.gaussian_dual_kl, inputs, weights, seed=3, backend=backend)
    right = run_in_float64(inputs, 3, weights, stop_gradient=True)
    for name in NAMES:
        value, truth = got[name].double(), right[name]
        if name.endswith("kl"):
            assert relative_error(value, truth) < 4e-6, name
        else:
            assert got[name].dtype == dtype
            torch.testing.assert_close(value, truth, rtol=torch.finfo(dtype).eps, atol=1e-6, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_dtypes(device, backend):
    inputs = random_inputs((6, 16), device=device)
    inputs = [t.to(dtype) for t, dtype in zip(inputs, [torch.float16, torch.float32] * 2, strict=True)]
    inputs = [t.requires_grad_() for t in inputs]
    weights = random_weights((6, 16), device, torch.float16)
    got = run(amvl_fast.gaussian_dual_kl, inputs, weights, seed=3, backend=backend)
    right = run_in_float64(inputs, 3, weights, stop_gradient=True)
    for name, dtype in zip(NAMES, [torch.float16, *[torch.float32] * 2, *[t.dtype for t in inputs]], strict=True):
        assert got[name].dtype == dtype
        assert relative_error(got[name], right[name]) < max(4e-6, torch.finfo(dtype).eps), name


def strided_inputs(kind, device):
    """Four leaves, and the views of them that the op is given."""
    torch.manual_seed(2)
    if kind == "chunks and an expanded prior":
        head, prior = torch.randn(3, 4, 36, device=device), torch.randn(4, 36, device=device)
        leaves = [head.requires_grad_(), prior.requires_grad_()]
        return leaves, [*head.chunk(2, -1), *prior.expand(3, 4, 36).chunk(2, -1)]
    if kind == "broadcast":
        shapes = [(3, 4, 18), (4, 1), (3, 1, 18), (18,)]
        leaves = [torch.randn(shape, device=device).requires_grad_() for shape in shapes]
        return leaves, leaves
    leaves = [torch.randn(4, 3, 18, device=device).requires_grad_() for _ in range(4)]
    if kind == "transposed rows":
        return leaves, [leaf.transpose(0, 1) for leaf in leaves[:2]] + [leaf.view(3, 4, 18) for leaf in leaves[2:]]
    if kind == "columns apart":
        return leaves, [leaf.transpose(0, 2) for leaf in leaves]
    assert kind == "too many strides"
    leaves = [torch.randn(2, 3, 4, 5, device=device).requires_grad_() for _ in range(4)]
    return leaves, [leaf.permute(2, 1, 0, 3) for leaf in leaves]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", ["weights", "expanded"])
@pytest.mark.parametrize(
    "kind",
    ["chunks and an expanded prior", "broadcast", "transposed rows", "columns apart", "too many strides"],
)
def test_strides(device, backend, grad, kind):
    leaves, views = strided_inputs(kind, device)
    shape = torch.broadcast_shapes(*(view.shape for view in views))
    # A plain sum hands the backward pass gradients expanded from one number.
    weights = [w if grad == "weights" else w.new_ones(()) for w in random_weights(shape, device)]

    def gradients(outputs):
        loss = sum((w * o).sum() if w.dim() else o.sum() for w, o in zip(weights, outputs, strict=True))
        return torch.autograd.grad(loss, leaves, retain_graph=True)

    outputs = amvl_fast.gaussian_dual_kl(*views, seed=5, backend=backend)
    noise = amvl_fast.gaussian_noise(shape, 5).double().to(device)
    truth = oracle(*(view.double() for view in views), noise)
    for got, right in zip([*outputs, *gradients(outputs)], [*truth, *gradients(truth)], strict=True):
        assert got.shape == right.shape
        assert relative_error(got, right.detach().double()) < 4e-6


def test_views_are_not_copied(device):
    """Chunks, expanded priors and transposed rows reach the kernel as they are."""
    from amvl_fast.kernels.triton.layout import as_rows

    for kind in ["chunks and an expanded prior", "transposed rows", "columns apart"]:
        _, views = strided_inputs(kind, device)
        views = list(torch.broadcast_tensors(*views))
        assert all(a is b for a, b in zip(as_rows(views[0].shape, views).tensors, views, strict=True)), kind


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_stop_where_they_must(device, backend):
    for index, moved in [(1, {"prior_mean", "prior_logvar"}), (2, {"posterior_mean", "posterior_logvar"})]:
        for stop_gradient in (True, False):
            inputs = [t.requires_grad_() for t in random_inputs((3, 8), device=device)]
            out = amvl_fast.gaussian_dual_kl(*inputs, seed=0, stop_gradient=stop_gradient, backend=backend)
            grads = torch.autograd.grad(out[index].sum(), inputs, materialize_grads=True)
            alive = {name for name, g in zip(NAMES[3:], grads, strict=True) if torch.count_nonzero(g)}
            assert alive == (moved if stop_gradient else set(NAMES[3:]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needed", [(0,), (1,), (2, 3), (0, 3), (1, 2)])
@pytest.mark.parametrize("used", [(0,), (1, 2), (0, 2)])
def test_any_combination_of_gradients(device, backend, needed, used):
    inputs = [t.requires_grad_(i in needed) for i, t in enumerate(random_inputs((3, 8), device=device))]
    leaves = [t for t in inputs if t.requires_grad]
    weights = random_weights((3, 8), device)

    def gradients(outputs):
        loss = sum((weights[i] * outputs[i]).sum() for i in used)
        if not loss.requires_grad:  # z alone does not move the prior
            return [None] * len(leaves)
        return torch.autograd.grad(loss, leaves, allow_unused=True)

    got = amvl_fast.gaussian_dual_kl(*inputs, seed=3, stop_gradient=False, backend=backend)
    right = oracle(*inputs, amvl_fast.gaussian_noise((3, 8), 3).to(device), stop_gradient=False)
    for grad, expected in zip(gradients(got), gradients(right), strict=True):
        grad, expected = (torch.zeros(()) if g is None else g for g in (grad, expected))
        torch.testing.assert_close(grad, expected.expand_as(grad), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_does_not_depend_on_its_neighbours(device, backend):
    """A NaN stays in its row, and a row's outputs are the same bits in any batch."""
    inputs = random_inputs((6, 40), device=device)
    clean = amvl_fast.gaussian_dual_kl(*inputs, seed=0, backend=backend)
    part = amvl_fast.gaussian_dual_kl(*(t[:2] for t in inputs), seed=0, backend=backend)
    for t in inputs:
        t[3, 7] = float("nan")
        dirty = amvl_fast.gaussian_dual_kl(*inputs, seed=0, backend=backend)
        others = [0, 1, 2, 4, 5]
        for before, after, alone in zip(clean, dirty, part, strict=True):
            assert torch.equal(before[others], after[others])
            if backend == "triton":  # PyTorch sums in an order that depends on the shape
                assert torch.equal(before[:2], alone)
        assert torch.isnan(dirty.forward_kl[3])
        assert torch.isnan(dirty.reverse_kl[3])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (3, 0)])
def test_empty(device, backend, shape):
    inputs = [torch.randn(shape, device=device).requires_grad_() for _ in range(4)]
    out = amvl_fast.gaussian_dual_kl(*inputs, seed=0, backend=backend)
    assert out.z.shape == shape
    assert out.forward_kl.shape == out.reverse_kl.shape == shape[:-1]
    assert not out.forward_kl.any()
    for grad in torch.autograd.grad(sum(o.sum() for o in out), inputs):
        assert grad.shape == shape


def test_float64_inputs_stay_float64():
    inputs = [t.double() for t in random_inputs((3, 8))]
    out = amvl_fast.gaussian_dual_kl(*inputs, seed=0)
    assert {o.dtype for o in out} == {torch.float64}
    with pytest.raises(amvl_fast.errors.AMVLError, match=r"torch\.float64: use backend='torch'"):
        amvl_fast.gaussian_dual_kl(*inputs, seed=0, backend="triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointing_replays_the_noise(device, backend):
    from torch.utils.checkpoint import checkpoint

    def loss(*leaves):
        out = amvl_fast.gaussian_dual_kl(*leaves, backend=backend)
        return (out.z**3).sum() + out.forward_kl.sum()

    grads = []
    for wrap in (
        lambda *leaves: loss(*leaves),
        lambda *leaves: checkpoint(loss, *leaves, use_reentrant=False),
    ):
        inputs = [t.requires_grad_() for t in random_inputs((3, 8), device=device)]
        torch.manual_seed(4)
        grads.append(torch.autograd.grad(wrap(*inputs), inputs))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    "module",
    [
        "amvl_fast.reference.gaussian",
        "amvl_fast.ops.gaussian_dual_kl",
        "amvl_fast.ops.sample_gaussian",
        "amvl_fast.ops.gaussian_noise",
    ],
)
def test_docstrings(module):
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted
    assert not result.failed
