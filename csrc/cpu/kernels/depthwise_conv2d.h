#pragma once

#include "cpu/kernels/kernel.h"

namespace fastconv {

// One filter for each channel. Input [batch, height, width, channels], output [batch, P, Q,
// channels], both dense.
struct DepthwiseConv2dParams {
  const void* input;
  // In the type of computation (double for double, else float): [R, S, channels]; [channels] or
  // null.
  const void* weight;
  const void* bias;
  void* output;
  DType dtype;
  int64_t batch;
  int64_t channels;
  int64_t height, width;
  int64_t filter_height, filter_width;  // R, S
  int64_t out_height, out_width;        // P, Q
  int64_t stride_height, stride_width;
  int64_t padding_height, padding_width;
  int64_t dilation_height, dilation_width;
  Activation activation;
};

// The pixels begin ... end - 1 of batch * P * Q. Any split into ranges gives the same result, bit
// by bit.
FASTCONV_DECLARE_KERNEL(void, depthwise_conv2d_fprop_nhwc, const DepthwiseConv2dParams& params, int64_t begin,
                        int64_t end)

}  // namespace fastconv
