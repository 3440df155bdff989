"""Device functions around the exponential that stay accurate where float32's own `exp` loses digits.

All of them reduce their argument as `t = n ln 2 + r`, n a whole number, and put the power of two back by its
bits. A few things are the same throughout:

- n comes from adding `MAGIC` = 1.5 * 2**23: the sum rounds to a whole number, which then stands in its low
  bits, as an integer, and comes back as a float by subtracting `MAGIC`. No conversion instruction is needed.
- ln 2 comes in two parts, the first so short that its product with n is exact.
- `exp(t)` and `exp(-t)` share everything but the last step: the series has an even and an odd part.
- A NaN passes through r. What it makes of the bits of n does not matter.
"""

import triton
import triton.language as tl

MAGIC = tl.constexpr(12582912.0)
FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)


@triton.jit
def clamp(t, low, high):
    """`t` between two bounds. NaN stays NaN; a plain minimum or maximum returns the bound on a GPU."""
    t = tl.maximum(t, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(t, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def exp_half_both_ways(logvar):
    """`exp(logvar / 2)` and `exp(-logvar / 2)`: a standard deviation and what divides by it.

    Both to about one float32 rounding, where a bare `exp2(t * log2(e))` is off by |t| of them. They are 0 or
    inf where float32 ends. n is even here, which doubles |r| to ln 2 and costs each series a term. In return
    the power of two is a square: multiplying twice by its root overflows and underflows where the result does.
    """
    t = 0.5 * clamp(logvar, -340.0, 340.0)
    magic = t * 0.7213475204444817 + MAGIC
    k = magic - MAGIC
    r = (t - k * 1.38671875) + k * 4.2438888e-4
    s = r * r
    even = s * (0.5 + s * (1 / 24 + s * (1 / 720 + s * (1 / 40320))))
    odd = r + r * (s * (1 / 6 + s * (1 / 120 + s * (1 / 5040 + s * (1 / 362880)))))
    bits = (magic.to(tl.int32, bitcast=True) << 23) + 0x3F800000
    root = bits.to(tl.float32, bitcast=True)
    inverse_root = (0x7F000000 - bits).to(tl.float32, bitcast=True)
    return (1.0 + (even + odd)) * root * root, (1.0 + (even - odd)) * inverse_root * inverse_root


@triton.jit
def exp_minus_half(logvar):
    """`exp(-logvar / 2)`, at most the largest finite float32, so that it times 0 is 0."""
    return limit(exp_half_both_ways(logvar)[1])


@triton.jit
def limit(t):
    """`t`, but the largest finite float32 where that is inf.

    The price: below a log-variance of -177, where a deviation is no normal float32 any more, what divides by it is too
    small. Multiplying by the factors of `exp(-logvar / 2)` one by one, as the C++ kernel does, is right there too, but
    took up to 80 registers a thread on sm_90.
    """
    return tl.minimum(t, FLOAT32_MAX, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def half_expm1_and_phi(t, remainder):
    """Half of `expm1(t), phi(t), expm1(-t), phi(-t)`, where `phi(t) = exp(t) - 1 - t`.

    What is not used costs nothing. `remainder` is what rounding took from t; its place is r, the only number
    here that is small enough to see it. With h = 2**n / 2:

        expm1(t) / 2 = (h - 1/2) + h (r + phi(r))
        phi(t) / 2   = (h - 1/2 - n ln(2) / 2) + (h - 1/2) r + h phi(r)

    At n = 0, where posterior and prior nearly agree, h - 1/2 is exactly 0 and what is left is the series
    alone. n stops at 128, the last one whose h is finite, and r at 1: beyond that, one direction overflows
    by itself, and in the other exp(-t) is 0 and the rest of t is left to the linear term.
    """
    magic = clamp(t * 1.4426950408889634 + MAGIC, MAGIC - 128.0, MAGIC + 128.0)
    n = magic - MAGIC
    whole_r = ((t - n * 0.693359375) + n * 2.12194440e-4) + remainder
    r = clamp(whole_r, -1.0, 1.0)
    beyond = 0.5 * (whole_r - r)
    s = r * r
    even = s * (0.5 + s * (1 / 24 + s * (1 / 720 + s * (1 / 40320))))
    odd = r * (s * (1 / 6 + s * (1 / 120 + s * (1 / 5040))))
    phi, phi_minus = even + odd, even - odd

    # The bits of h and, since the exponents of both add up to 252, of its counterpart. Below 2**-126: 0.
    bits = (magic.to(tl.int32, bitcast=True) << 23) + 0x3F000000
    h = tl.maximum(bits, 0).to(tl.float32, bitcast=True)
    h_minus = tl.maximum(0x7E000000 - bits, 0).to(tl.float32, bitcast=True)
    less, less_minus = h - 0.5, h_minus - 0.5
    half_expm1 = less + h * (r + phi)
    half_expm1_minus = less_minus + h_minus * (phi_minus - r)
    linear = n * 0.34657359027997264
    half_phi = ((less - linear) + (less * r - beyond)) + h * phi
    half_phi_minus = ((less_minus + linear) - (less_minus * r - beyond)) + h_minus * phi_minus
    return half_expm1, half_phi, half_expm1_minus, half_phi_minus


@triton.jit
def subtract(a, b):
    """`a - b` and what rounding took from it, exactly (Knuth's two-sum): additions only, so no FMA changes it."""
    difference = a - b
    minus_b = difference - a
    remainder = (a - (difference - minus_b)) - (b + minus_b)
    return difference, remainder
