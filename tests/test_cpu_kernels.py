"""The C++ kernels: what they promise beyond the other backends, and an installation that has to do without them.

A row has the same bits whatever its layout, the threads and the way to memory. Instruction sets agree to float32
rounding, each within the limits of all backends; every one that this processor has is tested.
"""

import ctypes
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from latent_ops import (
    NO_COMPILER,
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

CHECKOUT = Path(__file__).resolve().parents[1]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEED = torch.tensor([7])

needs_compiler = pytest.mark.skipif(lacks_compiler("cpu"), reason=NO_COMPILER)


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


@pytest.fixture(params=[pytest.param(name, marks=needs_compiler) for name in SETS])
def kernels(request):
    """The kernels, with each instruction set in turn."""
    from amvl_fast.kernels import cpu

    before, threads = cpu.instructions(), torch.get_num_threads()
    assert cpu.use_instructions(request.param)
    assert cpu.instructions() == request.param
    yield cpu
    torch.set_num_threads(threads)
    assert cpu.use_instructions(before)


def every_kernel(kernels, inputs, upstream) -> list[torch.Tensor]:
    """What all the kernels write, given views of one shape and upstream gradients of any strides."""
    mean_q, logvar_q, mean_p, logvar_p = inputs
    z, *kls = torch.empty_like(mean_q, memory_format=torch.contiguous_format), *torch.empty(2, *mean_q.shape[:-1])
    kernels.gaussian_dual_kl_forward(*inputs, SEED, z, *kls)
    results = [z, *kls]
    for stop_gradient in (True, False):
        grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs]
        kernels.gaussian_dual_kl_backward(*inputs, SEED, *upstream, *grads, stop_gradient=stop_gradient)
        results += grads
    sample, grad, noise = torch.empty_like(z), torch.empty_like(z), torch.empty(z.shape)
    kernels.sample_gaussian_forward(mean_q, logvar_q, SEED, 0.7, 1, sample)
    kernels.sample_gaussian_backward(upstream[0], logvar_q, SEED, 0.7, 1, grad)
    kernels.gaussian_noise(noise, SEED, 2)
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


def test_the_best_instruction_set_is_the_default(kernels):
    assert kernels.use_instructions(None)
    assert kernels.instructions() == SETS[0]


def test_words_are_the_same(kernels):
    def words():
        out = torch.empty(5, 203, dtype=torch.int32)
        kernels.philox_words(out, torch.tensor([-5]), 2**32 - 1, 2**32 - 3)
        return out

    got = words()
    assert kernels.use_instructions("baseline")
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
def test_sets_agree(kernels, dtype):
    """To float32 rounding; a narrow dtype shows few of these differences, and those whole."""
    inputs, upstream = random_tensors((8, 331), dtype)
    got = every_kernel(kernels, inputs, upstream)
    assert kernels.use_instructions("baseline")
    for a, b in zip(got, every_kernel(kernels, inputs, upstream), strict=True):
        assert relative_error(a, b) < (1e-6 if a.dtype == torch.float32 else torch.finfo(dtype).eps / 10)


# --- conversions ---


def converted(kernels, numbers, dtype):
    """`numbers` as the means of distributions that are sampled at temperature 0, the samples in `dtype`."""
    z = torch.empty(numbers.shape, dtype=dtype)
    kernels.sample_gaussian_forward(numbers, torch.zeros(()).expand_as(numbers), SEED, 0.0, 0, z)
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


# --- without the library, or with another one ---

REPORT = """
import json, torch, amvl_fast
from amvl_fast import doctor
x = torch.ones(2, 3)
automatic = amvl_fast.gaussian_dual_kl(x, x, x, x, seed=1)
same = all(map(torch.equal, automatic, amvl_fast.gaussian_dual_kl(x, x, x, x, seed=1, backend="torch")))
try:
    error = str(amvl_fast.gaussian_dual_kl(x, x, x, x, seed=1, backend="cpu"))
except amvl_fast.errors.AMVLError as refusal:
    error = f"AMVLError: {refusal}"
print(json.dumps([amvl_fast.__file__, doctor.report(), same, error]))
"""


