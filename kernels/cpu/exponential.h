// Exponentials that stay accurate where float32's own lose digits.
#pragma once

#include "vector.h"

namespace {

constexpr float LARGEST = 3.40282347e+38f;

// t = n ln 2 + r with whole n and |r| <= ln(2) / 2, for |t| <= 105, and the even and odd part of
// phi(r) = exp(r) - 1 - r by its Taylor series: phi(r) is their sum and phi(-r) their difference.
struct Reduced {
  Float n, r, even, odd;
};

// `rest`: what was rounded off when t was made.
INLINE Reduced reduce(Float t, Float rest) {
  // Adding 1.5 * 2**23 leaves no room for a fraction.
  const Float n = (t * 1.4426950408889634f + 12582912.0f) - 12582912.0f;
  // ln 2 in two parts, the first short enough for its product with n to be exact.
  const Float r = (t - n * 0.693359375f) + (n * 2.12194440e-4f + rest);
  const Float s = r * r;
  // Cut after r**8: the rest is below 4e-9 of the value.
  const Float even = s * (0.5f + s * (1.0f / 24 + s * (1.0f / 720 + s * (1.0f / 40320))));
  const Float odd = r * s * (1.0f / 6 + s * (1.0f / 120 + s * (1.0f / 5040)));
  return {n, r, even, odd};
}

// Beyond these bounds exp(t) is 0 or infinite in float32.
INLINE Float clamp(Float t) { return at_least(-105.0f, at_most(105.0f, t)); }

INLINE Float exp(Float t) {
  const Reduced x = reduce(clamp(t), Float{});
  return scale(1.0f + (x.r + (x.even + x.odd)), x.n);
}

// exp(t) and exp(-t), the latter kept finite so that its product with 0 is 0.
INLINE void exp_both_ways(Float t, Float& up, Float& down) {
  const Reduced x = reduce(clamp(t), Float{});
  up = scale(1.0f + (x.r + (x.even + x.odd)), x.n);
  down = at_most(LARGEST, scale(1.0f + ((x.even - x.odd) - x.r), -x.n));
}

// exp(x) - 1 and exp(x) - 1 - x, both ways, and exp(-x): 1 added to a difference near -1 would not give it back.
struct Differences {
  Float expm1, phi, expm1_minus, phi_minus, exp_minus;
};

// With h = 2**n, exp(x) - 1 = (h - 1) + h (r + phi(r)), and taking away x leaves
// (h - 1 - n ln 2) + (h - 1) r + h phi(r). At n = 0, where x is small, what is left is the series alone.
INLINE void differences(Float n, Float r, Float phi_r, Float& exp, Float& expm1, Float& phi) {
  const Float h = scale(all(1.0f), n), h_minus_1 = h - 1.0f;
  const Float rest = h * (r + phi_r);
  exp = h + rest;
  expm1 = h_minus_1 + rest;
  phi = (h_minus_1 - n * 0.6931471805599453f) + (h_minus_1 * r + h * phi_r);
}

INLINE Differences differences_both_ways(Float x, Float rest) {
  // Beyond the bound exp(2 x), which is what is asked for, is infinite or 0, and phi goes on linearly.
  const Float bounded = at_least(-88.0f, at_most(88.0f, x));
  const Reduced t = reduce(bounded, rest);
  Differences d;
  Float exp;
  differences(t.n, t.r, t.even + t.odd, exp, d.expm1, d.phi);
  differences(-t.n, -t.r, t.even - t.odd, d.exp_minus, d.expm1_minus, d.phi_minus);
  const Float beyond = x - bounded;
  d.phi -= beyond;
  d.phi_minus += beyond;
  return d;
}

}  // namespace
