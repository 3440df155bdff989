"""`sample_gaussian`, and what all latent ops do with bad arguments."""

import importlib

import pytest
import torch
from latent_ops import BACKENDS as PARAMETERS
from latent_ops import KERNELS, Z_BOUND, device_for, relative_error, true_noise, ulp

import amvl_fast
from amvl_fast.errors import AMVLError
from amvl_fast.ops import BACKENDS, backend_status, backends
from amvl_fast.ops.arguments import seed_tensor

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def make_inputs(shape, device, dtype=torch.float32, scale=1.0):
    torch.manual_seed(0)
    mean, logvar, upstream = (torch.randn(shape).to(device, dtype) for _ in range(3))
    return mean.requires_grad_(), (scale * logvar).detach().requires_grad_(), upstream


@pytest.mark.parametrize("backend", PARAMETERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "temperature", "scale"),
    [((2, 3, 18), 1.0, 1.0), ((5, 1), 0.3, 1.0), ((2, 1027), 2.5, 1.0), ((3, 40), 1e-3, 10.0), ((1,), 7.0, 1.0)],
)
def test_against_float64(device, backend, dtype, shape, temperature, scale):
    mean, logvar, upstream = make_inputs(shape, device, dtype, scale)
    z = amvl_fast.sample_gaussian(mean, logvar, temperature=temperature, seed=3, stream=2, backend=backend)
    grads = torch.autograd.grad(z, [mean, logvar], upstream)

    mean, logvar = (t.detach().cpu().double().requires_grad_() for t in (mean, logvar))
    right = mean + temperature * torch.exp(logvar / 2) * true_noise(shape, 3, stream=2)
    expected = torch.autograd.grad(right, [mean, logvar], upstream.cpu().double())
    assert z.dtype == dtype
    for got, truth in zip([z, *grads], [right.detach(), *expected], strict=True):
        fits = truth.abs() < torch.finfo(dtype).max
        truth, error = truth[fits], got.detach().cpu().double()[fits] - truth[fits]
        allowed = Z_BOUND * (truth.norm() + mean.detach()[fits].norm())
        # The whole unit is for Triton's interpreter, which truncates a bfloat16 store.
        assert error.norm() <= allowed + (0 if dtype == torch.float32 else ulp(truth, dtype).norm())


@pytest.mark.parametrize("backend", PARAMETERS)
@pytest.mark.parametrize("needed", [0, 1])
def test_one_gradient_alone(device, backend, needed):
    inputs = [t.detach() for t in make_inputs((3, 8), device)]
    inputs[needed].requires_grad_()
    z = amvl_fast.sample_gaussian(*inputs[:2], temperature=0.5, seed=1, backend=backend)
    (grad,) = torch.autograd.grad(z, inputs[needed], inputs[2])
    spread = 0.25 * torch.exp(inputs[1].double() / 2) * true_noise((3, 8), 1).to(device)
    assert relative_error(grad, inputs[2].double() * (spread if needed else 1)) < Z_BOUND


@pytest.mark.parametrize("backend", PARAMETERS)
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0,), (2, 0, 3)])
def test_empty(device, backend, shape):
    mean, logvar, upstream = make_inputs(shape, device)
    z = amvl_fast.sample_gaussian(mean, logvar, seed=1, backend=backend)
    assert z.shape == shape
    assert all(grad.shape == shape for grad in torch.autograd.grad(z, [mean, logvar], upstream))


@pytest.mark.parametrize("backend", PARAMETERS)
def test_strides_and_broadcasting(device, backend):
    head = torch.randn(3, 4, 36, device=device)
    mean, logvar = head.chunk(2, -1)
    same = amvl_fast.sample_gaussian(mean.contiguous(), logvar.contiguous(), seed=1, backend=backend)
    assert torch.equal(amvl_fast.sample_gaussian(mean, logvar, seed=1, backend=backend), same)
    expanded = amvl_fast.sample_gaussian(mean[:1], logvar, seed=1, backend=backend)
    assert torch.equal(expanded[0], same[0])
    assert expanded.shape == same.shape
    # Upstream gradients of any strides, too.
    leaves = [t.detach().requires_grad_() for t in (mean, logvar)]
    z = amvl_fast.sample_gaussian(*leaves, seed=1, backend=backend)
    upstream = torch.randn(18, 4, 3, device=device).permute(2, 1, 0)
    pair = [torch.autograd.grad(z, leaves, g, retain_graph=True) for g in (upstream, upstream.contiguous())]
    assert all(torch.equal(a, b) for a, b in zip(*pair, strict=True))


