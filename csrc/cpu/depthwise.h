// The depthwise convolution that two operators share.
#pragma once

#include "common/checks.h"
#include "cpu/kernels/depthwise_conv2d.h"

namespace fastconv::cpu {

// The arguments of a depthwise convolution as the nhwc kernels read them, with the tensors behind
// the pointers
struct NhwcDepthwise {
  NhwcDepthwise(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                const IntList& output_size, const ConvGeometry& geometry, Activation activation);
  // A weight or bias in the type of computation, dense
  static Tensor in_compute_type(const Tensor& tensor);

  Tensor input, weight;
  std::optional<Tensor> bias;
  DepthwiseConv2dParams params;
};

// Whether the nhwc kernels are the way to compute this: one filter for each channel, and either a
// channels_last output or no oneDNN for the type (float64), where torch's own loops are 10 to 90
// times slower than this with a copy before and behind it
bool nhwc_depthwise_takes(const Tensor& input, const Tensor& weight);

// activation(conv2d(input, weight, groups=channels) + bias), layout as eager's. Arguments are
// already checked.
Tensor depthwise_convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                             const IntList& output_size, const ConvGeometry& geometry, Activation activation);

}  // namespace fastconv::cpu
