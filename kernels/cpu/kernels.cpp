// All kernels for one instruction set, the one that the compiler's flags say; compiled once for each.
#if defined(__GNUC__) && !defined(__clang__)
// Interleaves independent vectors: the kernels are bound by the latency of their chains, not by their number. Clang
// has no such options.
#pragma GCC optimize("schedule-insns", "sched-pressure")
#endif

#include "gaussian_dual_kl.h"
#include "gaussian_noise.h"
#include "sample_gaussian.h"

#define CONCATENATE(a, b) a##b
#define NAME(a, b) CONCATENATE(a, b)

extern const Kernels NAME(kernels_, INSTRUCTIONS) = {
    dual_kl_forward, dual_kl_backward, sample<false>, sample<true>, noise, words};
