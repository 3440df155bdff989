"""Device functions around the exponential that stay accurate where float32's own `exp` loses digits."""

import triton
import triton.language as tl


@triton.jit
def power_of_two(n):
    """`2**n` in float32 for an int32 n from -126 to 127."""
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def reduce(t):
    """`t = n ln 2 + r` with n a whole number in float32 and |r| <= ln(2) / 2."""
    n = tl.floor(t * 1.4426950408889634 + 0.5)
    # ln 2 in two parts, the first short enough for its product with n to be exact.
    return n, (t - n * 0.693359375) + n * 2.12194440e-4


@triton.jit
def clamp(t, low, high):
    """`t` between two bounds; NaN stays NaN, which a plain minimum would swallow."""
    t = tl.maximum(t, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(t, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def phi_parts(r):
    """Even and odd part of `phi(r) = exp(r) - 1 - r` for |r| <= ln(2) / 2, by its Taylor series.

    `phi(r)` is their sum and `phi(-r)` their difference. Cut after r**8: the rest is below 4e-9 of the value.
    """
    s = r * r
    even = s * (0.5 + s * (1 / 24 + s * (1 / 720 + s * (1 / 40320))))
    odd = r * s * (1 / 6 + s * (1 / 120 + s * (1 / 5040)))
    return even, odd


@triton.jit
def exp(t):
    """`exp(t)` to about one float32 rounding; a bare `exp2(t * log2(e))` is off by |t| of them."""
    n, r = reduce(clamp(t, -105.0, 89.0))
    even, odd = phi_parts(r)
    # NaN is no integer; it comes through in r. Two factors, since 2**n may overflow though the product fits.
    n = tl.where(n == n, n, 0.0).to(tl.int32)
    half = n >> 1
    return (1.0 + (r + (even + odd))) * power_of_two(half) * power_of_two(n - half)


@triton.jit
def expm1_and_phi(n, r, phi):
    """`exp(t) - 1` and `exp(t) - 1 - t` for `t = n ln 2 + r`, given `phi = phi(r)`.

    With s = 2**n: exp(t) - 1 = (s - 1) + s (r + phi), and taking away t leaves
    (s - 1 - n ln 2) + (s - 1) r + s phi. At n = 0, where posterior and prior nearly agree, s - 1 is exactly 0
    and what is left is the series alone. Half of s is carried: 2**128 is no float32, but the results may be.
    """
    m = clamp(tl.where(n == n, n, 0.0), -100.0, 128.0).to(tl.int32)
    h = power_of_two(m - 1)
    minus_one = h - 0.5
    half_expm1 = minus_one + h * (r + phi)
    half_phi = (minus_one - n * 0.34657359027997264) + minus_one * r + h * phi
    # Beyond the clamp the result is infinite, and half of it may already be inf - inf.
    expm1 = tl.where(n > 128.0, float("inf"), 2.0 * half_expm1)
    phi = tl.where(n > 128.0, float("inf"), 2.0 * half_phi)
    return expm1, phi


@triton.jit
def expm1_and_phi_both_ways(t):
    """`expm1(t), phi(t), expm1(-t), phi(-t)`; what is not used costs nothing."""
    n, r = reduce(t)
    even, odd = phi_parts(r)
    expm1, phi = expm1_and_phi(n, r, even + odd)
    expm1_minus, phi_minus = expm1_and_phi(-n, -r, even - odd)
    return expm1, phi, expm1_minus, phi_minus
