"""The noise: its words against Random123 and NumPy, its normals against float64, its statistics."""

import math

import numpy as np
import pytest
import torch
from latent_ops import BACKENDS, numpy_normals, numpy_philox, numpy_words

import amvl_fast
from amvl_fast.ops.philox import box_muller, philox4x32, philox_words

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# Known-answer vectors of Random123 (kat_vectors, philox4x32 with 10 rounds): counter, key, words.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]

SEEDS = [0, 1, -1, 0x299F31D0A4093822, 2**63 - 1, -(2**63)]
# A normal may be off by a few float32 roundings of its own value, however small that is.
BOUND = 6e-7


def from_hex(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_known_answers(counter, key, words):
    got = philox4x32([torch.tensor(c) for c in from_hex(counter)], [torch.tensor(k) for k in from_hex(key)])
    assert [int(w) for w in got] == from_hex(words)
    got = numpy_philox([np.array([c]) for c in from_hex(counter)], from_hex(key))
    assert [int(w[0]) for w in got] == from_hex(words)


# --- the words, bit for bit ---


def torch_words(rows, groups, seed, stream, first_row):
    row = torch.arange(first_row, first_row + rows, device=seed.device)
    return torch.stack(philox_words(row, 4 * groups, seed, stream=stream), dim=-1)


def triton_words(rows, groups, seed, stream, first_row):
    from words_probe import noise_probe

    words = torch.empty(rows, groups, 4, dtype=torch.int32, device=seed.device)
    normals = torch.empty(rows, 4 * groups, device=seed.device)
    noise_probe[(1,)](words, normals, seed, stream, first_row, 0, rows, groups)
    return words


def cpu_words(rows, groups, seed, stream, first_row):
    from amvl_fast.kernels.cpu import philox_words

    words = torch.empty(rows, 4 * groups, dtype=torch.int32)
    philox_words(words, seed, torch.arange(first_row, first_row + rows), stream)
    return words.reshape(rows, groups, 4)


# Every backend has to show its words: one that is not here fails.
WORDS = {"torch": torch_words, "triton": triton_words, "cpu": cpu_words}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("stream", [0, 2**32 - 1])
def test_words_match_numpy(device, backend, seed, stream):
    """Where the row passes 31 and 32 bits, too."""
    for first_row in (0, 2**31 - 2, 2**32 - 2, 2**40 + 5):
        words = WORDS[backend](4, 8, torch.tensor([seed], device=device), stream, first_row)
        right = numpy_words(np.arange(first_row, first_row + 4), 8, seed, stream)
        np.testing.assert_array_equal(words.cpu().numpy().astype(np.int64) & 0xFFFFFFFF, right.astype(np.int64))


# --- the normals, to float32 rounding ---


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("seed", "stream"), [*[(seed, 0) for seed in SEEDS], (5, 1), (5, 2**31), (5, 2**32 - 1)])
def test_normals_match_float64(device, backend, seed, stream):
    noise = amvl_fast.gaussian_noise((3, 5, 18), seed, device=device, backend=backend, stream=stream)
    right = numpy_normals(np.arange(15), 18, seed, stream)
    assert noise.dtype == torch.float32
    np.testing.assert_allclose(noise.cpu().numpy().reshape(15, 18), right, rtol=BOUND, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("columns", [1, 2, 3, 4, 5, 17, 1024, 1030])
def test_normals_depend_on_row_and_column_alone(device, backend, columns):
    whole = amvl_fast.gaussian_noise((6, 2048), 3, device=device, backend=backend)
    part = amvl_fast.gaussian_noise((3, 2, columns), 3, device=device, backend=backend)
    assert part.shape == (3, 2, columns)
    assert torch.equal(part.reshape(6, columns), whole[:, :columns])
    assert torch.equal(amvl_fast.gaussian_noise((2, columns), 3, device=device, backend=backend), part[0])


def test_device_functions_at_the_extremes(device):
    """`-ln u` and the angle at the words where float32 goes wrong first: both ends and every quarter turn."""
    pytest.importorskip("triton")
    from kernel_probes import philox_probe

    quarters = [q * 2**30 + offset for q in range(4) for offset in (0, 1, 2**29 - 1, 2**29, 2**30 - 1)]
    edges = [0, 1, 2, 2**23, 2**24 - 1, 2**31, 0xB504F333, 0xB504F334, 2**32 - 2**24, 2**32 - 2, 2**32 - 1]
    random = np.random.default_rng(0).integers(0, 2**32, 4000).tolist()
    words = np.array((quarters + edges + random) + [0], dtype=np.int64)
    words = np.resize(words, 4096)
    out = torch.empty(3, 4096, device=device)
    philox_probe[(1,)](torch.tensor(words, device=device), out, 4096)
    minus_log, cosine, sine = out.cpu().double().numpy()
    angle = 2 * np.pi * words.astype(np.float64) / 2**32
    np.testing.assert_allclose(minus_log, -np.log((words + 0.5) / 2**32), rtol=3e-7, atol=0)
    # Where the true value is 0, float64's own cosine of pi / 2 is 6e-17.
    np.testing.assert_allclose(cosine, np.cos(angle), rtol=3e-7, atol=3e-16)
    np.testing.assert_allclose(sine, np.sin(angle), rtol=3e-7, atol=5e-16)


def test_radius_is_finite_and_the_tail_is_long():
    zero, quarter = torch.tensor([0]), torch.tensor([2**30])
    normal = box_muller([zero, zero, zero, quarter])
    assert normal[0, 0] == pytest.approx(math.sqrt(66 * math.log(2)), rel=1e-6)  # 6.76
    assert normal[0, 3] == normal[0, 0]


# Streams of seed 0 whose first eight rows hold a normal beyond six standard deviations, found by search.
TAILS = [(1628781, 6, 46), (3322437, 5, 30), (5884047, 1, 28)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("stream", "row", "column"), TAILS)
def test_the_tail_passes_six(device, backend, stream, row, column):
    noise = amvl_fast.gaussian_noise((8, 64), 0, stream=stream, device=device, backend=backend)
    assert noise[row, column].abs() > 6
    np.testing.assert_allclose(noise.cpu().numpy(), numpy_normals(np.arange(8), 64, 0, stream), rtol=BOUND, atol=0)


@pytest.mark.parametrize("first_row", [2**31 - 2, 2**32 - 2, 2**40 + 5])
def test_normals_of_far_rows(device, first_row):
    """What no tensor here is long enough to show, by a kernel of its own."""
    pytest.importorskip("triton")
    from words_probe import noise_probe

    words = torch.empty(4, 8, 4, dtype=torch.int32, device=device)
    normals = torch.empty(4, 32, device=device)
    noise_probe[(1,)](words, normals, torch.tensor([-5], device=device), 7, first_row, 0, 4, 8)
    right = numpy_normals(np.arange(first_row, first_row + 4), 32, -5, 7)
    np.testing.assert_allclose(normals.cpu().numpy(), right, rtol=BOUND, atol=0)


# --- the statistics ---


def moments_are_normal(sums: dict[int, float], count: float) -> None:
    """Five standard errors of each sample moment; moment 2 k of a standard normal is (2 k - 1)!!."""

    def moment(power):
        return 0 if power % 2 else math.prod(range(1, power, 2))

    for power, total in sums.items():
        error = math.sqrt((moment(2 * power) - moment(power) ** 2) / count)
        assert abs(total / count - moment(power)) < 5 * error, power


def test_moments_and_distribution():
    x = amvl_fast.gaussian_noise((4096, 64), seed=11).double().flatten()
    n = x.numel()
    moments_are_normal({power: (x**power).sum().item() for power in (1, 2, 3, 4)}, n)
    uniform = torch.special.ndtr(x).sort().values
    steps = torch.arange(n, dtype=torch.float64)
    distance = torch.maximum((steps + 1) / n - uniform, uniform - steps / n).max().item()
    assert distance * math.sqrt(n) < 1.95  # Kolmogorov-Smirnov at the level of 0.001


def test_rows_columns_seeds_and_streams_are_independent():
    noise = {
        (seed, stream): amvl_fast.gaussian_noise((512, 128), seed, stream=stream).double()
        for seed, stream in [(0, 0), (1, 0), (2**32, 0), (-(2**63), 0), (0, 1), (0, 2**31)]
    }
    base = noise[0, 0]
    n = base.numel()
    others = [other for key, other in noise.items() if key != (0, 0)]
    others += [base.roll(1, 0), base.roll(64, 0), *(base.roll(step, 1) for step in (1, 2, 3, 4, 64))]
    others += [base.flip(0), base.flip(1), base[:128].T.repeat(4, 1)]
    for other in others:
        other, pair = other.reshape(base.shape), base
        if other is others[-1]:  # the diagonal of a transpose is itself
            pair = base.clone().fill_diagonal_(0)
        assert abs((pair * other).mean().item()) < 5 / math.sqrt(n)
        # Squares too: the two normals of one radius would show here if they shared more than a circle.
        assert abs(((pair**2 - 1) * (other**2 - 1)).mean().item()) < 5 * 2 / math.sqrt(n)


@pytest.mark.slow
def test_a_hundred_million_draws():
    """Moments, 1,000 equally likely cells, and the tails to past six standard deviations."""
    # The fastest backend here; that all give the same normals is for the tests above to show.
    available = [name for name, reason in amvl_fast.ops.backend_status().items() if reason is None]
    backend = "cpu" if "cpu" in available and not torch.cuda.is_available() else None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    edges = torch.special.ndtri(torch.linspace(0, 1, 1001, dtype=torch.float64)[1:-1]).to(device)
    levels = [3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0]
    cells = torch.zeros(1000, dtype=torch.int64, device=device)
    beyond, sums, lagged, count = dict.fromkeys(levels, 0), dict.fromkeys(range(1, 7), 0.0), 0.0, 0
    for stream in range(24):
        x = amvl_fast.gaussian_noise((4096, 1024), 2026, stream=stream, device=device, backend=backend).double()
        count += x.numel()
        cells += torch.bincount(torch.bucketize(x.flatten(), edges), minlength=1000)
        for level in levels:
            beyond[level] += int((x.abs() > level).sum())
        power = x.clone()
        for k in sums:
            sums[k] += power.sum().item()
            power *= x
        lagged += (x[1:] * x[:-1]).sum().item()
    assert count > 10**8
    moments_are_normal(sums, count)
    assert abs(lagged) < 5 * math.sqrt(count)
    expected = count / 1000
    chi_square = ((cells - expected) ** 2 / expected).sum().item()
    assert abs(chi_square - 999) < 5 * math.sqrt(2 * 999)
    for level, seen in beyond.items():
        mean = count * math.erfc(level / math.sqrt(2))
        assert abs(seen - mean) < 5 * math.sqrt(mean) + 2, (level, seen, mean)


# --- how it is asked for ---


@pytest.mark.parametrize("backend", BACKENDS)
def test_seed_forms_agree_and_none_follows_the_generator(device, backend):
    def make(seed):
        return amvl_fast.gaussian_noise((2, 8), seed, device=device, backend=backend)

    assert torch.equal(make(9), make(torch.tensor([9], device=device)))
    assert torch.equal(make(9), make(torch.tensor(9, device=device)))
    torch.manual_seed(0)
    first, second = make(None), make(None)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(make(None), first)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (2, 0, 3), (1,), (1, 1)])
def test_small_shapes(device, backend, shape):
    assert amvl_fast.gaussian_noise(shape, 0, device=device, backend=backend).shape == shape
