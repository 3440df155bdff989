"""The latent ops under what PyTorch does to functions: torch.compile, autocast, checkpointing, torch.func."""

import shutil

import pytest
import torch
from latent_ops import KERNELS, device_for
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import amvl_fast
from amvl_fast.errors import AMVLError


def leaves(shape, device, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(4)]


compiles = pytest.mark.skipif(
    not torch.cuda.is_available() and not any(map(shutil.which, ("c++", "g++", "clang++"))),
    reason="there is no C++ compiler on PATH for torch.compile",
)


# "torch" needs no operator of ours: it is made of PyTorch's.
@pytest.fixture(params=KERNELS)
def backend(request):
    return request.param


@pytest.fixture
def device(backend):
    return device_for(backend)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def latents(mean_q, logvar_q, mean_p, logvar_p, seed, backend):
    """All three ops, with something for the compiler to fuse around them."""
    out = amvl_fast.gaussian_dual_kl(mean_q * 2, logvar_q, mean_p, logvar_p, seed=seed, backend=backend)
    sample = amvl_fast.sample_gaussian(mean_p, logvar_p, temperature=0.5, seed=seed, stream=1, backend=backend)
    noise = amvl_fast.gaussian_noise(out.z.shape, seed, device=out.z.device, backend=backend)
    return (out.z * noise).tanh().sum() + (out.forward_kl + 2 * out.reverse_kl).sum() + sample.square().sum()


