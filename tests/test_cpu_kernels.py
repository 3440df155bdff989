"""The C++ kernels: what they promise beyond the other backends.

A row has the same bits whatever its layout, the threads and the way to memory. Instruction sets agree to float32
rounding, each within the limits of all backends; every one that this processor has is tested, and the code that
machines other than x86 compile.
"""

import pytest
import torch
from cpu_builds import build, copy_of_checkout, load, needs_compiler
from latent_ops import (
    REGIMES,
    TINY,
    bound_of,
    lacks_compiler,
    make_inputs,
    make_upstream,
    relative_error,
    run,
    truth,
)

import amvl_fast

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEED = torch.tensor([7])


def instruction_sets() -> list[str]:
    """Those of this processor, best first; the kernels themselves are needed to ask for them."""
    if lacks_compiler("cpu"):
        return ["baseline"]
    from amvl_fast.kernels import cpu

    before = cpu.instructions()
    names = [name for name in ("avx512", "avx2", "baseline") if cpu.use_instructions(name)]
    assert cpu.use_instructions(before)
    return names


SETS = instruction_sets()

# Runs setup.py as on a machine that is no x86; the macro makes the compiler take that machine's code.
ELSEWHERE = """
import platform, runpy
platform.machine = lambda: "riscv64"
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def portable(tmp_path_factory):
    """The library as any other machine builds it, and what the build printed."""
    checkout = copy_of_checkout(tmp_path_factory.mktemp("portable"))
    printed = build(checkout, "build_ext", "--inplace", setup=["-c", ELSEWHERE], CPPFLAGS="-DAMVL_FAST_PORTABLE")
    return load(checkout / "kernels" / "cpu")._library, printed


@pytest.fixture(params=[pytest.param(name, marks=needs_compiler) for name in [*SETS, "portable"]])
def kernels(request, monkeypatch):
    """The kernels, with each instruction set in turn, and those of the portable library."""
    from amvl_fast.kernels import cpu

    before, threads = cpu.instructions(), torch.get_num_threads()
    if request.param == "portable":
        monkeypatch.setattr(cpu, "_library", request.getfixturevalue("portable")[0])
        assert cpu.instructions() == "baseline"
    else:
        assert cpu.use_instructions(request.param)
        assert cpu.instructions() == request.param
    yield cpu
    torch.set_num_threads(threads)
    monkeypatch.undo()
    assert cpu.use_instructions(before)


def use_baseline(kernels, monkeypatch):
    """What every processor of this machine's kind can run, of the library that is installed."""
    monkeypatch.undo()
    assert kernels.use_instructions("baseline")


def every_kernel(kernels, inputs, upstream) -> list[torch.Tensor]:
    """What all the kernels write, given views of one shape and upstream gradients of any strides."""
    mean_q, logvar_q, mean_p, logvar_p = inputs
    z, *kls = torch.empty_like(mean_q, memory_format=torch.contiguous_format), *torch.empty(2, *mean_q.shape[:-1])
    kernels.gaussian_dual_kl_forward(*inputs, SEED, None, z, *kls)
    results = [z, *kls]
    for stop_gradient in (True, False):
        grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs]
        kernels.gaussian_dual_kl_backward(*inputs, SEED, None, *upstream, *grads, stop_gradient=stop_gradient)
        results += grads
    sample, grad, noise = torch.empty_like(z), torch.empty_like(z), torch.empty(z.shape)
    kernels.sample_gaussian_forward(mean_q, logvar_q, SEED, None, 0.7, 1, sample)
    kernels.sample_gaussian_backward(upstream[0], logvar_q, SEED, None, 0.7, 1, grad)
    kernels.gaussian_noise(noise, SEED, None, 2)
    return [*results, sample, grad, noise]


def assert_same_bits(got, expected):
    for a, b in zip(got, expected, strict=True):
        integers = torch.int32 if a.dtype == torch.float32 else torch.int16
        assert torch.equal(a.view(integers), b.view(integers))


def random_tensors(shape, dtype):
    return [t.detach() for t in make_inputs(shape=shape, dtype=dtype)], make_upstream(shape, dtype)


# --- instruction sets ---


def test_an_instruction_set_that_is_not_there_changes_nothing(kernels):
    before = kernels.instructions()
    assert not kernels.use_instructions("avx1024")
    assert kernels.instructions() == before


def test_the_best_instruction_set_is_the_default(kernels, request):
    assert kernels.use_instructions(None)
    is_portable = request.node.callspec.params["kernels"] == "portable"
    assert kernels.instructions() == ("baseline" if is_portable else SETS[0])


