#pragma once

#include "cpu/kernels/depthwise_conv2d.h"

namespace fastconv {

struct DepthwiseSeparableConv2dParams {
  DepthwiseConv2dParams depthwise;  // its output is not used
  const void* weight;               // what pointwise_pack made of weight and bias
  void* output;                     // [batch, P, Q, out_channels]
  int64_t out_channels;
  Activation activation;
};

// Weight and bias of the 1x1 convolution in the order in which the kernel reads them
struct PointwisePackParams {
  const void* weight;  // [out_channels, channels], in the type of computation
  const void* bias;    // [out_channels] or null, likewise
  void* packed;
  bool is_double;  // else float
  int64_t out_channels;
  int64_t channels;
};
struct PointwisePackedSize {
  int64_t elements;
  int64_t panels;  // that can be packed independently
};

// The pixels begin ... end - 1 of batch * P * Q. Any split into ranges gives the same result, bit
// by bit.
FASTCONV_DECLARE_KERNEL(void, depthwise_separable_conv2d_fprop_nhwc, const DepthwiseSeparableConv2dParams& params,
                        int64_t begin, int64_t end)

FASTCONV_DECLARE_KERNEL(PointwisePackedSize, pointwise_packed_size, const PointwisePackParams& params)
// The panels begin ... end - 1
FASTCONV_DECLARE_KERNEL(void, pointwise_pack, const PointwisePackParams& params, int64_t begin, int64_t end)

}  // namespace fastconv
