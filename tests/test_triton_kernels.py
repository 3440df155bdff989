"""What is particular to the Triton kernels: 64-bit offsets, blocks, views and the device functions."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import amvl_fast

pytest.importorskip("triton")

from kernel_probes import half_probe, subtract_probe

from amvl_fast.kernels import triton as kernels
from amvl_fast.kernels.triton import layout

LAYOUTS = ["contiguous", "chunks and an expanded prior", "transposed rows", "heads and rows exchanged", "columns apart"]


def inputs_of(kind, shape, dtype, device):
    """Four views of `shape`, `[a, b, d]`, by which the kernels see one of the common layouts."""
    torch.manual_seed(0)
    a, b, d = shape
    if kind == "chunks and an expanded prior":
        head, prior = torch.randn(a, b, 2 * d), torch.randn(b, 2 * d)
        head, prior = head.to(device, dtype), prior.to(device, dtype)
        return [*head.chunk(2, -1), *prior.expand(a, b, 2 * d).chunk(2, -1)]
    if kind == "transposed rows":
        return [torch.randn(b, a, d).to(device, dtype).transpose(0, 1) for _ in range(4)]
    if kind == "heads and rows exchanged":  # and two batches, so that three dimensions are left
        return [torch.randn(2, a, b, d).to(device, dtype).transpose(1, 2) for _ in range(4)]
    if kind == "columns apart":
        return [torch.randn(d, b, a).to(device, dtype).permute(2, 1, 0) for _ in range(4)]
    return [torch.randn(shape).to(device, dtype) for _ in range(4)]


def everything(inputs, seed=3):
    """All that all kernels return for these inputs."""
    mean, logvar = inputs[:2]
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = amvl_fast.gaussian_dual_kl(*leaves, seed=seed, stop_gradient=False, backend="triton")
    sample = amvl_fast.sample_gaussian(leaves[0], leaves[1], seed=seed, temperature=0.7, stream=2, backend="triton")
    loss = out.z.float().square().sum() + (out.forward_kl * out.reverse_kl).sum() + sample.float().sum()
    noise = amvl_fast.gaussian_noise(mean.shape, seed, device=logvar.device, backend="triton")
    return [*out, sample, noise, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("width", [1, 2])
def test_forced_64_bit_indices_give_the_same_bits(device, monkeypatch, dtype, kind, width):
    inputs = inputs_of(kind, (3, 5, 40), dtype, device)
    narrow = everything(inputs)
    monkeypatch.setattr(layout, "FORCED_WIDTH", width)
    seen = []
    monkeypatch.setattr(layout, "width_of", lambda *args, inner=layout.width_of: seen.append(inner(*args)) or seen[-1])
    wide = everything(inputs)
    assert seen == [width] * len(seen)
    assert seen
    assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))


def test_width_follows_the_farthest_offset():
    def width(rows, inner, columns, *strides):
        return layout.width_of(layout.Rows(list(strides), rows, inner), columns)

    far, near = 2**31, 2**31 - 2**17
    assert width(8, (), 512) == 0
    assert width(near, (), 1) == 0
    assert width(far // 512, (), 512) == 1  # rows * columns
    assert width(far, (), 1) == 2
    assert width(far - 1, (), 1) == 2  # the rows a block has too many must not wrap around either
    assert width(8, (4,), 16, (near, 16, 1)) == 0
    assert width(8, (4,), 16, (far, 16, 1)) == 1  # the outer stride
    assert width(8, (2, 2), 16, (16, far, 16, 1)) == 1  # the one between
    assert width(8, (), 16, (far // 7 + 1, 1)) == 1  # the inner
    assert width(8, (), 16, (1, far // 15 + 1)) == 1  # the column's
    assert width(8, (4,), 16, (0, 0, 1)) == 0


def test_offsets_past_two_to_the_31(device):
    """The ends of a tensor that nobody could hold: only the pages that are touched exist."""
    if device.type != "cpu":
        pytest.skip("memory is mapped lazily on the CPU only")
    inputs = inputs_of("contiguous", (3, 2, 24), torch.float32, device)
    right = everything(inputs)
    stride = 2**30 + 2**9  # fits 32 bits itself, so only the product with the row can go wrong
    far = []
    for tensor in inputs:
        view = torch.empty(2 * stride + 2 * 24).as_strided((3, 2, 24), (stride, 24, 1))
        far.append(view.copy_(tensor))
    assert all(torch.equal(a, b) for a, b in zip(right, everything(far), strict=True))


@pytest.mark.parametrize(
    ("kind", "inner", "strides"),
    [
        ("contiguous", (), (40, 1)),
        ("chunks and an expanded prior", (4,), (320, 80, 1)),
        ("transposed rows", (4,), (40, 120, 1)),
        ("heads and rows exchanged", (4, 3), (480, 40, 160, 1)),
        ("columns apart", (4,), (1, 3, 12)),
    ],
)
def test_leading_dimensions_fold_where_they_can(device, kind, inner, strides):
    inputs = inputs_of(kind, (3, 4, 40), torch.float32, device)
    rows = layout.as_rows(inputs[0].shape, [*inputs, None])
    assert (rows.rows, rows.inner, rows.strides[0]) == (inputs[0][..., 0].numel(), inner, strides)
    if kind == "chunks and an expanded prior":
        assert rows.strides[2] == (0, 80, 1)


class Operators(TorchDispatchMode):
    """Notes what PyTorch computes."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_no_view_is_copied(device, kind):
    """Inputs and upstream gradients reach the kernels as they are, KL weights of a number each included."""
    inputs = inputs_of(kind, (3, 4, 40), torch.float32, device)
    shape = inputs[0].shape
    z, grads = torch.empty(shape, device=device), [torch.empty(shape, device=device) for _ in inputs]
    kls = [torch.empty(shape[:-1], device=device) for _ in range(2)]
    weights = [torch.randn(shape[:-1][::-1], device=device).permute(*range(len(shape) - 2, -1, -1)) for _ in kls]
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    with Operators() as operators:
        kernels.gaussian_dual_kl_forward(*inputs, seed, None, z, *kls)
        kernels.gaussian_dual_kl_backward(*inputs, seed, None, inputs[1], *weights, *grads, stop_gradient=True)
    # What contiguous(), reshape() and to() make; the interpreter itself copies into tensors, and that only.
    assert not {"aten::clone", "aten::_to_copy"} & set(operators.names)