def test_words_are_the_same(kernels, monkeypatch):
    def words():
        out = torch.empty(5, 203, dtype=torch.int32)
        kernels.philox_words(out, torch.tensor([-5]), torch.arange(2**32 - 3, 2**32 + 2), 2**32 - 1)
        return out

    got = words()
    use_baseline(kernels, monkeypatch)
    assert torch.equal(got, words())


@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize("regime", REGIMES)
def test_accuracy(kernels, regime, stop_gradient):
    """With blocks of every size and what is left over."""
    shape = (4, 83)
    inputs, upstream = make_inputs(regime, shape), make_upstream(shape)
    got = run("cpu", inputs, upstream, seed=3, stop_gradient=stop_gradient)
    for name, right in truth(inputs, upstream, seed=3, stop_gradient=stop_gradient).items():
        error = got[name].double() - right.value
        assert error.norm() <= bound_of(name) * right.value.norm() + 4 * TINY, name


@pytest.mark.parametrize("dtype", DTYPES)
def test_sets_agree(kernels, monkeypatch, dtype):
    """To float32 rounding; a narrow dtype shows few of these differences, and those whole."""
    inputs, upstream = random_tensors((8, 331), dtype)
    got = every_kernel(kernels, inputs, upstream)
    use_baseline(kernels, monkeypatch)
    for a, b in zip(got, every_kernel(kernels, inputs, upstream), strict=True):
        assert relative_error(a, b) < (1e-6 if a.dtype == torch.float32 else torch.finfo(dtype).eps / 10)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernels", ["portable"], indirect=True)
def test_portable_code_has_the_same_bits(kernels, monkeypatch, dtype):
    """As the baseline: as many lanes, the same arithmetic."""
    inputs, upstream = random_tensors((8, 331), dtype)
    got = every_kernel(kernels, inputs, upstream)
    use_baseline(kernels, monkeypatch)
    assert_same_bits(got, every_kernel(kernels, inputs, upstream))


@needs_compiler
def test_other_machines_get_no_flags_of_x86(portable):
    library, printed = portable
    assert "kernels/cpu/kernels.cpp" in printed and "-O3" in printed
    assert not {"-mavx2", "-mfma", "-mavx512f"} & set(printed.split())
    assert not library.amvl_choose(b"avx2")


# --- conversions ---


def converted(kernels, numbers, dtype):
    """`numbers` as the means of distributions that are sampled at temperature 0, the samples in `dtype`."""
    z = torch.empty(numbers.shape, dtype=dtype)
    kernels.sample_gaussian_forward(numbers, torch.zeros(()).expand_as(numbers), SEED, None, 0.0, 0, z)
    return z


def assert_same_numbers(got, expected):
    """NaN for NaN. The sign of a zero is the sum's, not the conversion's."""
    same = (got == expected) | (got.isnan() & expected.isnan())
    assert same.all(), (got[~same][:5], expected[~same][:5])


# Whole blocks, and rows that are all rest.
@pytest.mark.parametrize("columns", [64, 1])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_every_narrow_number_widens_exactly(kernels, dtype, columns):
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).view(-1, columns)
    assert_same_numbers(converted(kernels, numbers, torch.float32), numbers.float())
    assert_same_numbers(converted(kernels, numbers, dtype), numbers)
    apart = torch.stack([numbers, torch.zeros_like(numbers)], -1)[..., 0]
    assert_same_numbers(converted(kernels, apart, torch.float32), numbers.float())


