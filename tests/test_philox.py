"""The noise: its words against Random123 and NumPy, its normals against float64, its independence."""

import math

import numpy as np
import pytest
import torch

import amvl_fast
from amvl_fast.ops.philox import box_muller, philox4x32, philox_words

BACKENDS = ["torch", "triton"]

# Known-answer vectors of Random123 (kat_vectors, philox4x32 with 10 rounds): counter, key, words.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]

SEEDS = [0, 1, -1, 0x299F31D0A4093822, 2**63 - 1, -(2**63)]


def from_hex(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def numpy_philox(counter: list[np.ndarray], key: list[int]) -> list[np.ndarray]:
    """Philox 4x32-10 in unsigned NumPy arithmetic, written from the paper."""
    mask = np.uint64(0xFFFFFFFF)
    x = [np.asarray(c, dtype=np.uint64) for c in counter]
    for round_ in range(10):
        k0 = np.uint64((key[0] + round_ * 0x9E3779B9) & 0xFFFFFFFF)
        k1 = np.uint64((key[1] + round_ * 0xBB67AE85) & 0xFFFFFFFF)
        p0 = x[0] * np.uint64(0xD2511F53)
        p1 = x[2] * np.uint64(0xCD9E8D57)
        shift = np.uint64(32)
        x = [(p1 >> shift) ^ x[1] ^ k0, p1 & mask, (p0 >> shift) ^ x[3] ^ k1, p0 & mask]
    return x


def numpy_normals(rows: np.ndarray, columns: int, seed: int, stream: int = 0) -> np.ndarray:
    """The definition, `[len(rows), columns]` in float64."""
    group = np.arange((columns + 3) // 4)[None, :]
    row = rows[:, None]
    shape = np.broadcast_shapes(group.shape, row.shape)
    counter = [group, row & 0xFFFFFFFF, row >> 32, np.full((1, 1), stream)]
    key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    w = [np.broadcast_to(x, shape).astype(np.float64) for x in numpy_philox(counter, key)]
    out = np.empty((*shape, 4))
    for i in (0, 2):
        radius = np.sqrt(-2 * np.log((w[i] + 0.5) / 2**32))
        out[..., i] = radius * np.cos(2 * np.pi * w[i + 1] / 2**32)
        out[..., i + 1] = radius * np.sin(2 * np.pi * w[i + 1] / 2**32)
    return out.reshape(len(rows), -1)[:, :columns]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_known_answers(counter, key, words):
    got = philox4x32([torch.tensor(c) for c in from_hex(counter)], [torch.tensor(k) for k in from_hex(key)])
    assert [int(w) for w in got] == from_hex(words)
    got = numpy_philox([np.array([c]) for c in from_hex(counter)], from_hex(key))
    assert [int(w[0]) for w in got] == from_hex(words)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("first_row", [0, 2**32 - 2])
def test_words_match_numpy(seed, first_row):
    words = philox_words(4, 10, torch.tensor([seed]), stream=7, first_row=first_row)
    row = np.arange(first_row, first_row + 4)[:, None]
    counter = [np.arange(3)[None, :], row & 0xFFFFFFFF, row >> 32, np.full((1, 1), 7)]
    expected = numpy_philox(counter, [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF])
    for word, right in zip(words, expected, strict=True):
        np.testing.assert_array_equal(word.numpy(), np.broadcast_to(right, (4, 3)).astype(np.int64))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("seed", "stream"), [*[(seed, 0) for seed in SEEDS], (5, 1), (5, 2**32 - 1)])
def test_normals_match_float64(device, backend, seed, stream):
    noise = amvl_fast.gaussian_noise((3, 5, 18), seed, device=device, backend=backend, stream=stream)
    right = numpy_normals(np.arange(15), 18, seed, stream)
    # A few float32 roundings of each value, however small: nothing is lost near zero or in the tails.
    np.testing.assert_allclose(noise.cpu().numpy().reshape(15, 18), right, rtol=6e-7, atol=0)


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


def test_moments_and_distribution():
    x = amvl_fast.gaussian_noise((4096, 64), seed=11).double().flatten()
    n = x.numel()
    # Five standard errors of each sample moment of a standard normal.
    for power, expected, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs((x**power).mean().item() - expected) < 5 * math.sqrt(variance / n), power
    uniform = torch.special.ndtr(x).sort().values
    steps = torch.arange(n, dtype=torch.float64)
    distance = torch.maximum((steps + 1) / n - uniform, uniform - steps / n).max().item()
    assert distance * math.sqrt(n) < 1.95  # Kolmogorov-Smirnov at the level of 0.001


def test_rows_columns_seeds_and_streams_are_independent():
    noise = {
        (seed, stream): amvl_fast.gaussian_noise((512, 128), seed, stream=stream).double()
        for seed, stream in [(0, 0), (1, 0), (2**32, 0), (0, 1)]
    }
    base = noise[0, 0]
    n = base.numel()
    others = [other for key, other in noise.items() if key != (0, 0)]
    others += [base.roll(1, 0), base.roll(1, 1), base.roll(2, 1), base.roll(4, 1)]
    for other in others:
        assert abs((base * other).mean().item()) < 5 / math.sqrt(n)
        # Squares too: the two normals of one radius would show here if they shared more than a circle.
        assert abs(((base**2 - 1) * (other**2 - 1)).mean().item()) < 5 * 2 / math.sqrt(n)


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