def test_one_leading_dimension_is_never_divided():
    head = torch.empty(6, 4, 80)
    assert layout.plan(head.chunk(2, -1), []).rows.inner == ()
    assert layout.plan([head[:, 0, :40], head[:, 1, :40]], []).rows.inner == ()
    assert layout.plan([head[0, 0]], []).rows.rows == 1


@pytest.mark.parametrize(
    ("columns", "row", "start", "align"),
    [
        (512, 512, 0, 16),
        (1000, 1000, 0, 16),
        (36, 36, 0, 16),
        (7, 7, 0, 4),
        (6, 6, 0, 8),
        (64, 66, 0, 8),
        (64, 72, 1, 4),
    ],
)
def test_alignment_is_what_all_rows_have(columns, row, start, align):
    rows = torch.empty(4, row)[:, start : start + columns]
    for view in (rows, rows[:1], rows[1:], rows[3:]):
        assert layout.alignment(view) == align


def test_alignment_of_columns_apart():
    assert layout.alignment(torch.empty(8, 4).t()) == 0
    assert layout.alignment(torch.empty(()).expand(4, 8)) == 0
    assert layout.alignment(torch.empty(4, 2)[:, :1]) == 4  # one column is not apart from any other


def test_each_tensor_keeps_its_own_alignment():
    inputs = [torch.empty(4, 64), torch.empty(4, 65)[:, :64], torch.empty(64, 4).t(), None]
    assert layout.plan(inputs, [torch.empty(4, 64)]).options["ALIGN"] == (16, 4, 0, 0)


