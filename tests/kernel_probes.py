"""Kernels that show what device functions return. Their own file, for Triton reads the sources of kernels."""

import triton
import triton.language as tl

from amvl_fast.kernels.triton.exponential import exp, expm1_and_phi_both_ways
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
    index = tl.arange(0, N)
    t = tl.load(numbers + index)
    expm1, phi, expm1_minus, phi_minus = expm1_and_phi_both_ways(t)
    tl.store(out + index, exp(t))
    tl.store(out + N + index, expm1)
    tl.store(out + 2 * N + index, phi)
    tl.store(out + 3 * N + index, expm1_minus)
    tl.store(out + 4 * N + index, phi_minus)