@compiles
@pytest.mark.parametrize("needed", [(0, 1, 2, 3), (2,)])
def test_compile_is_one_graph_for_all_lengths(backend, device, needed):
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(latents, backend=counter, fullgraph=True, dynamic=True)
    seed = torch.tensor([3], device=device)
    for length in (3, 5, 4):
        inputs = leaves((length, 2, 12), device)
        wanted = [inputs[i] for i in needed]
        for i in {0, 1, 2, 3} - set(needed):
            inputs[i].requires_grad_(False)
        results = []
        for function in (latents, compiled):
            loss = function(*inputs, seed, backend)
            results.append([loss, *torch.autograd.grad(loss, wanted)])
        for eager, got in zip(*results, strict=True):
            torch.testing.assert_close(got, eager, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1

    inputs = [t.requires_grad_() for t in inputs]
    compiled(*inputs, seed, backend).backward()  # all gradients wanted: another graph
    assert operators(lambda: compiled(*inputs, seed, backend).backward()) == {
        "gaussian_dual_kl_forward": 1,
        "gaussian_dual_kl_backward": 1,
        "sample_gaussian_forward": 1,
        "sample_gaussian_backward": 1,
        "gaussian_noise": 1,
    }


def operators(run):
    """How often each operator of ours is called."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    events = {event.key: event.count for event in profile.key_averages()}
    return {key.removeprefix("amvl_fast::"): n for key, n in events.items() if key.startswith("amvl_fast::")}


@compiles
def test_compiled_seeds_come_from_the_generator(backend, device):
    compiled = torch.compile(lambda *t: amvl_fast.gaussian_dual_kl(*t, backend=backend).z, fullgraph=True)
    inputs = leaves((2, 8), device)
    torch.manual_seed(1)
    first, second = compiled(*inputs), compiled(*inputs)
    torch.manual_seed(1)
    assert torch.equal(compiled(*inputs), first)
    assert not torch.equal(first, second)


def test_eager_calls_pass_no_dispatcher(backend, device):
    """Called directly when nothing compiles: the operators do not show up, forward or backward."""
    inputs = leaves((2, 8), device)
    assert not operators(lambda: latents(*inputs, torch.tensor([0], device=device), backend).backward())


@pytest.mark.parametrize("ids", [None, [7, 2**40, 0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(backend, device, dtype, ids):
    inputs = [t.detach() for t in leaves((3, 2, 8), device, dtype)]
    seed = torch.tensor([5], device=device)
    sample_ids = None if ids is None else torch.tensor(ids, device=device)
    ops = torch.ops.amvl_fast
    upstream = [torch.randn_like(inputs[0]), torch.randn(3, 2, device=device), None]
    for arguments in [
        (ops.gaussian_dual_kl_forward.default, (*inputs, seed, sample_ids, backend)),
        (
            ops.gaussian_dual_kl_backward.default,
            (*inputs, seed, sample_ids, *upstream, [True, False, True, True], True, backend),
        ),
        (
            ops.gaussian_dual_kl_backward.default,
            (*inputs, seed, sample_ids, None, None, upstream[1], [True] * 4, False, backend),
        ),
        (ops.sample_gaussian_forward.default, (*inputs[:2], seed, sample_ids, 0.5, 2, backend)),
        (ops.sample_gaussian_backward.default, (*inputs[:2], seed, sample_ids, 0.5, 2, backend)),
        (ops.gaussian_noise.default, ([3, 2, 8], seed, sample_ids, 1, backend)),
    ]:
        torch.library.opcheck(*arguments)


def test_autocast(backend, device):
    """Autocast changes what a model's layers hand over, and nothing inside the op."""
    inputs = leaves((3, 8), device, torch.bfloat16)
    plain = amvl_fast.gaussian_dual_kl(*inputs, seed=1, backend=backend)
    with torch.autocast(device.type, torch.bfloat16):
        cast = amvl_fast.gaussian_dual_kl(*inputs, seed=1, backend=backend)
    for a, b in zip(plain, cast, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("wrap", [lambda f: f, pytest.param(torch.compile, marks=compiles)], ids=["eager", "compiled"])
def test_checkpointing_replays_the_noise(backend, device, wrap):
    """The gradient of sum(z^3) in mean_q is 3 z^2 of the very z that came out, not of a replay with another seed."""

    def cubes(*inputs):
        z = amvl_fast.gaussian_dual_kl(*inputs, backend=backend).z
        return (z**3).sum(), z

    inputs = leaves((3, 8), device)
    loss, z = wrap(lambda *inputs: checkpoint(cubes, *inputs, use_reentrant=False))(*inputs)
    (grad,) = torch.autograd.grad(loss, inputs[0])
    torch.testing.assert_close(grad, 3 * z.detach() ** 2, rtol=1e-5, atol=1e-6)


def test_torch_func_is_refused_by_kernels_and_taken_by_torch(backend, device):
    mean, logvar = (t.detach() for t in leaves((3, 8), device)[:2])

    def dual(mean, logvar, backend):
        return amvl_fast.gaussian_dual_kl(mean, logvar, mean + 1, logvar, seed=0, backend=backend).forward_kl.sum()

    def sample(mean, logvar, backend):
        return amvl_fast.sample_gaussian(mean, logvar, seed=0, backend=backend).sum()

    def noise(mean, logvar, backend):
        return (mean * amvl_fast.gaussian_noise(mean.shape, 0, device=device, backend=backend)).sum()

    for name, op in [("gaussian_dual_kl", dual), ("sample_gaussian", sample), ("gaussian_noise", noise)]:
        for transform in (torch.func.vmap, torch.func.grad):
            with pytest.raises(AMVLError, match=f"{name}: the kernels cannot be transformed by torch.func") as error:
                transform(lambda m, v, op=op: op(m, v, backend))(mean, logvar)
            assert "\n" not in str(error.value)
        mapped = torch.func.vmap(lambda m, v, op=op: op(m, v, "torch"))(mean, logvar)
        torch.testing.assert_close(mapped, torch.stack([op(m, v, "torch") for m, v in zip(mean, logvar, strict=True)]))


def drawing(device, backend):
    """Each op, with a seed that it draws."""
    ops = amvl_fast
    return {
        "gaussian_dual_kl": lambda x: ops.gaussian_dual_kl(x, x, x, x, backend=backend).z.sum(),
        "sample_gaussian": lambda x: ops.sample_gaussian(x, x, backend=backend).sum(),
        "gaussian_noise": lambda x: (x + ops.gaussian_noise(x.shape, None, device=device, backend=backend)).sum(),
    }


def test_kernels_refuse_torch_func_before_they_draw_a_seed(backend, device):
    x = torch.randn(3, 8, device=device)
    for name, op in drawing(device, backend).items():
        for transform in (torch.func.vmap, torch.func.grad):
            with pytest.raises(AMVLError, match=f"{name}: the kernels cannot be transformed by torch.func"):
                transform(op)(x)


def test_kernels_refuse_a_mapped_backward_pass(backend, device):
    mean, logvar, *_ = inputs = leaves((3, 8), device)
    for name, output in [
        ("gaussian_dual_kl", amvl_fast.gaussian_dual_kl(*inputs, seed=0, backend=backend).z),
        ("sample_gaussian", amvl_fast.sample_gaussian(mean, logvar, seed=0, backend=backend)),
    ]:
        with pytest.raises(AMVLError, match=f"{name}: the kernels cannot be transformed by torch.func"):
            torch.func.vmap(lambda g, z=output: torch.autograd.grad(z, inputs[:2], g))(torch.ones(2, 3, 8).to(device))


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_draws_seeds_as_it_is_told(randomness):
    for op in drawing("cpu", "torch").values():
        first, second = torch.func.vmap(op, randomness=randomness)(torch.zeros(2, 3, 8))
        assert (first == second) == (randomness == "same")


@compiles
def test_temperatures_share_a_graph():
    """With the kernels each is compiled anew: PyTorch hands an operator of ours no number that it does not know."""
    counter = CompileCounterWithBackend("inductor")

    def sample(mean, logvar, temperature):
        return amvl_fast.sample_gaussian(mean, logvar, temperature=temperature, seed=0, backend="torch")

    compiled = torch.compile(sample, backend=counter, fullgraph=True)
    mean, logvar = leaves((3, 8), "cpu")[:2]
    for temperature in (0.2, 0.5, 0.7, 1.0, 1.3):
        right, got = sample(mean, logvar, temperature), compiled(mean, logvar, temperature)
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 2


def test_second_derivatives_are_refused_by_kernels(backend, device):
    inputs = leaves((3, 8), device)
    for name, output in [
        ("gaussian_dual_kl", amvl_fast.gaussian_dual_kl(*inputs, seed=0, backend=backend).forward_kl),
        ("sample_gaussian", amvl_fast.sample_gaussian(*inputs[2:], seed=0, backend=backend)),
    ]:
        with pytest.raises(AMVLError, match=f"{name}: the kernels give first derivatives only"):
            torch.autograd.grad(output.sum(), inputs[3], create_graph=True)


def test_a_sign_that_pytorch_keeps_beside_the_memory(backend, device):
    inputs = [t.detach() for t in leaves((3, 8), device)]
    negated = [torch.complex(t, -t).conj().imag for t in inputs]
    assert all(t.is_neg() for t in negated)
    for op, count in [(amvl_fast.gaussian_dual_kl, 4), (amvl_fast.sample_gaussian, 2)]:
        for views in (inputs, negated):
            for t in views:
                t.requires_grad_()
        results = []
        for views in (inputs[:count], negated[:count]):
            out = op(*views, seed=0, backend=backend)
            z = out if count == 2 else out.z
            upstream = torch.complex(z.detach(), -z.detach()).conj().imag if views[0].is_neg() else z.detach()
            results.append([z, *torch.autograd.grad(z, views[:2], upstream)])
        for plain, signed in zip(*results, strict=True):
            assert torch.equal(plain, signed)


def test_tensors_without_memory(backend, device):
    """Fake tensors tell shapes and dtypes, and no kernel reads what is not there."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        inputs = [torch.empty(3, 8, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(4)]
        seed = torch.empty(1, dtype=torch.int64, device=device)
        out = amvl_fast.gaussian_dual_kl(*inputs, seed=seed, backend=backend)
        assert [(t.shape, t.dtype) for t in out] == [((3, 8), torch.bfloat16)] + [((3,), torch.float32)] * 2
        grads = torch.autograd.grad(out.z.sum() + out.forward_kl.sum(), inputs[:2])
        assert all(grad.shape == (3, 8) for grad in grads)
        assert amvl_fast.sample_gaussian(*inputs[:2], seed=seed, backend=backend).shape == (3, 8)
