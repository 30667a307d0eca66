#pragma once

#include "cpu/kernels/depthwise_conv2d.h"

namespace fastconv {

struct DepthwiseSeparableConv2dParams {
  DepthwiseConv2dParams depthwise;  // its output is not used
  // In the type of computation: weight [out_channels, channels] as pointwise_pack leaves it; bias, or null.
  const void* weight;
  const void* bias;
  void* output;  // [batch, P, Q, out_channels]
  int64_t out_channels;
  Activation activation;
};

FASTCONV_DECLARE_KERNEL(void, depthwise_separable_conv2d_fprop_nhwc, const DepthwiseSeparableConv2dParams& params,
                        int64_t begin, int64_t end)

// Rows begin ... end - 1 of a matrix [rows, depth] of floats (doubles if `wide`), to the order in which the kernel
// reads it
FASTCONV_DECLARE_KERNEL(void, pointwise_pack, bool wide, const void* weight, int64_t rows, int64_t depth, void* packed)

}  // namespace fastconv
