// Vectors of float32 and 32-bit words, and the few operations on them that an instruction set has of its own.
//
// Built on the vector extensions of GCC and Clang, whose arithmetic works on every target: one source, compiled
// once per instruction set with other flags (see setup.py). Everything has internal linkage, or the linker would
// pick one instruction set's copy of an inline function for all of them.
#pragma once

#include <cstdint>
#include <cstring>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "Pairs of words are taken apart in little-endian order."
#endif

#include "kernels.h"

#if defined(X86)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

// Columns that one call of the noise fills: a counter per lane, four normals per counter.
constexpr int BLOCK = 4 * LANES;

typedef float Float __attribute__((vector_size(4 * LANES)));
typedef int32_t Int __attribute__((vector_size(4 * LANES)));
typedef uint32_t Word __attribute__((vector_size(4 * LANES)));
typedef uint64_t Pair __attribute__((vector_size(4 * LANES)));  // half as many lanes, each twice as wide
typedef uint16_t Short __attribute__((vector_size(2 * LANES)));
typedef double Double __attribute__((vector_size(8 * LANES)));

#define INLINE inline __attribute__((always_inline))

INLINE Float as_float(Int x) { return (Float)x; }
INLINE Int as_int(Float x) { return (Int)x; }
INLINE Float all(float x) { return x - Float{}; }
INLINE Word all_words(uint32_t x) { return x - Word{}; }

INLINE Float load(const float* from) {
  Float x;
  memcpy(&x, from, sizeof x);
  return x;
}
INLINE void store(float* to, Float x) { memcpy(to, &x, sizeof x); }

// The second argument where either is NaN, as the hardware has it; so NaN in x comes through.
INLINE Float at_least(float low, Float x) { return all(low) > x ? all(low) : x; }
INLINE Float at_most(float high, Float x) { return all(high) < x ? all(high) : x; }

#if defined(__AVX512F__)

INLINE Float square_root(Float x) { return _mm512_sqrt_ps(x); }

// The low halves multiplied to 64 bits; what stands in the high halves is ignored.
INLINE Pair multiply_low_halves(Pair a, Pair b) { return (Pair)_mm512_mul_epu32((__m512i)a, (__m512i)b); }

// Past the caches, which saves reading the line that is about to be overwritten. `to` must be aligned.
INLINE void store_past_caches(float* to, Float x) { _mm512_stream_ps(to, x); }
INLINE void finish_stores() { _mm_sfence(); }

// 4 x 4 transposes within each quarter of the vectors.
INLINE void transpose_quads(Float& a, Float& b, Float& c, Float& d) {
  __m512d ab_low = (__m512d)_mm512_unpacklo_ps(a, b), ab_high = (__m512d)_mm512_unpackhi_ps(a, b);
  __m512d cd_low = (__m512d)_mm512_unpacklo_ps(c, d), cd_high = (__m512d)_mm512_unpackhi_ps(c, d);
  a = (Float)_mm512_unpacklo_pd(ab_low, cd_low), b = (Float)_mm512_unpackhi_pd(ab_low, cd_low);
  c = (Float)_mm512_unpacklo_pd(ab_high, cd_high), d = (Float)_mm512_unpackhi_pd(ab_high, cd_high);
}

#elif defined(__AVX2__)

INLINE Float square_root(Float x) { return _mm256_sqrt_ps(x); }
INLINE Pair multiply_low_halves(Pair a, Pair b) { return (Pair)_mm256_mul_epu32((__m256i)a, (__m256i)b); }
INLINE void store_past_caches(float* to, Float x) { _mm256_stream_ps(to, x); }
INLINE void finish_stores() { _mm_sfence(); }

INLINE void transpose_quads(Float& a, Float& b, Float& c, Float& d) {
  __m256d ab_low = (__m256d)_mm256_unpacklo_ps(a, b), ab_high = (__m256d)_mm256_unpackhi_ps(a, b);
  __m256d cd_low = (__m256d)_mm256_unpacklo_ps(c, d), cd_high = (__m256d)_mm256_unpackhi_ps(c, d);
  a = (Float)_mm256_unpacklo_pd(ab_low, cd_low), b = (Float)_mm256_unpackhi_pd(ab_low, cd_low);
  c = (Float)_mm256_unpacklo_pd(ab_high, cd_high), d = (Float)_mm256_unpackhi_pd(ab_high, cd_high);
}

#elif defined(X86)  // SSE2, which all of them have

INLINE Float square_root(Float x) { return _mm_sqrt_ps(x); }
INLINE Pair multiply_low_halves(Pair a, Pair b) { return (Pair)_mm_mul_epu32((__m128i)a, (__m128i)b); }
INLINE void store_past_caches(float* to, Float x) { _mm_stream_ps(to, x); }
INLINE void finish_stores() { _mm_sfence(); }
INLINE void transpose_quads(Float& a, Float& b, Float& c, Float& d) { _MM_TRANSPOSE4_PS(a, b, c, d); }

#else  // any machine: left to the compiler

INLINE Float square_root(Float x) {
  for (int i = 0; i < LANES; i++) x[i] = __builtin_sqrtf(x[i]);
  return x;
}
INLINE Pair multiply_low_halves(Pair a, Pair b) { return (a & 0xFFFFFFFF) * (b & 0xFFFFFFFF); }
INLINE void store_past_caches(float* to, Float x) { store(to, x); }
INLINE void finish_stores() {}

INLINE void transpose_quads(Float& a, Float& b, Float& c, Float& d) {
  static_assert(LANES == 4, "a vector is one quad");
  const Float rows[4] = {a, b, c, d};
  for (int i = 0; i < 4; i++) a[i] = rows[i][0], b[i] = rows[i][1], c[i] = rows[i][2], d[i] = rows[i][3];
}

#endif

}  // namespace
