"""What only a GPU can show: graphs, streams, the absence of waiting, tensors past 2**31 elements.

`pytest -m cuda` runs these; where there is no GPU they are skipped. The rest of the suite runs on one by itself.
"""

import numpy as np
import pytest
import torch
from latent_ops import (
    BOUND,
    NAMES,
    OUTPUTS,
    closed_form,
    gradients,
    make_inputs,
    make_upstream,
    numpy_normals,
    run,
)

import amvl_fast

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device"),
    pytest.mark.usefixtures("poisoned_memory"),
]

BACKENDS = ["triton", "torch"]
SHAPE = (300, 72)


def equal(a: dict, b: dict) -> bool:
    return all(torch.equal(a[name].cpu(), b[name].cpu()) for name in NAMES)


@pytest.fixture
def case(device):
    return make_inputs(shape=SHAPE, device=device), make_upstream(SHAPE, device=device)


# --- CUDA graphs ---


def capture(function):
    """A graph of the function's work, and the tensors that a replay fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles before the capture, which must not
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


def snapshot(results: dict) -> dict:
    return {name: t.detach().clone() for name, t in results.items()}


def test_a_replayed_graph_follows_its_seed_tensor(device, case):
    inputs, upstream = case
    seed = torch.tensor([5], device=device)
    graph, results = capture(lambda: run("triton", inputs, upstream, seed=seed))
    replays = {}
    for value in (5, 5, 6, -(2**63), 5):
        seed.fill_(value)
        graph.replay()
        replayed = snapshot(results)
        assert equal(replayed, run("triton", inputs, upstream, seed=value))
        assert value not in replays or equal(replayed, replays[value])
        replays[value] = replayed
    assert not torch.equal(replays[5]["z"], replays[6]["z"])
    # And its inputs, which are read anew.
    with torch.no_grad():
        inputs[0].add_(1)
    graph.replay()
    assert equal(snapshot(results), run("triton", inputs, upstream, seed=5))


def test_a_replayed_graph_follows_its_sample_ids(device, case):
    inputs, upstream = case
    ids = torch.arange(SHAPE[0], device=device)
    graph, results = capture(lambda: run("triton", inputs, upstream, seed=5, sample_ids=ids))
    for value in (ids.flip(0), ids + 2**40, ids.clone()):
        ids.copy_(value)
        graph.replay()
        assert equal(snapshot(results), run("triton", inputs, upstream, seed=5, sample_ids=value))


def test_a_replayed_graph_draws_new_seeds(case):
    """The seed is drawn from the generator of the device, whose state moves with each replay."""
    inputs, upstream = case
    graph, results = capture(lambda: run("triton", inputs, upstream))
    torch.cuda.manual_seed(1)
    noises = []
    for _ in range(3):
        graph.replay()
        noises.append(snapshot(results))
    assert not torch.equal(noises[0]["z"], noises[1]["z"])
    assert not torch.equal(noises[1]["z"], noises[2]["z"])
    torch.cuda.manual_seed(1)
    graph.replay()
    assert equal(snapshot(results), noises[0])
    # Forward and backward of one replay use the same noise: 2 dz / dlogvar = z - mean at weight 1.
    mean, logvar = inputs[0].detach(), inputs[1].detach().requires_grad_()
    graph, results = capture(lambda: sample_and_slope(mean, logvar))
    graph.replay()
    torch.testing.assert_close(2 * results["slope"], results["z"] - mean, rtol=1e-4, atol=1e-5)


def sample_and_slope(mean, logvar):
    z = amvl_fast.sample_gaussian(mean, logvar, backend="triton")
    return {"z": z, "slope": torch.autograd.grad(z, logvar, torch.ones_like(z))[0]}


# --- no waiting, any stream, any device ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [None, 3, -(2**63)])
@pytest.mark.parametrize("numbered", [False, True])
def test_the_host_never_waits(device, case, backend, seed, numbered):
    inputs, upstream = case
    ids = torch.arange(SHAPE[0], device=device).flip(0) if numbered else None

    def everything():
        run(backend, inputs, upstream, seed=seed, stop_gradient=False, sample_ids=ids)
        amvl_fast.gaussian_noise(SHAPE, seed, device="cuda", backend=backend, sample_ids=ids)
        z = amvl_fast.sample_gaussian(*inputs[:2], temperature=0.7, seed=seed, backend=backend, sample_ids=ids)
        torch.autograd.grad(z, inputs[:2], upstream[0])

    everything()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_work_goes_to_the_current_stream(device, case):
    """On a stream of its own, behind work that delays its inputs, the op sees what that work leaves."""
    inputs, upstream = case
    right = run("triton", inputs, upstream, seed=1)
    late = [torch.zeros_like(t).requires_grad_() for t in inputs]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            for to, value in zip(late, inputs, strict=True):
                to.copy_(value)
        got = run("triton", late, upstream, seed=1)
    stream.synchronize()
    assert equal(got, right)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device only")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_device_that_is_not_the_current_one(backend):
    assert torch.cuda.current_device() == 0
    first, second = (
        run(backend, make_inputs(shape=SHAPE, device=d), make_upstream(SHAPE, device=d), seed=1)
        for d in ("cuda:0", "cuda:1")
    )
    assert second["z"].device == torch.device("cuda:1")
    assert equal(first, second)
    assert amvl_fast.gaussian_noise((2, 3), 0, device="cuda:1", backend=backend).device.index == 1


# --- the same bits ---


@pytest.mark.parametrize("shape", [(4096, 64), (33, 4099), (8, 8192)])
def test_the_same_bits_over_many_runs(device, shape):
    inputs, upstream = make_inputs(shape=shape, device=device), make_upstream(shape, device=device)
    first = run("triton", inputs, upstream, seed=1, stop_gradient=False)
    for _ in range(20):
        assert equal(run("triton", inputs, upstream, seed=1, stop_gradient=False), first)


def test_the_noise_is_that_of_the_cpu(device):
    """Every backend on the GPU against those of the CPU, and all of them against the definition."""
    right = numpy_normals(np.arange(513), 257, -7, stream=9)
    for backend in BACKENDS:
        noise = amvl_fast.gaussian_noise((513, 257), -7, stream=9, device=device, backend=backend)
        np.testing.assert_allclose(noise.cpu().numpy(), right, rtol=6e-7, atol=0)
    on_cpu = amvl_fast.gaussian_noise((513, 257), -7, stream=9)
    np.testing.assert_allclose(on_cpu.numpy(), right, rtol=6e-7, atol=0)


# --- more elements than 31 bits count ---


def needs_memory(gib: int):
    free = torch.cuda.mem_get_info()[0] / 2**30 if torch.cuda.is_available() else 0
    return pytest.mark.skipif(free < gib, reason=f"takes {gib} GiB of GPU memory, {free:.0f} are free")


@needs_memory(60)
@pytest.mark.parametrize("columns", [1000, 8192])
def test_more_than_two_billion_elements(device, columns):
    """Inputs expanded from one row, so that only what is written takes memory. The rows to look at stand at both
    ends and on both sides of element 2**31.
    """
    rows = 2**31 // columns + 1000
    leaves = make_inputs(shape=(1, columns), dtype=torch.bfloat16, device=device)
    inputs = [t.detach().expand(rows, columns).requires_grad_() for t in leaves]
    upstream = [t.expand(rows, *t.shape[1:]) for t in make_upstream((1, columns), torch.bfloat16, device)]
    outputs = amvl_fast.gaussian_dual_kl(*inputs, seed=3, backend="triton")
    assert outputs.z.numel() > 2**31
    border = 2**31 // columns
    chosen = torch.tensor([0, 1, border - 1, border, border + 1, rows - 1], device=device)
    got = {**dict(zip(OUTPUTS, outputs, strict=True)), **gradients(outputs, inputs, upstream)}
    got = {name: t.detach()[chosen] for name, t in got.items()}
    del outputs
    # The noise of a row depends on its index alone, so NumPy makes that of the chosen ones.
    noise = torch.from_numpy(numpy_normals(chosen.cpu().numpy(), columns, 3))
    few = [t.detach().expand(len(chosen), columns).cpu() for t in leaves]
    for name, right in closed_form(few, noise, [w[chosen] for w in upstream], True).items():
        error = (got[name].double().cpu() - right.value).norm()
        assert error <= (BOUND if name.endswith("kl") else 2**-8) * right.scale.norm(), name
        # Exactly what each row would be on its own, as far as no noise goes in.
        if name in ("forward_kl", "reverse_kl", "posterior_mean", "prior_mean", "prior_logvar"):
            assert (got[name] == got[name][:1]).all(), name


@needs_memory(20)
def test_rows_far_apart(device):
    """A stride alone may pass 31 bits where the number of elements does not."""
    memory = torch.zeros(2, 2**31 + 64, dtype=torch.bfloat16, device=device)
    torch.manual_seed(0)
    memory[:, :64] = torch.randn(2, 64)
    far = memory[:, :64]  # rows 2**31 + 64 elements apart
    assert far.stride(0) > 2**31
    got = amvl_fast.gaussian_dual_kl(*[far] * 4, seed=1, backend="triton")
    right = amvl_fast.gaussian_dual_kl(*[far.contiguous()] * 4, seed=1, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(got, right, strict=True))
