"""Kernels that show what device functions return. Their own file, for Triton reads the sources of kernels."""

import triton
import triton.language as tl

from amvl_fast.kernels.triton.exponential import exp_half_both_ways, exp_minus_half, half_expm1_and_phi, subtract
from amvl_fast.kernels.triton.philox import cos_sin, minus_log


@triton.jit
def philox_probe(words, out, N: tl.constexpr):
    index = tl.arange(0, N)
    word = tl.load(words + index).to(tl.uint32)
    cosine, sine = cos_sin(word)
    tl.store(out + index, minus_log(word))
    tl.store(out + N + index, cosine)
    tl.store(out + 2 * N + index, sine)


@triton.jit
def exponential_probe(numbers, out, N: tl.constexpr):
    """`exp`, `expm1(t)`, `phi(t)`, `expm1(-t)` and `phi(-t)`, whole and not halved."""
    index = tl.arange(0, N)
    t = tl.load(numbers + index)
    exp, _ = exp_half_both_ways(2.0 * t)
    half_expm1, half_phi, half_expm1_minus, half_phi_minus = half_expm1_and_phi(t, 0.0)
    tl.store(out + index, exp)
    tl.store(out + N + index, 2.0 * half_expm1)
    tl.store(out + 2 * N + index, 2.0 * half_phi)
    tl.store(out + 3 * N + index, 2.0 * half_expm1_minus)
    tl.store(out + 4 * N + index, 2.0 * half_phi_minus)


@triton.jit
def half_probe(numbers, remainders, logvars, out, N: tl.constexpr):
    """What the kernels use: four halves, two exponentials, and the one that is limited."""
    index = tl.arange(0, N)
    t, remainder = tl.load(numbers + index), tl.load(remainders + index)
    half_expm1, half_phi, half_expm1_minus, half_phi_minus = half_expm1_and_phi(t, remainder)
    logvar = tl.load(logvars + index)
    deviation, inverse = exp_half_both_ways(logvar)
    tl.store(out + index, half_expm1)
    tl.store(out + N + index, half_phi)
    tl.store(out + 2 * N + index, half_expm1_minus)
    tl.store(out + 3 * N + index, half_phi_minus)
    tl.store(out + 4 * N + index, deviation)
    tl.store(out + 5 * N + index, inverse)
    tl.store(out + 6 * N + index, exp_minus_half(logvar))


@triton.jit
def subtract_probe(a, b, out, N: tl.constexpr):
    index = tl.arange(0, N)
    difference, remainder = subtract(tl.load(a + index), tl.load(b + index))
    tl.store(out + index, difference)
    tl.store(out + N + index, remainder)
