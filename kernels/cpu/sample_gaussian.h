// `sample_gaussian`: z = mean + temperature * exp(logvar / 2) * eps, and its gradient in logvar.
#pragma once

#include "exponential.h"
#include "layout.h"
#include "philox.h"

namespace {

// Tensors: `first`, logvar, out. Forward, `first` is mean and out is z; backward, grad_z and grad_logvar.
template <bool BACKWARD>
void sample(const Job& job, int64_t first, int64_t last) {
  int64_t offset[MAX_TENSORS];
  alignas(64) float buffers[2][BLOCK];
  for (int64_t row = first; row < last; row++) {
    row_offsets(job, row, offset);
    const uint64_t number = row_number(job, row);
    const Source addend(job.tensors[0], offset[0]), logvar(job.tensors[1], offset[1]);
    const Sink out(job.tensors[2], row, job);
    for (int64_t start = 0; start < job.columns; start += BLOCK) {
      const int count = columns_from(job, start);
      const float* a = addend.block(start, count, buffers[0]);
      const float* lv = logvar.block(start, count, buffers[1]);
      Float noise[4], value[4];
      philox_normal(job.seed, job.stream, number, start / 4, noise);
      for (int i = 0; i < 4; i++) {
        const Float x = load(a + i * LANES), deviation = job.temperature * exp(0.5f * load(lv + i * LANES));
        value[i] = BACKWARD ? 0.5f * x * (deviation * noise[i]) : x + deviation * noise[i];
      }
      out.write(start, count, value);
    }
  }
  if (job.past_caches) finish_stores();
}

}  // namespace
