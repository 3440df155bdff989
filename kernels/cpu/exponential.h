// Exponentials that stay accurate where float32's own lose digits.
#pragma once

#include "vector.h"

namespace {

// t = STEP * n * ln 2 + r with whole n and |r| <= STEP * ln(2) / 2, for |n| <= 126, and the even and odd part of
// phi(r) = exp(r) - 1 - r by its Taylor series: phi(r) is their sum and phi(-r) their difference.
struct Reduced {
  Float n, up, down;  // up = 2**n, down = 2**-n
  Float r, even, odd;
};

// `rest`: what was rounded off when t was made. NaN comes through in r, whatever becomes of the powers.
template <int STEP>
INLINE Reduced reduce(Float t, Float rest) {
  Reduced x;
  // Adding 1.5 * 2**23 leaves no room for a fraction: n stands in the low bits of the sum, as an integer.
  const Float sum = t * (1.4426950408889634f / STEP) + 12582912.0f;
  x.n = sum - 12582912.0f;
  const Int power = (as_int(sum) << 23) + 0x3F800000;
  x.up = as_float(power), x.down = as_float(0x7F000000 - power);
  // ln 2 in two parts, the first short enough for its product with n to be exact.
  x.r = (t - x.n * (STEP * 0.693359375f)) + (x.n * (STEP * 2.12194440e-4f) + rest);
  const Float s = x.r * x.r;
  // The first term left out is below 1.5e-8 of exp(r), and at STEP = 1 below 4e-9 of phi(r).
  const Float last = STEP == 1 ? all(1.0f / 5040) : 1.0f / 5040 + s * (1.0f / 362880);
  x.even = s * (0.5f + s * (1.0f / 24 + s * (1.0f / 720 + s * (1.0f / 40320))));
  x.odd = x.r * s * (1.0f / 6 + s * (1.0f / 120 + s * last));
  return x;
}

// In steps of 2 ln 2 the power of two is a square: multiplying twice by its root overflows and underflows only
// where the result does. Beyond the bounds that is everywhere: even where the smallest gap that float32 has is
// multiplied, the square of the product overflows.
INLINE Reduced reduce_for_exp(Float t) { return reduce<2>(at_least(-150.0f, at_most(150.0f, t)), Float{}); }

INLINE Float exp(Float t) {
  const Reduced x = reduce_for_exp(t);
  return (1.0f + (x.even + (x.r + x.odd))) * x.up * x.up;
}

// exp(-t) as what multiplies a number, one factor at a time: neither 0 times infinity nor an overflow on the way to a
// product that is none.
struct Inverse {
  Float series, root;
};

INLINE Float times(Float number, const Inverse& inverse) {
  return number * inverse.series * inverse.root * inverse.root;
}

INLINE Inverse exp_minus(Float t) {
  const Reduced x = reduce_for_exp(t);
  return {1.0f + (x.even - (x.r + x.odd)), x.down};
}

// exp(t) and exp(-t).
INLINE void exp_both_ways(Float t, Float& up, Inverse& down) {
  const Reduced x = reduce_for_exp(t);
  const Float odd = x.r + x.odd;
  up = (1.0f + (x.even + odd)) * x.up * x.up;
  down = {1.0f + (x.even - odd), x.down};
}

// exp(x) - 1 and exp(x) - 1 - x, both ways.
struct Differences {
  Float expm1, phi, expm1_minus, phi_minus;
};

// With h = 2**n, exp(x) - 1 = (h - 1) + h (r + phi(r)), and taking away x leaves
// (h - 1 - n ln 2) + (h - 1) r + h phi(r). At n = 0, where x is small, what is left is the series alone.
INLINE void differences(Float n, Float h, Float r, Float phi_r, Float& expm1, Float& phi) {
  const Float h_minus_1 = h - 1.0f;
  expm1 = h_minus_1 + h * (r + phi_r);
  phi = (h_minus_1 - n * 0.6931471805599453f) + (h_minus_1 * r + h * phi_r);
}

INLINE Differences differences_both_ways(Float x, Float rest) {
  // Beyond the bound exp(2 x), which is what is asked for, is infinite or 0, and phi goes on linearly.
  const Float bounded = at_least(-87.0f, at_most(87.0f, x));
  const Reduced t = reduce<1>(bounded, rest);
  Differences d;
  differences(t.n, t.up, t.r, t.even + t.odd, d.expm1, d.phi);
  differences(-t.n, t.down, -t.r, t.even - t.odd, d.expm1_minus, d.phi_minus);
  const Float beyond = x - bounded;
  d.phi -= beyond;
  d.phi_minus += beyond;
  return d;
}

}  // namespace
