"""What the tests of the latent ops share: backends, inputs of every kind, float64 truths and error budgets."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import amvl_fast
from amvl_fast.ops import backend_status
from amvl_fast.reference.gaussian import phi

OUTPUTS = ["z", "forward_kl", "reverse_kl"]
INPUTS = ["posterior_mean", "posterior_logvar", "prior_mean", "prior_logvar"]
NAMES = OUTPUTS + INPUTS

NO_COMPILER = "there is no C++ compiler on PATH (c++, g++ or clang++) to build the cpu backend with"


def lacks_compiler(backend: str) -> bool:
    """The one reason to skip a backend. Any other way for it to be missing is a failure."""
    if backend != "cpu" or backend_status()["cpu"] is None:
        return False
    return not any(shutil.which(name) for name in ("c++", "g++", "clang++"))


def _parameter(backend: str):
    return pytest.param(backend, marks=pytest.mark.skipif(lacks_compiler(backend), reason=NO_COMPILER))


BACKENDS = [_parameter(name) for name in amvl_fast.ops.BACKENDS]
# PyTorch sums in an order that depends on the shape; the kernels promise more, bit for bit.
KERNELS = [_parameter(name) for name in amvl_fast.ops.BACKENDS if name != "torch"]
CPU = [_parameter("cpu")]


def device_for(backend: str | None) -> torch.device:
    """Where a backend's tensors live here: on the GPU if there is one, except for the backend of the CPU."""
    if torch.cuda.is_available() and backend != "cpu":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


# --- the noise, defined once more in NumPy ---


def numpy_philox(counter: Sequence[np.ndarray], key: Sequence[int]) -> list[np.ndarray]:
    """Philox 4x32-10 in unsigned NumPy arithmetic, written from the paper."""
    mask, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    x = [np.asarray(c, dtype=np.uint64) for c in counter]
    for round_ in range(10):
        k0 = np.uint64((key[0] + round_ * 0x9E3779B9) & 0xFFFFFFFF)
        k1 = np.uint64((key[1] + round_ * 0xBB67AE85) & 0xFFFFFFFF)
        p0 = x[0] * np.uint64(0xD2511F53)
        p1 = x[2] * np.uint64(0xCD9E8D57)
        x = [(p1 >> shift) ^ x[1] ^ k0, p1 & mask, (p0 >> shift) ^ x[3] ^ k1, p0 & mask]
    return x


def numpy_words(rows: np.ndarray, groups: int, seed: int, stream: int = 0) -> np.ndarray:
    """The words of `groups` counters in each of these rows, `[len(rows), groups, 4]`."""
    row = rows[:, None]
    counter = [np.arange(groups)[None, :], row & 0xFFFFFFFF, row >> 32, np.full((1, 1), stream)]
    words = numpy_philox(counter, [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF])
    return np.stack([np.broadcast_to(word, (len(rows), groups)) for word in words], axis=-1)


