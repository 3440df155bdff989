// `gaussian_dual_kl`, forward and backward. With q the posterior, p the prior, delta = logvar_p - logvar_q,
// diff = mean_q - mean_p and phi(t) = exp(t) - 1 - t:
//
//     z        = mean_q + exp(logvar_q / 2) * eps
//     KL(q||p) = 1/2 * sum_d [ phi(-delta) + (diff * exp(-logvar_p / 2))^2 ]
//     KL(p||q) = 1/2 * sum_d [ phi( delta) + (diff * exp(-logvar_q / 2))^2 ]
//
// Everything about delta comes from x = delta / 2 and m = exp(x) - 1, whose range reduction is shared by both signs:
// phi(delta) = m^2 + 2 phi(x), exp(delta) - 1 = m^2 + 2 m.
#pragma once

#include "exponential.h"
#include "layout.h"
#include "philox.h"

namespace {

struct DualKL {
  Float poison;  // NaN where an input is NaN or infinite, and else 0
  Float mean_q;
  Float deviation_q;             // exp(logvar_q / 2)
  Inverse inverse_q, inverse_p;  // exp(-logvar / 2)
  Float gap_q, gap_p;            // diff times these
  Differences half;              // of x
};

INLINE DualKL dual_kl(Float mean_q, Float logvar_q, Float mean_p, Float logvar_p) {
  DualKL k;
  Float diff = mean_q - mean_p, delta = logvar_p - logvar_q;
  k.poison = 0.0f * (diff + delta);
  diff += k.poison, delta += k.poison, logvar_q += k.poison;
  k.mean_q = mean_q + k.poison;
  // What the subtraction rounded off (Knuth's two-sum): at delta = 80 half a unit in the last place of delta is
  // 4e-6 of exp(delta).
  const Float back = delta - logvar_p;
  const Float rest = (logvar_p - (delta - back)) - (logvar_q + back);
  k.half = differences_both_ways(0.5f * delta, 0.5f * rest);
  exp_both_ways(0.5f * logvar_q, k.deviation_q, k.inverse_q);
  k.inverse_p = exp_minus(0.5f * logvar_p);
  k.gap_q = times(diff, k.inverse_q);
  k.gap_p = times(diff, k.inverse_p);
  return k;
}

void dual_kl_forward(const Job& job, int64_t first, int64_t last) {
  const View* views = job.tensors;
  int64_t offset[MAX_TENSORS];
  alignas(64) float buffers[4][BLOCK];
  for (int64_t row = first; row < last; row++) {
    row_offsets(job, row, offset);
    const uint64_t number = row_number(job, row);
    const Source mean_q(views[0], offset[0]), logvar_q(views[1], offset[1]);
    const Source mean_p(views[2], offset[2]), logvar_p(views[3], offset[3]);
    const Sink z(views[4], row, job);
    RowSum forward_kl, reverse_kl;
    for (int64_t start = 0; start < job.columns; start += BLOCK) {
      const int count = columns_from(job, start);
      const float* mq = mean_q.block(start, count, buffers[0]);
      const float* lq = logvar_q.block(start, count, buffers[1]);
      const float* mp = mean_p.block(start, count, buffers[2]);
      const float* lp = logvar_p.block(start, count, buffers[3]);
      Float noise[4], sample[4], forward[4], reverse[4];
      philox_normal(job.seed, 0, number, start / 4, noise);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        const int at = i * LANES;
        const DualKL k = dual_kl(load(mq + at), load(lq + at), load(mp + at), load(lp + at));
        sample[i] = k.mean_q + k.deviation_q * noise[i];
        // Doubled terms; where a row ends, zeros stood in for all four inputs and every term is 0.
        forward[i] = k.half.expm1_minus * k.half.expm1_minus + (k.gap_p * k.gap_p + 2.0f * k.half.phi_minus);
        reverse[i] = k.half.expm1 * k.half.expm1 + (k.gap_q * k.gap_q + 2.0f * k.half.phi);
      }
      z.write(start, count, sample);
      forward_kl.add(forward);
      reverse_kl.add(reverse);
    }
    ((float*)views[5].data)[row] = (float)(0.5 * forward_kl.total());
    ((float*)views[6].data)[row] = (float)(0.5 * reverse_kl.total());
  }
  if (job.past_caches) finish_stores();
}

