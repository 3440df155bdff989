// The noise that amvl_fast/ops/philox.py defines: the same words, and the same normals to float32 rounding.
#pragma once

#include "vector.h"

namespace {

// Which column group (of four) each lane's counter stands for, as an offset within a block: chosen such that
// `transpose_quads` leaves the normals in the order of the columns, without a shuffle across the vector.
INLINE constexpr int group_of(int lane) { return lane % 4 * (LANES / 4) + lane / 4; }

// One Philox counter per 64-bit lane. The multiplication ignores the high halves, so they may hold anything, and
// a product is at once the next word (its low half) and, shifted, the other one.
struct Counters {
  Pair c0, c1, c2, c3;
};

INLINE Counters philox_rounds(Counters c, uint64_t seed) {
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  const Pair m0 = 0xD2511F53 - Pair{}, m1 = 0xCD9E8D57 - Pair{};
#pragma GCC unroll 10
  for (int round = 0; round < 10; round++) {
    Pair p0 = multiply_low_halves(c.c0, m0), p1 = multiply_low_halves(c.c2, m1);
    c = {(p1 >> 32) ^ c.c1 ^ (uint64_t)k0, p1, (p0 >> 32) ^ c.c3 ^ (uint64_t)k1, p0};
    k0 += 0x9E3779B9, k1 += 0xBB67AE85;
  }
  return c;
}

// Even lanes from one, odd lanes from the other.
INLINE Word interleave(Pair even, Pair odd) { return (Word)((even & 0xFFFFFFFF) | (odd << 32)); }

// The four words of LANES counters: those of a row's column groups first_group + group_of(lane).
INLINE void philox_words(uint64_t seed, uint32_t stream, uint64_t row, int64_t first_group, Word words[4]) {
  Pair even, odd;
  for (int i = 0; i < LANES / 2; i++) {
    even[i] = group_of(2 * i);
    odd[i] = group_of(2 * i + 1);
  }
  const Pair row_low = row - Pair{}, row_high = (row >> 32) - Pair{}, last = stream - Pair{};
  Counters a = philox_rounds({even + (uint64_t)first_group, row_low, row_high, last}, seed);
  Counters b = philox_rounds({odd + (uint64_t)first_group, row_low, row_high, last}, seed);
  words[0] = interleave(a.c0, b.c0), words[1] = interleave(a.c1, b.c1);
  words[2] = interleave(a.c2, b.c2), words[3] = interleave(a.c3, b.c3);
}

// -ln((word + 1/2) / 2**32), accurate relative to its own size everywhere. Near word = 2**32 the logarithm is
// about the gap to 1, which float32 cannot see in u but an integer can: there the gap is taken from the
// complement of the word before anything is rounded.
INLINE Float minus_log(Word word) {
  const Int near_one = (Int)(word >= 0xB504F334);  // u above sqrt(1/2)
  const Float x = __builtin_convertvector(word ^ (Word)near_one, Float) + 0.5f;
  // x = m * 2**exponent with m in [sqrt(1/2), sqrt(2)), by its bits.
  const Int bits = as_int(x);
  const Int power = (bits - 0x3F3504F3) >> 23;
  const Float m = as_float(bits - (power << 23));
  const Float f = near_one ? x * -2.3283064365386963e-10f : m - 1.0f;
  const Float exponent = near_one ? Float{} : __builtin_convertvector(power - 32, Float);
  // log1p(f) = f - f**2 / 2 + f**3 * p(f): minimax coefficients of Cephes' logf (Moshier).
  Float p = f * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const Float square = f * f;
  // ln 2 in two parts, the first short enough for its product with the exponent to be exact.
  const Float log = (p * f * square - exponent * 2.12194440e-4f) - 0.5f * square;
  return -(log + f + exponent * 0.693359375f);
}

// Cosine and sine of 2 pi word / 2**32, times a radius. The nearest quarter turn comes off as an integer, so the
// range reduction is exact and costs no memory; and what it does to the signs is done to their bits.
INLINE void polar(Float radius, Word word, Float& x, Float& y) {
  const Word quarter = (word + 0x20000000) >> 30;
  const Float a = __builtin_convertvector((Int)(word - (quarter << 30)), Float) * 1.4629180792671596e-9f;
  const Float s = a * a;  // |a| <= pi / 4; minimax coefficients of Cephes' sinf and cosf.
  const Float sine = ((-1.9515295891e-4f * s + 8.3321608736e-3f) * s - 1.6666654611e-1f) * s * a + a;
  const Float cosine =
      ((2.443315711809948e-5f * s - 1.388731625493765e-3f) * s + 4.166664568298827e-2f) * s * s - 0.5f * s + 1.0f;
  const Int odd = (Int)((quarter & 1) != 0);
  // Cosine changes sign in quarters 1 and 2, sine in 2 and 3.
  const Word sign_x = ((quarter + 1) & 2) << 30, sign_y = (quarter & 2) << 30;
  x = as_float((Int)((Word)(radius * (odd ? sine : cosine)) ^ sign_x));
  y = as_float((Int)((Word)(radius * (odd ? cosine : sine)) ^ sign_y));
}

// The BLOCK normals of a row from column 4 * first_group on, in four vectors.
INLINE void philox_normal(uint64_t seed, uint32_t stream, uint64_t row, int64_t first_group, Float normal[4]) {
  Word words[4];
  philox_words(seed, stream, row, first_group, words);
  polar(square_root(2.0f * minus_log(words[0])), words[1], normal[0], normal[1]);
  polar(square_root(2.0f * minus_log(words[2])), words[3], normal[2], normal[3]);
  transpose_quads(normal[0], normal[1], normal[2], normal[3]);
}

}  // namespace
