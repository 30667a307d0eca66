// Results: where a finished sum belongs, what happens to it on the way (bias, residual, activation, rounding), and
// where it waits when the depth is split.
#pragma once

#include "cuda/conv2d/sm80/sources.cuh"

namespace fastconv::cuda::inline sm80 {

// Where row `a` of a branch's result lies: channel 0 of a pixel, or a filter's gradient.
template <Pass kPass>
FASTCONV_DEVICE int64_t row_offset(const ConvParams& p, const ConvBranch& branch, int group, int branch_index, int a) {
  if constexpr (kPass == Pass::kWgrad) {
    return (int64_t{group} * p.k_group[branch_index] + a) * p.extent_b;
  } else {
    constexpr bool kForward = kPass == Pass::kFprop;
    const Strides& strides = kForward ? branch.y : p.arg.x;
    int inner, column;
    const int n = divide(kForward ? p.by_pixels : p.by_phase, a, inner);
    int row = divide(kForward ? p.by_q : p.by_columns, inner, column);
    if constexpr (!kForward) {
      row = p.rows.first_pixel + row * p.rows.step_pixel;
      column = p.columns.first_pixel + column * p.columns.step_pixel;
    }
    return n * strides.n + row * strides.h + column * strides.w;
  }
}

// Bias, residual, activation; then kCount neighbours of a row are written. `sums` are float32 still.
template <Pass kPass, class T, int kCount>
FASTCONV_DEVICE void finish(const ConvParams& p, int group, int branch_index, int64_t row, int b, int end_b,
                            float (&sums)[kCount]) {
  const ConvBranch& branch = p.arg.branch[branch_index];
  T* result = static_cast<T*>(kPass == Pass::kFprop   ? branch.output
                              : kPass == Pass::kDgrad ? p.arg.grad_input
                                                      : branch.grad_weight);
  const int64_t step = kPass == Pass::kFprop ? branch.y.c : kPass == Pass::kDgrad ? p.arg.x.c : 1;
  const int first = b + (kPass == Pass::kFprop   ? group * p.k_group[branch_index]
                         : kPass == Pass::kDgrad ? group * p.c_group
                                                 : 0);
  const bool whole = kCount > 1 && p.wide[branch_index] && b + kCount <= end_b;
  const int64_t offset = row + first * step;
  if constexpr (kPass == Pass::kFprop) {
    const T* bias = static_cast<const T*>(branch.bias);
    const T* residual = static_cast<const T*>(branch.residual);
    if (bias) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (b + i < end_b) sums[i] += to_float(bias[first + i]);
      }
    }
    if (residual && whole) {
      const Vec<T, kCount> others = load<kCount>(residual + offset);
#pragma unroll
      for (int i = 0; i < kCount; ++i) sums[i] += to_float(others.v[i]);
    } else if (residual) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (b + i < end_b) sums[i] += to_float(residual[offset + i * step]);
      }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] = activate(sums[i], p.arg.activation);
  }
  if (whole) {
    Vec<T, kCount> rounded;
#pragma unroll
    for (int i = 0; i < kCount; ++i) rounded.v[i] = from_float<T>(sums[i]);
    store(result + offset, rounded);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (b + i < end_b) result[offset + i * step] = from_float<T>(sums[i]);
    }
  }
}

// Where a part of a sum waits for the others, when the depth is split.
FASTCONV_DEVICE float* part(const ConvParams& p, int split, int group, int a, int b) {
  const int64_t row = (int64_t{split} * p.arg.groups + group) * p.extent_a + a;
  return p.workspace + (row * p.extent_b + b);
}
FASTCONV_DEVICE float* bias_part(const ConvParams& p, int split, int group, int a) {
  const int64_t rows = int64_t{p.arg.groups} * p.extent_a;
  return p.workspace + (p.splits * rows * p.extent_b + split * rows + int64_t{group} * p.extent_a + a);
}

}  // namespace fastconv::cuda::inline sm80