// d KL(q||p) / d mean_p   = -diff * exp(-logvar_p)
// d KL(q||p) / d logvar_p = -1/2 * ( expm1(-delta) + diff^2 * exp(-logvar_p) )
// d KL(p||q) / d mean_q   =  diff * exp(-logvar_q)
// d KL(p||q) / d logvar_q = -1/2 * ( expm1( delta) + diff^2 * exp(-logvar_q) )
// and without stopped gradients also d KL(q||p)/d mean_q = diff * exp(-logvar_p),
// d KL(q||p)/d logvar_q = 1/2 * expm1(-delta), and their mirror images for KL(p||q).
//
// TRAINING: all upstream gradients are there, all four are asked for and stop where AMVL stops them. Known when
// compiling, this leaves one stretch of code without branches, whose instructions the compiler can interleave.
template <bool TRAINING>
void dual_kl_backward_rows(const Job& job, int64_t first, int64_t last) {
  const View* views = job.tensors;
  const bool has_z = TRAINING || views[4].data, has_forward = TRAINING || views[5].data;
  const bool has_reverse = TRAINING || views[6].data, needs_noise = TRAINING || (has_z && views[8].data);
  const bool stop_gradient = TRAINING || job.stop_gradient;
  int64_t offset[MAX_TENSORS];
  alignas(64) float buffers[5][BLOCK];
  for (int64_t row = first; row < last; row++) {
    row_offsets(job, row, offset);
    const uint64_t number = row_number(job, row);
    const Source mean_q(views[0], offset[0]), logvar_q(views[1], offset[1]);
    const Source mean_p(views[2], offset[2]), logvar_p(views[3], offset[3]);
    const Source grad_z(views[4], offset[4]);
    const Sink to_mean_q(views[7], row, job), to_logvar_q(views[8], row, job);
    const Sink to_mean_p(views[9], row, job), to_logvar_p(views[10], row, job);
    float weight[2] = {0, 0};
    for (int i = 0; i < 2; i++) {
      float block[BLOCK];
      if (views[5 + i].data) weight[i] = *Source(views[5 + i], offset[5 + i]).block(0, 1, block);
    }
    for (int64_t start = 0; start < job.columns; start += BLOCK) {
      const int count = columns_from(job, start);
      const float* mq = mean_q.block(start, count, buffers[0]);
      const float* lq = logvar_q.block(start, count, buffers[1]);
      const float* mp = mean_p.block(start, count, buffers[2]);
      const float* lp = logvar_p.block(start, count, buffers[3]);
      const float* gz = has_z ? grad_z.block(start, count, buffers[4]) : nullptr;
      Float noise[4], mean_q_grad[4], logvar_q_grad[4], mean_p_grad[4], logvar_p_grad[4];
      if (needs_noise) philox_normal(job.seed, 0, number, start / 4, noise);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        const int at = i * LANES;
        const DualKL k = dual_kl(load(mq + at), load(lq + at), load(mp + at), load(lp + at));
        Float mean_q_i = k.poison, logvar_q_i = k.poison, mean_p_i = k.poison, logvar_p_i = k.poison;
        // What has no upstream gradient is left out: a weight of 0 would make NaN of an overflow.
        if (has_forward) {
          const Float slope = times(weight[0] * k.gap_p, k.inverse_p);
          const Float expm1 = k.half.expm1_minus * k.half.expm1_minus + 2.0f * k.half.expm1_minus;
          mean_p_i -= slope;
          logvar_p_i -= 0.5f * weight[0] * (expm1 + k.gap_p * k.gap_p);
          if (!stop_gradient) {
            mean_q_i += slope;
            logvar_q_i += 0.5f * weight[0] * expm1;
          }
        }
        if (has_reverse) {
          const Float slope = times(weight[1] * k.gap_q, k.inverse_q);
          const Float expm1 = k.half.expm1 * k.half.expm1 + 2.0f * k.half.expm1;
          mean_q_i += slope;
          logvar_q_i -= 0.5f * weight[1] * (expm1 + k.gap_q * k.gap_q);
          if (!stop_gradient) {
            mean_p_i -= slope;
            logvar_p_i += 0.5f * weight[1] * expm1;
          }
        }
        if (has_z) {
          const Float upstream = load(gz + at);
          mean_q_i += upstream;
          if (needs_noise) logvar_q_i += 0.5f * upstream * (k.deviation_q * noise[i]);
        }
        mean_q_grad[i] = mean_q_i, logvar_q_grad[i] = logvar_q_i;
        mean_p_grad[i] = mean_p_i, logvar_p_grad[i] = logvar_p_i;
      }
      to_mean_q.write(start, count, mean_q_grad);
      to_logvar_q.write(start, count, logvar_q_grad);
      to_mean_p.write(start, count, mean_p_grad);
      to_logvar_p.write(start, count, logvar_p_grad);
    }
  }
  if (job.past_caches) finish_stores();
}

void dual_kl_backward(const Job& job, int64_t first, int64_t last) {
  bool training = job.stop_gradient;
  for (int t = 4; t < 11; t++) training = training && job.tensors[t].data;
  (training ? dual_kl_backward_rows<true> : dual_kl_backward_rows<false>)(job, first, last);
}

}  // namespace
