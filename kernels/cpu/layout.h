// How tensors of any strides and dtypes become rows, and rows blocks of float32.
#pragma once

#include <cstddef>

#include "kernels.h"
#include "vector.h"

namespace {

// How many columns the block from `start` on has.
INLINE int columns_from(const Job& job, int64_t start) {
  return job.columns - start < BLOCK ? (int)(job.columns - start) : BLOCK;
}

// Where a row begins in each input.
INLINE void row_offsets(const Job& job, int64_t row, int64_t* offset) {
  for (int t = 0; t < job.inputs; t++) offset[t] = 0;
  for (int dim = job.dims - 1; dim >= 0; dim--) {
    const int64_t index = dim == 0 ? row : row % job.sizes[dim];
    row = dim == 0 ? 0 : row / job.sizes[dim];
    for (int t = 0; t < job.inputs; t++) offset[t] += index * job.strides[dim][t];
  }
}

// One element of an input, which may stand at any address.
template <typename T>
INLINE T element(const T* data, int64_t index) {
  T x;
  memcpy(&x, data + index, sizeof x);
  return x;
}

// The number by which a row enters the noise, as amvl_fast/ops/philox.py defines it: unsigned, it may wrap around.
INLINE uint64_t row_number(const Job& job, int64_t row) {
  if (!job.sample_ids) return row;
  return element(job.sample_ids, row / job.rows_per_sample) * job.rows_per_sample + row % job.rows_per_sample;
}

INLINE Word load_shorts(const uint16_t* from) {
  Short x;
  memcpy(&x, from, sizeof x);
  return __builtin_convertvector(x, Word);
}
INLINE void store_shorts(uint16_t* to, Word x) {
  const Short narrow = __builtin_convertvector(x, Short);
  memcpy(to, &narrow, sizeof narrow);
}

INLINE Float from_bfloat16(Word x) { return (Float)(x << 16); }

INLINE Word to_bfloat16(Float x) {  // to nearest, ties to even
  const Word bits = (Word)x, rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return x == x ? rounded : all_words(0x7FC0);
}

INLINE Float from_float16(Word x) {
  const Word exponent = x & 0x7C00, magnitude = (x & 0x7FFF) << 13;
  const Word normal = magnitude + 0x38000000;  // moves the exponent's bias
  // With its exponent the sum has an implicit 1, which the subtraction takes away again. No float32 here is itself
  // subnormal: torch.set_flush_denormal would make it 0.
  const Word subnormal = (Word)((Float)(magnitude + 0x38800000) - 6.103515625e-05f);
  const Word finite = exponent == 0 ? subnormal : normal;
  return (Float)((exponent == 0x7C00 ? magnitude | 0x7F800000 : finite) | (x & 0x8000) << 16);
}

INLINE Word to_float16(Float x) {  // to nearest, ties to even
  const Word bits = (Word)x, magnitude = bits & 0x7FFFFFFF, sign = (bits >> 16) & 0x8000;
  const Word normal = (magnitude + 0xC8000FFF + ((magnitude >> 13) & 1)) >> 13;
  // Adding 1/2 leaves the bits of a subnormal result at the end of the sum, rounded.
  const Word subnormal = (Word)((Float)magnitude + 0.5f) - 0x3F000000;
  const Word infinite_or_nan = magnitude > 0x7F800000 ? all_words(0x7E00) : all_words(0x7C00);
  const Word finite = magnitude < 0x38800000 ? subnormal : normal;
  return (magnitude >= 0x47800000 ? infinite_or_nan : finite) | sign;
}

// `count` numbers, one every `stride`, from or to float32. A whole block of neighbours in vectors, what is left one
// by one through a vector: the same arithmetic.
template <Word (*NARROW)(Float), Float (*WIDEN)(Word)>
struct Shorts {
  static void read(const uint16_t* from, int64_t stride, int count, float* to) {
    if (stride == 1 && count == BLOCK) {
      for (int i = 0; i < BLOCK; i += LANES) ::store(to + i, WIDEN(load_shorts(from + i)));
      return;
    }
    for (int i = 0; i < count; i++) to[i] = WIDEN(all_words(element(from, i * stride)))[0];
  }
  static void write(const float* from, int count, uint16_t* to) {
    if (count == BLOCK) {
      for (int i = 0; i < BLOCK; i += LANES) store_shorts(to + i, NARROW(load(from + i)));
      return;
    }
    for (int i = 0; i < count; i++) to[i] = (uint16_t)NARROW(all(from[i]))[0];
  }
};
using BFloat16 = Shorts<to_bfloat16, from_bfloat16>;
using Float16 = Shorts<to_float16, from_float16>;

// One row of an input.
struct Source {
  const char* data;
  DType dtype;
  int64_t stride;