@pytest.mark.parametrize("backend", KERNELS)
def test_a_row_has_the_same_bits_in_any_batch(device, backend):
    mean, logvar, _ = make_inputs((150, 7), device)
    whole = amvl_fast.sample_gaussian(mean, logvar, seed=1, backend=backend)
    assert torch.equal(amvl_fast.sample_gaussian(mean, logvar, seed=1, backend=backend), whole)
    for rows in (1, 64, 149):
        part = amvl_fast.sample_gaussian(mean[:rows], logvar[:rows], seed=1, backend=backend)
        assert torch.equal(part, whole[:rows])


@pytest.mark.parametrize("backend", PARAMETERS)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_nan_stays_where_it_is(device, backend, value):
    mean, logvar, _ = make_inputs((5, 9), device)
    clean = amvl_fast.sample_gaussian(mean, logvar, seed=1, backend=backend)
    for index in range(2):
        inputs = [t.detach().clone() for t in (mean, logvar)]
        inputs[index][3, 7] = float(value)
        dirty = amvl_fast.sample_gaussian(*inputs, seed=1, backend=backend)
        assert not dirty[3, 7].isfinite() or (index == 1 and value == "-inf")
        dirty[3, 7] = clean[3, 7]
        assert torch.equal(dirty, clean)


@pytest.mark.parametrize("backend", PARAMETERS)
def test_the_noise_is_that_of_gaussian_dual_kl(device, backend):
    mean, logvar, _ = make_inputs((3, 8), device)
    z = amvl_fast.gaussian_dual_kl(mean, logvar, mean, logvar, seed=7, backend=backend).z
    assert torch.equal(amvl_fast.sample_gaussian(mean, logvar, seed=7, backend=backend), z)
    other = amvl_fast.sample_gaussian(mean, logvar, seed=7, stream=1, backend=backend)
    assert not torch.equal(other, z)


@pytest.mark.parametrize("backend", PARAMETERS)
def test_temperature_zero_is_the_mean(device, backend):
    mean, logvar = torch.randn(3, 8, device=device), torch.full((3, 8), 1e4, device=device)
    z = amvl_fast.sample_gaussian(mean, logvar, temperature=0, seed=1, backend=backend)
    assert torch.equal(z, mean)
    assert z.data_ptr() != mean.data_ptr()


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: amvl_fast.sample_gaussian(X, X, temperature=-0.1), "temperature is -0.1"),
        (lambda: amvl_fast.sample_gaussian(X, X, temperature=float("nan")), "temperature is nan"),
        (lambda: amvl_fast.sample_gaussian(X, X, temperature="hot"), "temperature is 'hot'"),
        (
            lambda: amvl_fast.sample_gaussian(X, torch.zeros(4)),
            r"do not broadcast \(mean \[2, 3\], logvar \[4\]\)",
        ),
        (lambda: amvl_fast.gaussian_dual_kl(X, X, X, torch.zeros(3, 3)), r"prior_logvar \[3, 3\]"),
        (lambda: amvl_fast.gaussian_dual_kl(X, X.long(), X, X), "posterior_logvar is torch.int64"),
        (lambda: amvl_fast.gaussian_dual_kl(X, X, X.sum(), X), "prior_mean is 0-dimensional"),
        (lambda: amvl_fast.gaussian_dual_kl(X, X, X.to("meta"), X), "prior_mean on meta"),
        (lambda: amvl_fast.sample_gaussian(X, [0.0]), "logvar is a list"),
        (lambda: amvl_fast.sample_gaussian(X, X, seed=1.5), "seed is 1.5"),
        (lambda: amvl_fast.sample_gaussian(X, X, seed=2**63), "does not fit 64 bits"),
        (lambda: amvl_fast.sample_gaussian(X, X, seed=torch.zeros(2, dtype=torch.int64)), r"shape \[2\]"),
        (lambda: amvl_fast.sample_gaussian(X, X, seed=torch.zeros(1)), "seed is a torch.float32"),
        (lambda: amvl_fast.sample_gaussian(X, X, seed=True), "seed is True"),
        (lambda: amvl_fast.sample_gaussian(X, X, stream=-1), "stream is -1"),
        (lambda: amvl_fast.sample_gaussian(X, X, stream=2**32), "stream is 4294967296"),
        (lambda: amvl_fast.sample_gaussian(X, X, stream=True), "stream is True"),
        (lambda: amvl_fast.gaussian_noise((), 0), r"shape is \[\]"),
        (lambda: amvl_fast.gaussian_noise((2, -1), 0), r"shape is \[2, -1\]"),
        (lambda: amvl_fast.gaussian_noise((2.7, 3), 0), r"shape is \(2\.7, 3\); pass a sequence of ints"),
        (lambda: amvl_fast.gaussian_noise(5, 0), "shape is 5; pass a sequence of ints"),
        (lambda: amvl_fast.gaussian_noise("23", 0), "shape is '23'; pass a sequence of ints"),
        (
            lambda: amvl_fast.gaussian_noise((2, 3), 0, device="gpu"),
            r"gaussian_noise: device is 'gpu' \(.*gpu.*\); pass",
        ),
        (lambda: amvl_fast.gaussian_noise((2, 3), 0, device=1.5), r"device is 1\.5 \("),
        (lambda: amvl_fast.gaussian_noise((2, 3), 0, device="cuda:99"), "device is 'cuda:99'"),
        (lambda: amvl_fast.sample_gaussian(X, X, backend="numpy"), "'triton', .*'torch'"),
        (
            lambda: amvl_fast.gaussian_dual_kl(*[X.double().to(device_for("triton"))] * 4, backend="triton"),
            r"torch\.float64: use backend='torch'",
        ),
    ],
)
def test_bad_arguments_get_one_sentence(call, message):
    with pytest.raises(AMVLError, match=message) as error:
        call()
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