def test_no_grid_is_larger_than_cuda_allows():
    with pytest.raises(ValueError, match="at most 67107840 columns"):
        layout.plan([], [torch.empty(2**27, device="meta")])


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("vector", [0, 1, 2, 4, 8])
@pytest.mark.parametrize(
    "columns", [*range(1, 70, 4), 127, 200, 300, 512, 520, 768, 1000, 1030, 2048, 3584, 4097, 8192]
)
def test_blocks(columns, itemsize, vector):
    block = layout.block_for(columns, itemsize, vector)
    threads = 32 * block.warps
    assert block.rows * block.columns == threads * block.per_thread
    assert block.rows & (block.rows - 1) == block.columns & (block.columns - 1) == 0
    assert block.columns >= block.per_thread
    assert block.per_thread == (8 if itemsize == 2 and vector == 8 else 4)
    cut = columns > block.columns
    assert block.warps >= (2 if cut else 4)
    assert block.rows == 1 or not cut
    if cut:  # what is not pads up to a power of two
        assert -columns % block.columns < columns / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 3, 8, 40, 129, 520, 2056])
def test_every_width_is_right(device, dtype, columns):
    """Rows that share a warp, fill a block, or are cut into pieces; 4 and 8 columns to a thread."""
    inputs = inputs_of("contiguous", (2, 3, columns), dtype, device)
    noise = amvl_fast.gaussian_noise((2, 3, columns), 3).double()
    right = amvl_fast.reference.gaussian_dual_kl(*(t.double().cpu() for t in inputs), noise)
    got = amvl_fast.gaussian_dual_kl(*inputs, seed=3, backend="triton")
    for value, truth, bound in zip(got, right, [max(4e-7, torch.finfo(dtype).eps), 4e-6, 4e-6], strict=True):
        assert (value.double().cpu() - truth).norm() <= bound * truth.norm()


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("dtypes", ["fff", "bbb", "hhh", "bfb"])
@pytest.mark.parametrize("columns", [7, 72, 100, 513])
def test_a_row_sums_alike_in_any_batch(device, columns, dtypes, padding):
    """Wherever it stands, with whatever it comes; rows behind the first may be less aligned than that."""
    torch.manual_seed(0)
    kinds = [{"f": torch.float32, "b": torch.bfloat16, "h": torch.float16}[c] for c in dtypes + dtypes[0]]
    inputs = [torch.randn(6, columns + padding).to(device, dtype)[:, :columns] for dtype in kinds]

    def sums(first, last):
        out = amvl_fast.gaussian_dual_kl(*(t[first:last] for t in inputs), seed=3, backend="triton")
        return torch.stack(out[1:])

    whole = sums(0, 6)
    for first, last in ((0, 1), (1, 2), (1, 6)):
        assert torch.equal(sums(first, last), whole[:, first:last])


# --- non-finite numbers ---


@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", range(4))
def test_a_bad_number_spoils_its_element_and_no_other_row(device, which, bad, stop_gradient):
    def run(inputs):
        leaves = [t.clone().requires_grad_() for t in inputs]
        out = amvl_fast.gaussian_dual_kl(*leaves, seed=0, stop_gradient=stop_gradient, backend="triton")
        loss = out.z.sum() + 2 * out.forward_kl.sum() + 3 * out.reverse_kl.sum()
        return out, torch.autograd.grad(loss, leaves)

    inputs = inputs_of("contiguous", (1, 6, 40), torch.float32, device)
    clean, clean_grads = run(inputs)
    inputs[which][0, 3, 7] = bad
    dirty, dirty_grads = run(inputs)
    spoiled = torch.zeros(1, 6, 40, dtype=torch.bool, device=device)
    spoiled[0, 3, 7] = True
    for before, after in zip([clean.z, *clean_grads], [dirty.z, *dirty_grads], strict=True):
        assert torch.equal(torch.isnan(after), spoiled)
        assert torch.equal(before[~spoiled], after[~spoiled])
    for before, after in zip(clean[1:], dirty[1:], strict=True):
        assert torch.equal(torch.isnan(after), spoiled.any(-1))
        assert torch.equal(before[~spoiled.any(-1)], after[~spoiled.any(-1)])


