#pragma once

#include "cpu/kernels/kernel.h"

namespace fastconv {

// Dense tensors [outer, channels, inner]
struct LocalResponseNormParams {
  const void* input;
  const void* grad_output;  // dgrad only
  void* output;             // y, or dx of dgrad
  DType dtype;
  int64_t channels;
  int64_t inner;
  int64_t before;  // the window of channel c: c - before ... c + after, without what lies outside
                   // of the tensor
  int64_t after;
  double scale;  // alpha / size
  double beta;
  double k;
  Activation activation;  // of the input, before all else
};

// Both work on the positions begin ... end - 1 of outer * inner, all channels of each. Any split
// into ranges gives the same result, bit by bit.
FASTCONV_DECLARE_KERNEL(void, local_response_norm_fprop, const LocalResponseNormParams& params, int64_t begin,
                        int64_t end)
FASTCONV_DECLARE_KERNEL(void, local_response_norm_dgrad, const LocalResponseNormParams& params, int64_t begin,
                        int64_t end)

}  // namespace fastconv
