// The C interface: plain integers and pointers, so that one library serves every version of Python and PyTorch.
//
// A call is an array of int64, made by __init__.py of this folder:
//
//     threads, past_caches, seed's address, address of the sample ids (0: none), stream, bits of temperature as a
//     double, stop_gradient, number of inputs, number of outputs, number of leading dimensions n, n sizes, columns,
//     and for each tensor: its address (0: none), dtype (0 float32, 1 bfloat16, 2 float16),
//     and an input's n + 1 strides or an output's size in bytes.
#include <algorithm>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels.h"

namespace {

const Kernels* kernels = nullptr;
const char* instructions = nullptr;

bool choose(const char* name) {
  const bool any = name == nullptr;
#if defined(X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
  if (avx512 && (any || !strcmp(name, "avx512"))) return kernels = &kernels_avx512, instructions = "avx512", true;
  if (avx2 && (any || !strcmp(name, "avx2"))) return kernels = &kernels_avx2, instructions = "avx2", true;
#endif
  if (any || !strcmp(name, "baseline")) return kernels = &kernels_baseline, instructions = "baseline", true;
  return false;
}

struct Reader {
  const int64_t* next;
  int64_t operator()() { return *next++; }
};

// Fresh memory in pages of 2 MiB where the system grants them on request: a fault each 4 KiB costs more than the
// kernel's arithmetic. A hint only; NumPy gives it to its large arrays too.
void ask_for_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t page = 4096, first = ((uintptr_t)data + page - 1) / page * page, last = (uintptr_t)data + bytes;
  if (bytes >= 1 << 22) madvise((void*)first, (last - first) / page * page, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

struct Call {
  Job job;
  int threads;

  explicit Call(const int64_t* arguments) {
    Reader read{arguments};
    threads = (int)read();
    job.past_caches = read();
    job.seed = *(const uint64_t*)read();
    job.sample_ids = (const uint64_t*)read();
    job.stream = (uint32_t)read();
    const int64_t bits = read();
    double temperature;
    memcpy(&temperature, &bits, sizeof bits);
    job.temperature = (float)temperature;
    job.stop_gradient = read();
    job.inputs = (int)read();
    const int outputs = (int)read(), dims = (int)read();
    int64_t sizes[MAX_DIMS], strides[MAX_DIMS][MAX_TENSORS];
    for (int dim = 0; dim < dims; dim++) sizes[dim] = read();
    job.columns = read();
    for (int t = 0; t < job.inputs + outputs; t++) {
      View& view = job.tensors[t];
      view.data = (void*)read();
      view.dtype = (DType)read();
      view.column_stride = 1;
      if (t >= job.inputs) {
        const int64_t bytes = read();
        if (job.past_caches && view.data) ask_for_huge_pages(view.data, bytes);
        continue;
      }
      for (int dim = 0; dim < dims; dim++) strides[dim][t] = read();
      view.column_stride = read();
    }
    fold(dims, sizes, strides);
    job.rows_per_sample = dims > 0 ? job.rows / sizes[0] : 1;
  }

  // Two leading dimensions become one where every input steps through them evenly.
  void fold(int dims, const int64_t* sizes, const int64_t strides[][MAX_TENSORS]) {
    job.dims = 0;
    job.rows = 1;
    for (int dim = 0; dim < dims; dim++) {
      if (sizes[dim] == 1) continue;
      job.rows *= sizes[dim];
      const int64_t* inner = strides[dim];
      bool even = job.dims > 0;
      for (int t = 0; even && t < job.inputs; t++) even = job.strides[job.dims - 1][t] == sizes[dim] * inner[t];
      const int to = even ? job.dims - 1 : job.dims++;
      job.sizes[to] = even ? job.sizes[to] * sizes[dim] : sizes[dim];
      std::copy(inner, inner + job.inputs, job.strides[to]);
    }
  }

  void run(Kernel* kernel) const {
    const int64_t shares = std::max<int64_t>(1, std::min<int64_t>(threads, job.rows));
    if (shares == 1) return kernel(job, 0, job.rows);
    // The result does not depend on who computes which row.
#pragma omp parallel for num_threads(shares) schedule(static, 1)
    for (int64_t share = 0; share < shares; share++)
      kernel(job, job.rows * share / shares, job.rows * (share + 1) / shares);
  }
};

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Raised, here and in __init__.py, whenever the two sides of a call change: a library left over from older sources
// is then refused instead of called with what it takes for something else.
EXPORT int amvl_interface() { return 3; }

// Use the named instructions (avx512, avx2, baseline), or the best that this processor has for a null name.
// Returns 0 if it does not have them.
EXPORT int amvl_choose(const char* name) { return choose(name); }
EXPORT const char* amvl_instructions() { return instructions; }

EXPORT void amvl_dual_kl_forward(const int64_t* arguments) { Call(arguments).run(kernels->dual_kl_forward); }
EXPORT void amvl_dual_kl_backward(const int64_t* arguments) { Call(arguments).run(kernels->dual_kl_backward); }
EXPORT void amvl_sample_forward(const int64_t* arguments) { Call(arguments).run(kernels->sample_forward); }
EXPORT void amvl_sample_backward(const int64_t* arguments) { Call(arguments).run(kernels->sample_backward); }
EXPORT void amvl_noise(const int64_t* arguments) { Call(arguments).run(kernels->noise); }
EXPORT void amvl_words(const int64_t* arguments) { Call(arguments).run(kernels->words); }