def test_a_drawn_seed_has_many_bits():
    seeds = [seed_tensor("op", None, torch.device("cpu")).item() for _ in range(100)]
    assert max(seeds) > 2**62
    assert len({seed % 2**32 for seed in seeds}) == 100


@pytest.fixture
def without_kernels(monkeypatch):
    """As where neither Triton nor a C++ compiler was to be had."""
    caches = [f for f in vars(backends).values() if hasattr(f, "cache_clear")]
    monkeypatch.setattr(backends, "_import_kernels", lambda name: f"{name} cannot be imported (gone)")
    for function in caches:
        function.cache_clear()
    yield
    for function in caches:
        function.cache_clear()


def test_a_named_backend_never_falls_back(without_kernels, monkeypatch):
    kernels = [name for name in BACKENDS if name != "torch"]
    assert backend_status() == {name: f"{name} cannot be imported (gone)" for name in kernels} | {"torch": None}
    noise = amvl_fast.gaussian_noise((2, 3), 0)
    assert torch.equal(noise, amvl_fast.gaussian_noise((2, 3), 0, backend="torch"))
    for name in kernels:
        with pytest.raises(AMVLError, match=rf"backend='{name}' cannot run here: {name} cannot be imported \(gone\)"):
            amvl_fast.gaussian_noise((2, 3), 0, backend=name)
        monkeypatch.setenv("AMVL_FAST_BACKEND", name)
        with pytest.raises(AMVLError, match=f"AMVL_FAST_BACKEND='{name}' cannot run here"):
            amvl_fast.gaussian_noise((2, 3), 0)
        # The call's own word comes first.
        assert torch.equal(noise, amvl_fast.gaussian_noise((2, 3), 0, backend="torch"))
        monkeypatch.delenv("AMVL_FAST_BACKEND")
    monkeypatch.setenv("AMVL_FAST_BACKEND", "fast")
    with pytest.raises(AMVLError, match="AMVL_FAST_BACKEND='fast' is not a backend"):
        amvl_fast.gaussian_noise((2, 3), 0)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("No module named 'kernels'"), "not installed (No module"),
        (OSError("cannot open it"), "library is missing (cannot open it)"),
        (ImportError("built from other sources"), "different versions (built from other sources): reinstall"),
        (AttributeError("undefined symbol"), "different versions (undefined symbol): reinstall"),
    ],
)
def test_what_does_not_load_says_why(monkeypatch, error, reason):
    def fail(name):
        raise error

    monkeypatch.setattr(backends, "import_module", fail)
    backends._import_kernels.cache_clear()
    try:
        assert reason in backend_status()["cpu"]
    finally:
        backends._import_kernels.cache_clear()


@pytest.mark.parametrize("backend", KERNELS)
def test_the_environment_variable_is_followed(monkeypatch, device, backend):
    monkeypatch.setenv("AMVL_FAST_BACKEND", backend)
    kernels = importlib.import_module(f"amvl_fast.kernels.{backend}")
    calls = []
    monkeypatch.setattr(kernels, "gaussian_noise", lambda *args: calls.append(args))
    amvl_fast.gaussian_noise((2, 3), 0, device=device)
    assert len(calls) == 1


@pytest.mark.parametrize("backend", PARAMETERS)
def test_every_backend_is_here(device, backend):
    """A test that no backend runs would pass. What may be missing is said in latent_ops."""
    assert backend_status()[backend] is None