def numpy_normals(rows: np.ndarray, columns: int, seed: int, stream: int = 0) -> np.ndarray:
    """The normals of these rows by their definition, `[len(rows), columns]` in float64."""
    words = numpy_words(rows, (columns + 3) // 4, seed, stream).astype(np.float64)
    radius = np.sqrt(-2 * np.log((words[..., 0::2] + 0.5) / 2**32))
    angle = 2 * np.pi * words[..., 1::2] / 2**32
    normals = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    return normals.reshape(len(rows), 4 * words.shape[1])[:, :columns]


def true_noise(shape: Sequence[int], seed: int, stream: int = 0, sample_ids: Sequence[int] | None = None) -> Tensor:
    """The noise of a whole tensor, in float64."""
    rows, m = np.arange(math.prod(shape[:-1])), math.prod(shape[1:-1])
    if sample_ids is not None:  # in Python's integers, which know no 64 bits
        rows = np.array([(sample_id * m + i) % 2**64 for sample_id in sample_ids for i in range(m)], dtype=np.uint64)
    normals = numpy_normals(rows, shape[-1], seed, stream)
    return torch.from_numpy(np.ascontiguousarray(normals)).reshape(tuple(shape))


# --- inputs ---

REGIMES = [
    "ordinary",
    "zeros",
    "equal",
    "equal means",
    "equal log-variances",
    *[f"1e-{k} apart" for k in range(1, 8)],
    "log-variances to 30",
    "log-variances of 30",
    "mean gaps of 1e4",
    "mean gaps of 1e4, log-variances of 30",
    "delta of 85",
    "delta of 85, one wide",
    "log-variances of -100, mean gaps of 1e-12",
    "denormal",
]


def draw(regime: str, shape: Sequence[int], rng: np.random.Generator) -> list[np.ndarray]:
    """Posterior mean and log-variance, prior mean and log-variance, in float64."""

    def normal():
        return rng.standard_normal(shape)

    def sign():
        return rng.choice([-1.0, 1.0], shape)

    mean_q, logvar_q, mean_p, logvar_p = (normal() for _ in range(4))
    if regime == "zeros":
        return [np.zeros(shape)] * 4
    if regime == "equal":
        return [10 * mean_q, 10 * logvar_q] * 2
    if regime == "equal means":
        return [mean_q, logvar_q, mean_q, logvar_p]
    if regime == "equal log-variances":
        return [mean_q, logvar_q, mean_p, logvar_q]
    if regime.endswith(" apart"):
        gap = float(regime.split()[0])
        return [mean_q, logvar_q, mean_q + gap * mean_p, logvar_q + gap * logvar_p]
    if regime == "log-variances to 30":
        return [mean_q, np.clip(15 * logvar_q, -30, 30), mean_p, np.clip(15 * logvar_p, -30, 30)]
    if "gaps of 1e4" in regime:
        mean_p = mean_q + 1e4 * mean_p
    if "log-variances of 30" in regime:
        logvar_q, logvar_p = 30 * sign(), 30 * sign()
    if regime == "delta of 85":
        half = 42.5 * sign()
        return [mean_q, logvar_q / 4 - half, mean_p, logvar_p / 4 + half]
    if regime == "delta of 85, one wide":
        wide = 80 * sign()
        return [mean_q, logvar_q, mean_p, wide + logvar_p]
    if regime == "log-variances of -100, mean gaps of 1e-12":
        return [1e-12 * mean_q, logvar_q - 100, 1e-12 * mean_p, logvar_p - 100]
    if regime == "denormal":
        return [1e-39 * x for x in (mean_q, logvar_q, mean_p, logvar_p)]
    return [mean_q, logvar_q, mean_p, logvar_p]


def make_inputs(regime="ordinary", shape=(3, 8), dtype=torch.float32, device="cpu", seed=0) -> list[Tensor]:
    """Four leaves that ask for gradients."""
    arrays = draw(regime, shape, np.random.default_rng(seed))
    return [torch.from_numpy(a.copy()).to(device, dtype).requires_grad_() for a in arrays]


def make_upstream(shape, dtype=torch.float32, device="cpu", seed=1) -> list[Tensor]:
    """Gradients of z, in its dtype, and of the two KLs, one weight a row."""
    rng = np.random.default_rng(seed)
    sizes = [(shape, dtype), (shape[:-1], torch.float32), (shape[:-1], torch.float32)]
    return [torch.as_tensor(rng.standard_normal(size)).to(device, kind) for size, kind in sizes]


# --- results and truths ---


def run(backend: str, inputs, upstream, **options) -> dict[str, Tensor]:
    """The op's outputs, and the gradients of the inputs that ask for one, by name."""
    outputs = amvl_fast.gaussian_dual_kl(*inputs, backend=backend, **options)
    return {**dict(zip(OUTPUTS, outputs, strict=True)), **gradients(outputs, inputs, upstream)}


def gradients(outputs, inputs, upstream, **options) -> dict[str, Tensor]:
    """What these upstream gradients (None for none) become; zeros where nothing flows."""
    asking = {name: t for name, t in zip(INPUTS, inputs, strict=True) if t.requires_grad}
    used = [(o, g) for o, g in zip(outputs, upstream, strict=True) if g is not None and o.requires_grad]
    if not used or not asking:
        return {name: torch.zeros_like(t) for name, t in asking.items()}
    outputs, upstream = zip(*used, strict=True)
    grads = torch.autograd.grad(outputs, list(asking.values()), upstream, materialize_grads=True, **options)
    return dict(zip(asking, grads, strict=True))


class Truth(NamedTuple):
    """A result in float64 and what its rounding errors are measured by.

    Attributes:
        value: the result.
        scale: the sum of the magnitudes of the terms it is made of. A float32 result is relative to it: where
            terms cancel no float32 computation can be relative to the value.
        slack: by how much one float32 rounding of `delta = logvar_p - logvar_q` moves the result.
    """

    value: Tensor
    scale: Tensor
    slack: Tensor


def closed_form(inputs, noise: Tensor, upstream, stop_gradient: bool) -> dict[str, Truth]:
    """Every output and gradient by its formula, in float64, on the very numbers that the inputs hold."""
    mean_q, logvar_q, mean_p, logvar_p = (t.detach().cpu().double() for t in inputs)
    grad_z, forward, reverse = (None if g is None else g.cpu().double() for g in upstream)
    forward, reverse = (None if w is None else w.unsqueeze(-1) for w in (forward, reverse))
    poison = 0 * ((mean_q - mean_p) + (logvar_p - logvar_q))
    mean_q, logvar_q, mean_p, logvar_p = (t + poison for t in (mean_q, logvar_q, mean_p, logvar_p))
    delta, gap = logvar_p - logvar_q, mean_q - mean_p
    rounding = delta.abs() * 2.0**-24
    sample = torch.exp(logvar_q / 2) * noise
    # The squares may leave float32 where their products do not; float64 has room for both.
    square_p, square_q = gap**2 * torch.exp(-logvar_p), gap**2 * torch.exp(-logvar_q)
    slope_p, slope_q = gap * torch.exp(-logvar_p), gap * torch.exp(-logvar_q)

    terms = {
        "z": [mean_q, sample],
        "forward_kl": [phi(-delta) / 2, square_p / 2],
        "reverse_kl": [phi(delta) / 2, square_q / 2],
        **{name: [] for name in INPUTS},
    }
    slack = {name: torch.zeros_like(delta) for name in NAMES}
    slack["forward_kl"] = torch.expm1(-delta).abs() / 2 * rounding
    slack["reverse_kl"] = torch.expm1(delta).abs() / 2 * rounding
    if grad_z is not None:
        terms["posterior_mean"] += [grad_z]
        terms["posterior_logvar"] += [grad_z * sample / 2]
    # KL(q || p) moves p, KL(p || q) moves q, and without the stops each also moves the other one.
    if forward is not None:
        terms["prior_mean"] += [-forward * slope_p]
        terms["prior_logvar"] += [-forward * torch.expm1(-delta) / 2, -forward * square_p / 2]
        slack["prior_logvar"] += forward.abs() * torch.exp(-delta) / 2 * rounding
        if not stop_gradient:
            terms["posterior_mean"] += [forward * slope_p]
            terms["posterior_logvar"] += [forward * torch.expm1(-delta) / 2]
            slack["posterior_logvar"] += forward.abs() * torch.exp(-delta) / 2 * rounding
    if reverse is not None:
        terms["posterior_mean"] += [reverse * slope_q]
        terms["posterior_logvar"] += [-reverse * torch.expm1(delta) / 2, -reverse * square_q / 2]
        slack["posterior_logvar"] += reverse.abs() * torch.exp(delta) / 2 * rounding
        if not stop_gradient:
            terms["prior_mean"] += [-reverse * slope_q]
            terms["prior_logvar"] += [reverse * torch.expm1(delta) / 2]
            slack["prior_logvar"] += reverse.abs() * torch.exp(delta) / 2 * rounding

    truths = {}
    for name in NAMES:
        parts = [torch.zeros_like(delta), *terms[name]]
        result = Truth(sum(parts), sum(part.abs() for part in parts), slack[name])
        truths[name] = Truth(*(t.sum(-1) for t in result)) if name.endswith("kl") else result
    return truths


def truth(
    inputs, upstream, *, seed: int, stop_gradient: bool = True, sample_ids: Sequence[int] | None = None
) -> dict[str, Truth]:
    noise = true_noise(inputs[0].shape, seed, sample_ids=sample_ids)
    return closed_form(inputs, noise, upstream, stop_gradient)


# --- budgets ---

# Of float32's share of the error, relative to `Truth.scale`: z, and the KLs and gradients.
Z_BOUND, BOUND = 4e-7, 4e-6
TINY = torch.finfo(torch.float32).tiny


def bound_of(name: str) -> float:
    return Z_BOUND if name == "z" else BOUND


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbours of a dtype at the size of x, in float64."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(x.abs().clamp(info.tiny, info.max))
    return torch.ldexp(torch.full_like(x, info.eps), exponent - 1)


def budget(name: str, right: Truth, dtype: torch.dtype, backend: str) -> Tensor:
    """The largest error that each element of a result may have.

    Inside, everything is float32; what is narrower adds one rounding, a whole unit in the last place because
    Triton's interpreter truncates a bfloat16 store. Plain PyTorch also rounds delta, the kernels do not.
    """
    # One normal may be further off than many are in norm: test_philox bounds each by 6e-7 of its size.
    relative = Z_BOUND + 6e-7 if name == "z" else BOUND
    allowed = relative * right.scale + 4 * TINY
    if backend == "torch":
        allowed = allowed + right.slack
    if dtype != torch.float32:
        allowed = allowed + ulp(right.value.abs() + allowed, dtype)
    return allowed


def relative_error(got: Tensor, right: Tensor) -> float:
    """In norm."""
    got, right = got.detach().double().cpu(), right.detach().double().cpu()
    return ((got - right).norm() / right.norm().clamp_min(1e-300)).item()