  Source(const View& view, int64_t offset) : dtype(view.dtype), stride(view.column_stride) {
    data = (const char*)view.data + offset * (dtype == DType::float32 ? 4 : 2);
  }

  // Columns [start, start + count), where they are if that is possible, else in the buffer, followed by zeros.
  INLINE const float* block(int64_t start, int count, float* buffer) const {
    if (dtype == DType::float32 && stride == 1 && count == BLOCK) return (const float*)data + start;
    fill(start, count, buffer);
    return buffer;
  }

 private:
  __attribute__((noinline)) void fill(int64_t start, int count, float* buffer) const {
    start *= stride;
    if (dtype == DType::bfloat16) {
      BFloat16::read((const uint16_t*)data + start, stride, count, buffer);
    } else if (dtype == DType::float16) {
      Float16::read((const uint16_t*)data + start, stride, count, buffer);
    } else {
      for (int i = 0; i < count; i++) buffer[i] = element((const float*)data, start + i * stride);
    }
    for (int i = count; i < BLOCK; i++) buffer[i] = 0;
  }
};

// One row of an output, contiguous, or nothing if nobody asked for it.
struct Sink {
  char* data;
  DType dtype;
  bool past_caches;

  Sink(const View& view, int64_t row, const Job& job) : dtype(view.dtype) {
    const int64_t offset = row * job.columns * (dtype == DType::float32 ? 4 : 2);
    data = view.data ? (char*)view.data + offset : nullptr;
    // Blocks are whole vectors, so what holds for a row's first column holds for each block's.
    past_caches = job.past_caches && (uintptr_t)data % sizeof(Float) == 0;
  }

  INLINE void write(int64_t start, int count, const Float value[4]) const {
    if (!data) return;
    if (dtype == DType::float32 && count == BLOCK) {
      float* to = (float*)data + start;
      for (int i = 0; i < 4; i++) {
        past_caches ? store_past_caches(to + i * LANES, value[i]) : store(to + i * LANES, value[i]);
      }
      return;
    }
    float buffer[BLOCK];
    for (int i = 0; i < 4; i++) store(buffer + i * LANES, value[i]);
    spill(start, count, buffer);
  }

 private:
  __attribute__((noinline)) void spill(int64_t start, int count, const float* buffer) const {
    if (dtype == DType::bfloat16) {
      BFloat16::write(buffer, count, (uint16_t*)data + start);
    } else if (dtype == DType::float16) {
      Float16::write(buffer, count, (uint16_t*)data + start);
    } else {
      memcpy((float*)data + start, buffer, count * sizeof(float));
    }
  }
};

// The sum of a row's terms. A block's terms are added in float32, the blocks in float64: neither a long row nor
// one of equal terms loses digits, and the order depends on the row's length alone.
struct RowSum {
  Double sum = {};
  INLINE void add(const Float term[4]) {
    sum += __builtin_convertvector((term[0] + term[1]) + (term[2] + term[3]), Double);
  }
  INLINE double total() const {
    double total = 0;
    for (int i = 0; i < LANES; i++) total += sum[i];
    return total;
  }
};

}  // namespace
