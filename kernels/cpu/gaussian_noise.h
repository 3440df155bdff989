// `gaussian_noise`, and the words behind it.
#pragma once

#include "layout.h"
#include "philox.h"

namespace {

// Tensors: out, float32.
void noise(const Job& job, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; row++) {
    const uint64_t number = row_number(job, row);
    const Sink out(job.tensors[0], row, job);
    for (int64_t start = 0; start < job.columns; start += BLOCK) {
      Float normal[4];
      philox_normal(job.seed, job.stream, number, start / 4, normal);
      out.write(start, columns_from(job, start), normal);
    }
  }
  if (job.past_caches) finish_stores();
}

// Tensors: out, 32-bit integers [rows, columns], of which columns 4 g to 4 g + 3 are the words of group g.
void words(const Job& job, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; row++) {
    const uint64_t number = row_number(job, row);
    uint32_t* out = (uint32_t*)job.tensors[0].data + row * job.columns;
    for (int64_t start = 0; start < job.columns; start += BLOCK) {
      Word word[4];
      philox_words(job.seed, job.stream, number, start / 4, word);
      for (int i = 0; i < columns_from(job, start); i++) {
        int lane = 0;
        while (group_of(lane) != i / 4) lane++;
        out[start + i] = word[i % 4][lane];
      }
    }
  }
}

}  // namespace