def assert_missing(site: Path, reason: str):
    """The package that is installed there works, without the cpu backend, and says why."""
    environment = {name: value for name, value in os.environ.items() if name != "AMVL_FAST_BACKEND"}
    result = subprocess.run(
        [sys.executable, "-c", REPORT],
        cwd=site,
        env={**environment, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    file, doctor, same_as_torch, error = json.loads(result.stdout)
    assert file.startswith(str(site))
    (line,) = [line for line in doctor.splitlines() if line.startswith("backend cpu")]
    assert "missing" in line and reason in line and "install" in line
    assert same_as_torch
    assert error.startswith("AMVLError: backend='cpu' cannot run here") and reason in error and "install" in error
    assert "\n" not in error and error.endswith(".")


@pytest.fixture
def site(tmp_path):
    """The package as an installation without the library leaves it."""
    without = shutil.ignore_patterns("__pycache__", "*.so", "*.cpp", "*.h")
    shutil.copytree(CHECKOUT / "amvl_fast", tmp_path / "amvl_fast", ignore=without)
    shutil.copytree(CHECKOUT / "kernels" / "cpu", tmp_path / "amvl_fast" / "kernels" / "cpu", ignore=without)
    return tmp_path


def test_without_the_library(site):
    assert_missing(site, "library is missing")


@needs_compiler
def test_a_library_of_other_sources_is_refused(site):
    """One with another number, and one so old that it has none."""
    compiler = next(path for name in ("c++", "g++", "clang++") if (path := shutil.which(name)))
    folder = site / "amvl_fast" / "kernels" / "cpu"
    for source in ('extern "C" int amvl_interface() { return -1; }', ""):
        (site / "other.cpp").write_text(source)
        (folder / "libamvl_fast.so").unlink(missing_ok=True)
        command = [compiler, "-shared", "-fPIC", site / "other.cpp", "-o", folder / "libamvl_fast.so"]
        subprocess.run(command, check=True)
        specification = importlib.util.spec_from_file_location("other", folder / "__init__.py")
        with pytest.raises(ImportError, match="built from other sources"):
            specification.loader.exec_module(importlib.util.module_from_spec(specification))
    assert_missing(site, "built from other sources")


# --- the build ---


@pytest.fixture
def checkout(tmp_path):
    """Sources to build, with a library that an earlier build left."""
    checkout = tmp_path / "checkout"
    for name in ("amvl_fast", "kernels"):
        shutil.copytree(CHECKOUT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, checkout)
    (checkout / "kernels" / "cpu" / "libamvl_fast.so").write_text("old")
    return checkout


def build(checkout: Path, *command: str, **environment: str):
    result = subprocess.run(
        [sys.executable, "setup.py", *command],
        cwd=checkout,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_build_without_a_compiler_leaves_the_kernels_out(checkout, tmp_path):
    failing = tmp_path / "failing"
    failing.write_text("#!/bin/sh\nexit 1\n")
    failing.chmod(0o755)
    for compiler in ("/nonexistent", str(failing)):
        build(checkout, "bdist_wheel", CC=compiler, CXX=compiler)
        (wheel,) = (checkout / "dist").glob("*.whl")
        names = zipfile.ZipFile(wheel).namelist()
        assert "amvl_fast/kernels/cpu/__init__.py" in names
        assert not any(name.endswith(".so") for name in names)
    # As for an editable install: the old library must not pass for a new one.
    build(checkout, "build_ext", "--inplace", CC=compiler, CXX=compiler)
    assert not (checkout / "kernels" / "cpu" / "libamvl_fast.so").exists()


@needs_compiler
def test_a_wheel_has_the_library_and_not_its_sources(checkout, tmp_path):
    build(checkout, "bdist_wheel")
    (wheel,) = (checkout / "dist").glob("*.whl")
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")
    archive = zipfile.ZipFile(wheel)
    assert {Path(name).suffix for name in archive.namelist() if "/kernels/cpu/" in name} == {".py", ".so"}
    library = archive.extract("amvl_fast/kernels/cpu/libamvl_fast.so", tmp_path)
    from amvl_fast.kernels import cpu

    assert ctypes.CDLL(library).amvl_interface() == cpu._INTERFACE
