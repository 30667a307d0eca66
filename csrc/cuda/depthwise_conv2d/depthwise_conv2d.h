// The depthwise convolution that several operators share.
#pragma once

#include "common/checks.h"
#include "cuda/depthwise_conv2d/params.h"

namespace fastconv::cuda {

// activation(conv2d(input, weight, groups=channels) + bias), layout as eager's, for groups = input channels. Arguments
// are already checked.
Tensor depthwise_convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                             const IntList& output_size, const ConvGeometry& geometry, Activation activation);

// Gradients of input, weight and bias, for the gradient of the activation's output; `output` is that output, and not
// looked at without an activation. An entry outside of the mask is empty.
std::tuple<Tensor, Tensor, Tensor> depthwise_convolution_backward(const Tensor& grad_output,
                                                                  const std::optional<Tensor>& output,
                                                                  const Tensor& input, const Tensor& weight,
                                                                  const ConvGeometry& geometry, Activation activation,
                                                                  std::array<bool, 3> mask);

// The arguments as the kernels take them, without pointers and strides
DepthwiseConv2dParams depthwise_params(const Tensor& input, const Tensor& weight, const IntList& output_size,
                                       const ConvGeometry& geometry, Activation activation);
Strides image_strides(const Tensor& tensor);

}  // namespace fastconv::cuda