@pytest.mark.parametrize("columns", [64, 1])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_narrowing_rounds_as_pytorch_does(kernels, dtype, columns):
    """Every number of the dtype, each with what lies just before, at and after its roundings' boundaries."""
    dropped = 16 if dtype == torch.bfloat16 else 13
    kept = torch.arange(2 ** (32 - dropped))[:, None] << dropped
    half = 1 << (dropped - 1)
    rest = torch.tensor([0, 1, half - 1, half, half + 1, 2 * half - 1])
    # A float16 that is subnormal ends at other bits, which only chance would find.
    subnormal = ((torch.arange(2**11) + 0.5) * 2.0**-24).view(torch.int32).long()
    subnormal = subnormal[:, None] + torch.tensor([-1, 0, 1])
    torch.manual_seed(0)
    chance = torch.randint(2**32, (2**18,))
    bits = torch.cat([(kept + rest).flatten(), subnormal.flatten(), subnormal.flatten() | 1 << 31, chance])
    numbers = bits.to(torch.int32).view(torch.float32)
    numbers = numbers[: numbers.numel() // 64 * 64].view(-1, columns)
    assert_same_numbers(converted(kernels, numbers, dtype), numbers.to(dtype))


def test_flushed_subnormals_of_float16_are_kept(kernels):
    """They are normal numbers in float32."""
    numbers = torch.arange(1, 2**10, dtype=torch.int16).view(torch.float16).view(1, -1)
    expected = numbers.float()
    torch.set_flush_denormal(True)
    try:
        assert_same_numbers(converted(kernels, numbers, torch.float32), expected)
    finally:
        torch.set_flush_denormal(False)


def test_a_temperature_beyond_float32_is_infinite(kernels):
    mean, logvar = torch.zeros(2, 9)
    expected, got = (
        amvl_fast.sample_gaussian(mean, logvar, temperature=1e39, seed=1, backend=backend)
        for backend in ("torch", "cpu")
    )
    assert expected.isinf().all()
    assert torch.equal(got, expected)


# --- the same bits ---


def chunked(t):
    return torch.stack([t, t + 1], -2).flatten(-2)[..., : t.shape[-1]]


def transposed(t):
    return t.transpose(0, 2).contiguous().transpose(0, 2)


def columns_first(t):
    return t.movedim(-1, 0).contiguous().movedim(0, -1)


def columns_apart(t):
    return t.repeat_interleave(3, -1)[..., 1::3]


def misaligned(t):
    """One element past where memory begins."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


def bytes_off(t):
    """No multiple of an element past it, as in a mapped file."""
    memory = torch.cat([torch.zeros(1, dtype=torch.uint8), t.contiguous().view(torch.uint8).flatten()])
    return torch.frombuffer(memory.numpy(), dtype=t.dtype, offset=1).view(t.shape)


def expanded_rows(t):
    return t[:1, :1].expand(t.shape)


def expanded_columns(t):
    return t[..., :1].expand(t.shape)


VIEWS = [
    chunked,
    transposed,
    columns_first,
    columns_apart,
    misaligned,
    bytes_off,
    expanded_rows,
    expanded_columns,
]


# All inputs and the gradient of z in one layout, and each in another one.
LAYOUTS = {view.__name__: [view] * 5 for view in VIEWS} | {"mixed": VIEWS[:5], "mixed otherwise": VIEWS[3:]}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_have_the_same_bits(kernels, layout, dtype):
    tensors, (grad_z, *grad_kls) = random_tensors((3, 1, 5, 83), dtype)
    views = [make_view(t) for make_view, t in zip(LAYOUTS[layout], [*tensors, grad_z], strict=True)]
    assert not any(t.is_contiguous() and t.data_ptr() % 64 == 0 for t in views)
    grad_kls = [columns_apart(w) for w in grad_kls]
    compact = [t.clone(memory_format=torch.contiguous_format) for t in (*views, *grad_kls)]
    expected = every_kernel(kernels, compact[:4], compact[4:])
    assert_same_bits(every_kernel(kernels, views[:4], [views[4], *grad_kls]), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_give_the_same_bits(kernels, dtype):
    inputs, upstream = random_tensors((37, 1003), dtype)  # enough for seven threads, and shares of unequal size
    torch.set_num_threads(1)
    alone = every_kernel(kernels, inputs, upstream)
    for threads in (2, 7, 64):
        torch.set_num_threads(threads)
        assert_same_bits(every_kernel(kernels, inputs, upstream), alone)


@pytest.mark.parametrize("columns", [1024, 1003])
@pytest.mark.parametrize("dtype", DTYPES)
def test_stores_past_the_caches_give_the_same_bits(kernels, monkeypatch, dtype, columns):
    """Large outputs take another way to memory, row by row as its alignment allows."""
    rows = (8 << 20) // (columns * dtype.itemsize) + 1
    inputs, upstream = random_tensors((1, columns), dtype)
    inputs = [t + torch.arange(rows).view(-1, 1).to(dtype) / rows for t in inputs]
    upstream = [upstream[0].expand(rows, columns), *[w.expand(rows) for w in upstream[1:]]]
    assert inputs[0].nbytes >= kernels._BYTES_PAST_CACHES
    large = every_kernel(kernels, inputs, upstream)
    monkeypatch.setattr(kernels, "_BYTES_PAST_CACHES", 1 << 60)
    assert_same_bits(large, every_kernel(kernels, inputs, upstream))
