"""`sample_ids`: noise that follows a sample's number instead of its place in the batch."""

import pytest
import torch
from latent_ops import BACKENDS, KERNELS, NAMES, bound_of, make_inputs, make_upstream, run, true_noise, truth
from test_transforms import compiles
from torch._dynamo.testing import CompileCounterWithBackend

import amvl_fast
from amvl_fast.errors import AMVLError

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# Numbers whose rows pass 32 bits, reach the highest bit and wrap around, one of them twice.
IDS = [3, 2**40 + 1, -1, 2**63 - 1, 3]
# One row in a sample, and several in one dimension and in two; and rows that are cut into pieces.
SHAPES = [(5, 18), (5, 3, 18), (5, 2, 2, 7)]
WIDE = (5, 1, 1030)


def ids_on(device, ids=IDS):
    return torch.tensor(ids, dtype=torch.int64, device=device)


def everything(backend, inputs, upstream, **options):
    """All that the three ops return for these inputs, gradients included."""
    results = run(backend, inputs, upstream, seed=3, **options)
    leaves = [t.detach().requires_grad_() for t in inputs[:2]]
    z = amvl_fast.sample_gaussian(*leaves, temperature=0.7, seed=3, stream=2, backend=backend, **options)
    grads = torch.autograd.grad(z, leaves, upstream[0])
    noise = amvl_fast.gaussian_noise(z.shape, 3, device=z.device, backend=backend, **options)
    return {**results, "sample": z.detach(), "sample_logvar": grads[1], "noise": noise}


def assert_same_bits(got, expected, backend):
    for name in got:
        # PyTorch sums in an order that depends on the shape.
        if backend != "torch" or not name.endswith("kl"):
            assert torch.equal(got[name], expected[name]), name


def picked(tensors, where):
    return [t.detach()[where].requires_grad_(t.requires_grad) for t in tensors]