# --- the device functions ---


def half_functions(t, remainder, logvar, device):
    n = t.numel()
    out = torch.empty(7, n, device=device)
    half_probe[(1,)](t.to(device), remainder.to(device), logvar.to(device), out, n)
    return out.double().cpu()


def test_half_functions_are_accurate():
    """To a few roundings of their own size, up to where the halves overflow: past ln(2 FLT_MAX) = 89.4."""
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    t = torch.logspace(-7, torch.log10(torch.tensor(89.4)).item(), 1024)
    t = torch.cat([-t, t])
    remainder = t * torch.linspace(-(2.0**-25), 2.0**-25, 2048)
    logvar = torch.linspace(-177.4, 177.4, 2048)
    out = half_functions(t, remainder, logvar, device)
    exact = t.double() + remainder.double()
    phi = amvl_fast.reference.gaussian.phi
    right = [exact.expm1() / 2, phi(exact) / 2, (-exact).expm1() / 2, phi(-exact) / 2]
    right += [(logvar.double() / 2).exp(), (-logvar.double() / 2).exp(), (-logvar.double() / 2).exp()]
    bounds = [3e-7, 6e-7, 3e-7, 6e-7, 2e-7, 2e-7, 2e-7]
    for value, truth, bound in zip(out, right, bounds, strict=True):
        normal = truth.abs() > torch.finfo(torch.float32).tiny
        torch.testing.assert_close(value[normal], truth[normal], rtol=bound, atol=0)


def test_half_functions_at_their_ends(device):
    inf, nan, largest = float("inf"), float("nan"), torch.finfo(torch.float32).max
    t = torch.tensor([0.0, 89.6, 1e3, 1e8, -89.6, -1e3, -1e8, nan])
    logvar = torch.tensor([0.0, 179.0, 300.0, 3e38, -179.0, -300.0, -3e38, nan])
    out = half_functions(t, torch.zeros(8), logvar, device)
    expected = [
        [0, inf, inf, inf, -0.5, -0.5, -0.5, nan],
        [0, inf, inf, inf, 44.3, 499.5, 5e7, nan],
        [0, -0.5, -0.5, -0.5, inf, inf, inf, nan],
        [0, 44.3, 499.5, 5e7, inf, inf, inf, nan],
        [1, inf, inf, inf, 0, 0, 0, nan],
        [1, 0, 0, 0, inf, inf, inf, nan],
        [1, 0, 0, 0, largest, largest, largest, nan],
    ]
    torch.testing.assert_close(out, torch.tensor(expected).double(), rtol=1e-6, atol=2e-38, equal_nan=True)


def test_subtract_loses_nothing(device):
    torch.manual_seed(0)
    a, b = torch.randn(2, 1024) * torch.logspace(-6, 2, 1024)
    out = torch.empty(2, 1024, device=device)
    subtract_probe[(1,)](a.to(device), b.to(device), out, 1024)
    difference, remainder = out.double().cpu()
    assert torch.count_nonzero(remainder) > 100
    assert torch.equal(difference + remainder, a.double() - b.double())


def test_the_rounding_of_delta_is_recovered(device):
    """Log-variances whose difference is no float32: exp(delta) is right to float32, not to |delta| of them."""
    torch.manual_seed(0)
    logvar_q = (30 * torch.rand(64, 8) + 10).to(device)
    logvar_p = (-30 * torch.rand(64, 8) - 10).to(device)
    mean = torch.zeros(64, 8, device=device)
    inputs = [mean, logvar_q, mean, logvar_p]
    got = amvl_fast.gaussian_dual_kl(*inputs, seed=0, backend="triton")
    right = amvl_fast.reference.gaussian_dual_kl(*(t.double() for t in inputs), mean)
    for value, truth in zip(got[1:], right[1:], strict=True):
        torch.testing.assert_close(value.double(), truth, rtol=4e-7, atol=0)


def test_interpreted_says_how_the_kernels_run():
    assert not torch.cuda.is_available() or not kernels.INTERPRETED
    assert torch.cuda.is_available() or kernels.INTERPRETED
