// What the C interface (interface.cpp) and the kernels (one copy per instruction set) have in common: data only. The
// linker would take one instruction set's copy of an inline function for all of them.
#pragma once

#include <cstdint>

// Tests define AMVL_FAST_PORTABLE, to have here what any other machine compiles.
#if defined(__x86_64__) && !defined(AMVL_FAST_PORTABLE)
#define X86
#endif

enum class DType : int64_t { float32, bfloat16, float16 };

// A tensor of the common shape [..., d]: its leading dimensions are folded in `Job`.
struct View {
  void* data;  // null: no such tensor
  DType dtype;
  int64_t column_stride;
};

constexpr int MAX_TENSORS = 11, MAX_DIMS = 64;

// A call: tensors seen as rows. Which tensor stands where is up to the kernel.
struct Job {
  View tensors[MAX_TENSORS];
  int inputs;  // the first ones; they may have any strides, the others (outputs) are contiguous
  // Leading dimensions, folded where every input steps through them evenly, and the strides of the inputs.
  int dims;
  int64_t sizes[MAX_DIMS];
  int64_t strides[MAX_DIMS][MAX_TENSORS];
  int64_t rows, columns;
  uint64_t seed;
  uint32_t stream;
  const uint64_t* sample_ids;  // one for each index of the outermost dimension; null: 0, 1, 2, ...
  int64_t rows_per_sample;
  float temperature;
  bool stop_gradient;
  bool past_caches;  // the outputs are larger than the caches
};

// Rows [first, last) of a job.
typedef void Kernel(const Job& job, int64_t first, int64_t last);

struct Kernels {
  Kernel *dual_kl_forward, *dual_kl_backward, *sample_forward, *sample_backward, *noise, *words;
};

extern const Kernels kernels_baseline;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