# --- which noise it is ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [*SHAPES, WIDE])
def test_rows_enter_the_noise_by_their_sample_s_number(device, backend, shape):
    noise = amvl_fast.gaussian_noise(shape, -5, device=device, backend=backend, stream=7, sample_ids=ids_on(device))
    right = true_noise(shape, -5, stream=7, sample_ids=IDS)
    torch.testing.assert_close(noise.cpu().double(), right, rtol=6e-7, atol=0)
    assert torch.equal(noise[0], noise[-1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [*SHAPES, WIDE])
def test_forward_and_backward_use_that_noise(device, backend, shape):
    inputs, upstream = make_inputs(shape=shape, device=device), make_upstream(shape, device=device)
    got = run(backend, inputs, upstream, seed=3, sample_ids=ids_on(device))
    for name, right in truth(inputs, upstream, seed=3, sample_ids=IDS).items():
        error = got[name].cpu().double() - right.value
        assert error.norm() <= bound_of(name) * right.scale.norm(), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_sample_and_its_gradient_use_that_noise(device, backend, shape):
    mean, logvar, *_ = make_inputs(shape=shape, device=device)
    upstream = make_upstream(shape, device=device)[0]
    options = {"seed": 3, "stream": 2, "sample_ids": ids_on(device)}
    z = amvl_fast.sample_gaussian(mean, logvar, temperature=0.7, backend=backend, **options)
    _, grad = torch.autograd.grad(z, [mean, logvar], upstream)
    spread = 0.7 * torch.exp(logvar.detach().cpu().double() / 2) * true_noise(shape, 3, stream=2, sample_ids=IDS)
    torch.testing.assert_close(z.detach().cpu().double(), mean.detach().cpu() + spread, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad.cpu().double(), upstream.cpu() * spread / 2, rtol=2e-6, atol=0)


# --- the same bits wherever a sample stands ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_numbers_in_order_change_nothing(device, backend, shape):
    inputs, upstream = make_inputs(shape=shape, device=device), make_upstream(shape, device=device)
    numbered = everything(backend, inputs, upstream, sample_ids=torch.arange(5, device=device))
    assert_same_bits(numbered, everything(backend, inputs, upstream), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("where", [[4, 2, 0, 1, 3], [4, 1], [3], [2, 2, 4]])
def test_a_sample_keeps_its_noise_in_any_batch(device, backend, shape, where):
    """Sorted otherwise, in a micro-batch, alone, and twice: the same rows."""
    inputs, upstream = make_inputs(shape=shape, device=device), make_upstream(shape, device=device)
    whole = everything(backend, inputs, upstream, sample_ids=ids_on(device))
    ids = ids_on(device)[where]
    part = everything(backend, picked(inputs, where), picked(upstream, where), sample_ids=ids)
    assert_same_bits(part, {name: t[where] for name, t in whole.items()}, backend)


@pytest.mark.parametrize("backend", KERNELS)
def test_layouts_have_the_same_bits(device, backend):
    """Rows that do not fold into one dimension are numbered as ever, and a shared prior counts as if it were copied."""
    shape = (5, 3, 18)
    upstream = make_upstream(shape, device=device)
    mean_q, logvar_q, mean_p, logvar_p = (t.detach() for t in make_inputs(shape=shape, device=device))
    turned = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (mean_q, logvar_q)]
    views = [*turned, mean_p[:1].expand(shape), logvar_p[:1].expand(shape)]
    compact = [t.contiguous() for t in views]
    results = []
    for inputs in (views, compact):
        leaves = [t.requires_grad_() for t in inputs]
        results.append(everything(backend, leaves, upstream, sample_ids=ids_on(device)))
    assert_same_bits(*results, backend)
    # Samples are counted along the shape of all inputs together.
    for mean in (mean_p[:1], mean_p[0]):
        z = amvl_fast.sample_gaussian(mean, logvar_q, seed=3, backend=backend, sample_ids=ids_on(device))
        same = amvl_fast.sample_gaussian(compact[2], logvar_q, seed=3, backend=backend, sample_ids=ids_on(device))
        assert torch.equal(z, same)


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_may_have_any_strides(device, backend):
    shape = (5, 3, 18)

    def noise(ids):
        return amvl_fast.gaussian_noise(shape, 3, device=device, backend=backend, sample_ids=ids)

    every_other = torch.stack([ids_on(device), ids_on(device) + 1], dim=1)[:, 0]
    assert every_other.stride() == (2,)
    assert torch.equal(noise(every_other), noise(ids_on(device)))
    alike = noise(torch.full((1,), 2**40, device=device).expand(5))
    assert torch.equal(alike, noise(ids_on(device, [2**40] * 5)))
    assert torch.equal(alike, alike[:1].expand(shape))


@pytest.mark.parametrize("width", [1, 2])
def test_wide_indices_change_nothing(device, monkeypatch, width):
    pytest.importorskip("triton")
    from amvl_fast.kernels.triton import layout

    inputs, upstream = make_inputs(shape=(5, 3, 18), device=device), make_upstream((5, 3, 18), device=device)
    results = []
    for forced in (0, width):
        monkeypatch.setattr(layout, "FORCED_WIDTH", forced)
        results.append(everything("triton", inputs, upstream, sample_ids=ids_on(device)))
    assert_same_bits(*results, "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3, 8), (3, 0, 8), (3, 0), (0, 8)])
def test_empty(device, backend, shape):
    inputs, upstream = make_inputs(shape=shape, device=device), make_upstream(shape, device=device)
    got = everything(backend, inputs, upstream, sample_ids=torch.arange(shape[0], device=device))
    assert all(got[name].shape == (shape[:-1] if name.endswith("kl") else shape) for name in NAMES)


# --- under what PyTorch does to functions ---


# "torch" needs no operator of ours: it is made of PyTorch's.
@compiles
@pytest.mark.parametrize("backend", KERNELS)
def test_compile_is_one_graph_for_all_lengths(device, backend):
    def loss(mean_q, logvar_q, mean_p, logvar_p, ids):
        options = {"seed": 3, "sample_ids": ids, "backend": backend}
        out = amvl_fast.gaussian_dual_kl(mean_q * 2, logvar_q, mean_p, logvar_p, **options)
        sample = amvl_fast.sample_gaussian(mean_p, logvar_p, temperature=0.5, stream=1, **options)
        noise = amvl_fast.gaussian_noise(out.z.shape, device=out.z.device, **options)
        return (out.z * noise).tanh().sum() + (out.forward_kl + 2 * out.reverse_kl).sum() + sample.square().sum()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(loss, backend=counter, fullgraph=True, dynamic=True)
    for length in (3, 5, 4):
        inputs, ids = make_inputs(shape=(length, 2, 12), device=device), ids_on(device, IDS[:length])
        results = []
        for function in (loss, compiled):
            value = function(*inputs, ids)
            results.append([value, *torch.autograd.grad(value, inputs)])
        for eager, got in zip(*results, strict=True):
            torch.testing.assert_close(got, eager, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1


def test_vmap_maps_numbers_too():
    mean, logvar, ids = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4, 8), torch.arange(6).reshape(2, 3) + 2**40

    def sample(*tensors):
        return amvl_fast.sample_gaussian(*tensors[:2], seed=0, sample_ids=tensors[2], backend="torch")

    mapped = torch.func.vmap(sample)(mean, logvar, ids)
    assert torch.equal(mapped, torch.stack([sample(*tensors) for tensors in zip(mean, logvar, ids, strict=True)]))


# --- how it is asked for ---

X, ROW = torch.zeros(2, 3), torch.zeros(3)
OPS = {
    "gaussian_dual_kl": lambda x, ids: amvl_fast.gaussian_dual_kl(x, x, x, x, sample_ids=ids),
    "sample_gaussian": lambda x, ids: amvl_fast.sample_gaussian(x, x, sample_ids=ids),
    "sample_gaussian at temperature 0": lambda x, ids: amvl_fast.sample_gaussian(x, x, temperature=0, sample_ids=ids),
    "gaussian_noise": lambda x, ids: amvl_fast.gaussian_noise(x.shape, 0, sample_ids=ids),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("x", "ids", "message"),
    [
        (X, [0, 1], "sample_ids is a list; pass"),
        (X, torch.tensor([0, 1], dtype=torch.int32), r"sample_ids is torch\.int32; pass"),
        (X, torch.tensor([0.0, 1.0]), r"sample_ids is torch\.float32; pass"),
        (X, torch.tensor([0, 1, 2]), r"sample_ids has shape \[3\] and the op runs on \[2, 3\]; pass"),
        (X, torch.tensor([[0], [1]]), r"sample_ids has shape \[2, 1\]"),
        (X, torch.tensor(0), r"sample_ids has shape \[\]"),
        (ROW, torch.tensor([0, 1, 2]), r"shape \[3\] has none; pass"),
        (X, torch.zeros(2, dtype=torch.int64, device="meta"), "sample_ids is on meta and the op runs on cpu; move"),
    ],
)
def test_bad_numbers_get_one_sentence(op, x, ids, message):
    with pytest.raises(AMVLError, match=f"^{op.partition(' ')[0]}: .*{message}") as error:
        OPS[op](x, ids)
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)
