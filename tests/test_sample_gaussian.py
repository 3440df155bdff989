"""`sample_gaussian`, and what all latent ops do with bad arguments."""

import importlib

import pytest
import torch

import amvl_fast
from amvl_fast.errors import AMVLError
from amvl_fast.ops.backends import backend_status

BACKENDS = ["torch", "triton"]


def random_inputs(shape, device, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(shape).to(device, dtype).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "temperature"), [((2, 3, 18), 1.0), ((5, 1), 0.3), ((2, 1027), 2.5)])
def test_against_float64(device, backend, dtype, shape, temperature):
    mean, logvar = random_inputs(shape, device, dtype)
    weight = torch.randn(shape, device=device, dtype=dtype)
    options = {"temperature": temperature, "seed": 3, "stream": 2}
    z = amvl_fast.sample_gaussian(mean, logvar, backend=backend, **options)
    grads = torch.autograd.grad((weight * z).sum(), [mean, logvar])

    mean, logvar = (t.detach().double().requires_grad_() for t in (mean, logvar))
    noise = amvl_fast.gaussian_noise(shape, 3, stream=2).double().to(device)
    right = mean + temperature * torch.exp(logvar / 2) * noise
    expected = torch.autograd.grad((weight.double() * right).sum(), [mean, logvar])
    assert z.dtype == dtype
    for got, truth in zip([z, *grads], [right, *expected], strict=True):
        error = (got.double() - truth).norm() / truth.norm()
        assert error < max(4e-7, torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_broadcasting(device, backend):
    head = torch.randn(3, 4, 36, device=device)
    mean, logvar = head.chunk(2, -1)
    same = amvl_fast.sample_gaussian(mean.contiguous(), logvar.contiguous(), seed=1, backend=backend)
    assert torch.equal(amvl_fast.sample_gaussian(mean, logvar, seed=1, backend=backend), same)
    expanded = amvl_fast.sample_gaussian(mean[:1], logvar, seed=1, backend=backend)
    assert torch.equal(expanded[0], same[0])
    assert expanded.shape == same.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_noise_is_that_of_gaussian_dual_kl(device, backend):
    mean, logvar = random_inputs((3, 8), device)
    z = amvl_fast.gaussian_dual_kl(mean, logvar, mean, logvar, seed=7, backend=backend).z
    assert torch.equal(amvl_fast.sample_gaussian(mean, logvar, seed=7, backend=backend), z)
    other = amvl_fast.sample_gaussian(mean, logvar, seed=7, stream=1, backend=backend)
    assert not torch.equal(other, z)


@pytest.mark.parametrize("backend", BACKENDS)
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
        (lambda: amvl_fast.sample_gaussian(X, X, stream=-1), "stream is -1"),
        (lambda: amvl_fast.gaussian_noise((), 0), r"shape is \[\]"),
        (lambda: amvl_fast.gaussian_noise((2, -1), 0), r"shape is \[2, -1\]"),
        (lambda: amvl_fast.sample_gaussian(X, X, backend="numpy"), "'triton', 'torch'"),
    ],
)
def test_bad_arguments_get_one_sentence(call, message):
    with pytest.raises(AMVLError, match=message) as error:
        call()
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


def test_a_named_backend_never_falls_back(monkeypatch):
    from amvl_fast.ops import backends

    monkeypatch.setattr(backends, "_import_kernels", lambda: "Triton cannot be imported (gone)")
    assert backend_status() == {"triton": "Triton cannot be imported (gone)", "torch": None}
    with pytest.raises(AMVLError, match=r"backend='triton' cannot run here: Triton cannot be imported \(gone\)"):
        amvl_fast.gaussian_noise((2, 3), 0, backend="triton")
    amvl_fast.gaussian_noise((2, 3), 0)
    monkeypatch.setenv("AMVL_FAST_BACKEND", "triton")
    with pytest.raises(AMVLError, match="AMVL_FAST_BACKEND='triton' cannot run here"):
        amvl_fast.gaussian_noise((2, 3), 0)
    amvl_fast.gaussian_noise((2, 3), 0, backend="torch")  # the call's own word comes first
    monkeypatch.setenv("AMVL_FAST_BACKEND", "fast")
    with pytest.raises(AMVLError, match="AMVL_FAST_BACKEND='fast' is not a backend"):
        amvl_fast.gaussian_noise((2, 3), 0)


def test_the_environment_variable_is_followed(monkeypatch, device):
    monkeypatch.setenv("AMVL_FAST_BACKEND", "triton")
    kernels = importlib.import_module("amvl_fast.kernels.triton")
    calls = []
    monkeypatch.setattr(kernels, "gaussian_noise", lambda *args: calls.append(args))
    amvl_fast.gaussian_noise((2, 3), 0, device=device)
    assert len(calls) == 1
