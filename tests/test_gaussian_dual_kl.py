"""`gaussian_dual_kl`: what it computes, from which tensors, and what it leaves alone. How well: test_accuracy."""

import doctest
import importlib
import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from latent_ops import (
    BACKENDS,
    BOUND,
    CPU,
    INPUTS,
    KERNELS,
    NAMES,
    OUTPUTS,
    gradients,
    make_inputs,
    make_upstream,
    relative_error,
    run,
    true_noise,
    truth,
)
from torch.utils.checkpoint import checkpoint

import amvl_fast
from amvl_fast.reference import gaussian_dual_kl as oracle

pytestmark = pytest.mark.usefixtures("poisoned_memory")

ROWS = ["forward_kl", "reverse_kl", "prior_mean", "prior_logvar"]  # what no noise goes into


def same_bits(a, b) -> bool:
    """Equal, and NaN equal to NaN."""
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


# --- any shape and any strides ---


def strided_inputs(kind, device):
    """Leaves, and the four views of them that the op is given."""
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


KINDS = ["chunks and an expanded prior", "broadcast", "transposed rows", "columns apart", "too many strides"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", ["weights", "expanded"])
@pytest.mark.parametrize("kind", KINDS)
def test_strides(device, backend, grad, kind):
    leaves, views = strided_inputs(kind, device)
    views = torch.broadcast_tensors(*views)
    shape = views[0].shape
    upstream = make_upstream(shape, device=device)
    if grad == "expanded":  # what the backward pass of a plain sum hands over
        upstream = [torch.ones((), device=device).expand_as(w) for w in upstream]
    outputs = amvl_fast.gaussian_dual_kl(*views, seed=5, backend=backend)
    expected = oracle(*(view.double() for view in views), true_noise(shape, 5).to(device))
    got, right = (
        [*out, *torch.autograd.grad(out, leaves, [w.to(o.dtype) for w, o in zip(upstream, out, strict=True)])]
        for out in (outputs, expected)
    )
    for value, truth_ in zip(got, right, strict=True):
        assert value.shape == truth_.shape
        assert relative_error(value, truth_) < BOUND
    if backend != "torch":
        compact = [view.detach().contiguous().requires_grad_() for view in views]
        same = run(backend, compact, upstream, seed=5)
        assert all(same_bits(a, same[name]) for a, name in zip(outputs, OUTPUTS, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (3, 0), (0,)])
def test_empty(device, backend, shape):
    got = run(backend, make_inputs(shape=shape, device=device), make_upstream(shape, device=device), seed=0)
    for name in NAMES:
        assert got[name].shape == (shape[:-1] if name.endswith("kl") else shape)
        assert not got[name].any()  # a sum over no columns is 0


# --- gradients for those who ask, from those who give ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize("output", range(3))
def test_gradients_stop_where_they_must(device, backend, stop_gradient, output):
    moved = {0: {0, 1}, 1: {2, 3}, 2: {0, 1}}[output]
    if output and not stop_gradient:
        moved = {0, 1, 2, 3}
    upstream = [w if i == output else None for i, w in enumerate(make_upstream((3, 8), device=device))]
    got = run(backend, make_inputs(device=device), upstream, seed=0, stop_gradient=stop_gradient)
    alive = {i for i, name in enumerate(INPUTS) if torch.count_nonzero(got[name])}
    assert alive == moved
    if output:
        assert all(torch.count_nonzero(got[INPUTS[i]]) == 24 for i in moved)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize("needed", [n for k in range(1, 5) for n in itertools.combinations(range(4), k)])
def test_any_combination_of_gradients(device, backend, stop_gradient, needed):
    """Of inputs that ask; and of the outputs, each combination of upstream gradients is tried."""
    asking = [t.detach().requires_grad_(i in needed) for i, t in enumerate(make_inputs(device=device))]
    outputs = amvl_fast.gaussian_dual_kl(*asking, seed=3, stop_gradient=stop_gradient, backend=backend)
    for used in [u for k in range(1, 4) for u in itertools.combinations(range(3), k)]:
        upstream = [w if i in used else None for i, w in enumerate(make_upstream((3, 8), device=device))]
        got = gradients(outputs, asking, upstream, retain_graph=True)
        right = truth(asking, upstream, seed=3, stop_gradient=stop_gradient)
        assert set(got) == {INPUTS[i] for i in needed}
        for name, grad in got.items():
            error = (grad.double().cpu() - right[name].value).abs()
            assert (error <= BOUND * right[name].scale).all(), (name, used)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_asked_nothing_kept(device, backend):
    inputs = [t.detach() for t in make_inputs(device=device)]
    assert not any(o.requires_grad for o in amvl_fast.gaussian_dual_kl(*inputs, seed=0, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_written_in_place(device, backend):
    """Inputs and upstream gradients stay as they were, and no gradient is a view of one."""
    inputs, upstream = make_inputs(device=device), make_upstream((3, 8), device=device)
    before = [t.detach().clone() for t in (*inputs, *upstream)]
    for used in ([0], [1, 2], [0, 1, 2]):
        chosen = [w if i in used else None for i, w in enumerate(upstream)]
        got = run(backend, inputs, chosen, seed=0, stop_gradient=False)
        assert all(same_bits(a, b) for a, b in zip((*inputs, *upstream), before, strict=True))
        if backend == "torch":  # its gradient of an addition is the upstream gradient itself
            continue
        given = {t.untyped_storage().data_ptr() for t in (*inputs, *upstream)}
        made = [t.untyped_storage().data_ptr() for t in got.values()]
        assert len({*given, *made}) == len(given) + len(made)


# --- the same bits, always and everywhere ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(70, 7), (2, 1030), (9, 300)])
def test_the_same_bits_from_run_to_run(device, backend, shape):
    inputs, upstream = make_inputs(shape=shape, device=device), make_upstream(shape, device=device)
    first, second = (run(backend, inputs, upstream, seed=1, stop_gradient=False) for _ in range(2))
    assert all(same_bits(first[name], second[name]) for name in NAMES)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(("rows", "columns"), [(150, 7), (10, 40), (3, 1030)])
def test_a_row_has_the_same_bits_in_any_batch(device, backend, rows, columns):
    """At the same index, where its noise is the same, in batches of any size; and without noise at any index."""
    shape = (rows, columns)
    inputs = make_inputs("1e-1 apart", shape, device=device)
    upstream = make_upstream(shape, device=device)
    whole = run(backend, inputs, upstream, seed=1)
    for part in (1, rows // 2, rows - 1):
        cut = [[t.detach()[:part].requires_grad_(t.requires_grad) for t in ts] for ts in (inputs, upstream)]
        got = run(backend, *cut, seed=1)
        assert all(same_bits(got[name], whole[name][:part]) for name in NAMES)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0)).to(device)
    moved = [[t.detach()[order].requires_grad_(t.requires_grad) for t in ts] for ts in (inputs, upstream)]
    got = run(backend, *moved, seed=1)
    assert all(same_bits(got[name], whole[name][order]) for name in ROWS)
    got = run(backend, moved[0], [None, *moved[1][1:]], seed=1)
    without_z = run(backend, inputs, [None, *upstream[1:]], seed=1)
    assert all(same_bits(got[name], without_z[name][order]) for name in INPUTS)


@pytest.mark.parametrize("width", [1, 2])
def test_wide_indices_change_nothing(device, monkeypatch, width):
    """Past 2**31 elements Triton's indices have 64 bits; forced to, they find the same elements."""
    from amvl_fast.kernels.triton import layout

    for kind in KINDS:
        leaves, views = strided_inputs(kind, device)
        views = torch.broadcast_tensors(*views)
        upstream = make_upstream(views[0].shape, device=device)
        results = []
        for forced in (0, width):
            monkeypatch.setattr(layout, "FORCED_WIDTH", forced)
            outputs = amvl_fast.gaussian_dual_kl(*views, seed=5, backend="triton")
            results.append([*outputs, *torch.autograd.grad(outputs, leaves, upstream)])
        assert all(same_bits(a, b) for a, b in zip(*results, strict=True)), kind


@pytest.mark.parametrize("backend", KERNELS)
def test_threads_change_nothing(device, backend):
    """Neither those within an op nor those that call it at once."""
    shape = (8, 40) if backend == "triton" else (64, 600)
    inputs, upstream = make_inputs(shape=shape, device=device), make_upstream(shape, device=device)
    alone = run(backend, inputs, upstream, seed=1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert all(same_bits(value, alone[name]) for name, value in run(backend, inputs, upstream, seed=1).items())
    finally:
        torch.set_num_threads(threads)
    if backend == "triton" and device.type == "cpu":
        return  # the interpreter replaces triton.language while it runs, so it takes one call at a time
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: run(backend, inputs, upstream, seed=1), range(200)):
            assert all(same_bits(value, alone[name]) for name, value in got.items())


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize("columns", [1024, 1030])
def test_outputs_past_the_caches(device, backend, stop_gradient, columns):
    """Outputs of 8 MiB and more are stored by other instructions, which want memory aligned; that rows of 1024 are and
    most rows of 1030 are not. A part of the rows, which is smaller, goes the usual way.
    """
    shape, part = (2200, columns), 450
    inputs, upstream = make_inputs(shape=shape, device=device), make_upstream(shape, device=device)
    whole = run(backend, inputs, upstream, seed=1, stop_gradient=stop_gradient)
    assert whole["z"].nbytes >= 8 * 2**20 > 4 * whole["z"][:part].nbytes
    assert not any(t.isnan().any() for t in whole.values())
    cut = [[t.detach()[:part].requires_grad_(t.requires_grad) for t in ts] for ts in (inputs, upstream)]
    got = run(backend, *cut, seed=1, stop_gradient=stop_gradient)
    assert all(same_bits(got[name], whole[name][:part]) for name in NAMES)


BAD = [float("nan"), float("inf"), -float("inf")]
# One bad input, of each kind; and two at once, where infinities might cancel.
BAD_PLACES = [{i: v} for i in range(4) for v in BAD]
BAD_PLACES += [{i: v, j: w} for i, j in itertools.combinations(range(4), 2) for v in BAD[1:] for w in BAD[1:]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stop_gradient", [True, False])
def test_a_nan_stays_in_its_row(device, backend, stop_gradient):
    """It is seen in that element of z and in both KLs, whatever it was; and other rows are what they were, their
    gradients too, for any upstream gradients. What becomes of the gradients of its own row is left open.
    """
    # Elsewhere than under the interpreter, rows of a whole vector and a part of one.
    shape = (2 * len(BAD_PLACES), 9 if backend == "triton" else 70)
    inputs, upstream = make_inputs(shape=shape, device=device), make_upstream(shape, device=device)
    dirty_inputs = [t.detach().clone() for t in inputs]
    hit = torch.zeros(shape, dtype=torch.bool)
    for place, bad in enumerate(BAD_PLACES):
        row, column = 2 * place, place % shape[1]  # with good rows between
        hit[row, column] = True
        for index, value in bad.items():
            dirty_inputs[index][row, column] = value
    hit = hit.to(device)
    options = {"seed": 0, "stop_gradient": stop_gradient, "backend": backend}
    dirty_inputs = [t.requires_grad_() for t in dirty_inputs]
    clean, dirty = (amvl_fast.gaussian_dual_kl(*leaves, **options) for leaves in (inputs, dirty_inputs))
    for good, got, where in zip(clean, dirty, [hit, hit.any(-1), hit.any(-1)], strict=True):
        assert got[where].isnan().all()
        assert same_bits(got[~where], good[~where])
    others = ~hit.any(-1)
    for used in [u for k in range(1, 4) for u in itertools.combinations(range(3), k)]:
        chosen = [w if i in used else None for i, w in enumerate(upstream)]
        good, got = (
            gradients(outputs, leaves, chosen, retain_graph=True)
            for outputs, leaves in ((clean, inputs), (dirty, dirty_inputs))
        )
        assert all(same_bits(got[name][others], good[name][others]) for name in INPUTS), used


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointing_replays_the_noise(device, backend):
    def loss(*leaves):
        out = amvl_fast.gaussian_dual_kl(*leaves, backend=backend)
        return (out.z**3).sum() + out.forward_kl.sum()

    grads = []
    for wrap in (loss, lambda *leaves: checkpoint(loss, *leaves, use_reentrant=False)):
        inputs = make_inputs(device=device)
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
