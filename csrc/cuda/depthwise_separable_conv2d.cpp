// depthwise_separable_conv2d and its backward on CUDA.
//
// 16-bit types and TF32 in channels_last run in one kernel, where that is the faster way; all else is two convolutions.
// The backward computes the depthwise result again.
#include "cuda/kernels/depthwise_separable_conv2d.h"

#include "common/depthwise_operators.h"
#include "common/layout.h"
#include "cuda/activation.h"
#include "cuda/conv2d.h"
#include "cuda/depthwise_conv2d.h"
#include "cuda/register.h"

namespace fastconv::cuda {
namespace {

std::optional<Tensor> dense(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional(torch::stable::contiguous(*tensor)) : std::nullopt;
}

// The output of the one kernel, or nothing where two are better
std::optional<Tensor> fused(const Tensor& input, const Tensor& depthwise_weight, const Tensor& pointwise_weight,
                            const std::optional<Tensor>& depthwise_bias, const std::optional<Tensor>& pointwise_bias,
                            const IntList& hidden_size, const ConvGeometry& geometry, Activation inner,
                            Activation outer) {
  const bool channels_last = separable_is_channels_last(input, depthwise_weight, pointwise_weight, hidden_size, inner);
  const IntList size{hidden_size[0], pointwise_weight.size(0), hidden_size[2], hidden_size[3]};
  const bool tf32 = allows_tf32(input);
  if (!channels_last || !(is_low_precision(input.scalar_type()) || tf32) || input.numel() == 0) return std::nullopt;
  const Tensor filters = torch::stable::contiguous(depthwise_weight);
  const Tensor weight = torch::stable::contiguous(pointwise_weight);
  const std::optional<Tensor> bias1 = dense(depthwise_bias), bias2 = dense(pointwise_bias);

  Device device(input);
  DepthwiseSeparableConv2dParams params{};
  params.depthwise = depthwise_params(input, depthwise_weight, hidden_size, geometry, inner);
  params.depthwise.input = device.in(input);
  params.depthwise.in = image_strides(input);
  params.depthwise.multiprocessors = device.multiprocessors();
  params.weight = device.in(weight);
  params.out_channels = static_cast<int>(size[1]);
  params.activation = outer;
  params.tf32 = tf32;
  if (!depthwise_separable_conv2d_takes(params)) return std::nullopt;
  const Tensor output = empty_channels_last(input, size);
  params.depthwise.weight = device.in(filters);
  params.depthwise.bias = device.in(bias1);
  params.depthwise.out = image_strides(output);
  params.bias = device.in(bias2);
  params.output = device.out(output);
  depthwise_separable_conv2d_fprop(params, device.stream());
  return outer == Activation::kRelu ? with_plain_strides(output) : output;
}

Tensor compute(const Tensor& input, const Tensor& depthwise_weight, const Tensor& pointwise_weight,
               const std::optional<Tensor>& depthwise_bias, const std::optional<Tensor>& pointwise_bias,
               const IntList& hidden_size, const ConvGeometry& geometry, Activation inner, Activation outer) {
  const std::optional<Tensor> output = fused(input, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias,
                                             hidden_size, geometry, inner, outer);
  if (output) return *output;
  const Tensor hidden = depthwise_convolution(input, depthwise_weight, depthwise_bias, hidden_size, geometry, inner);
  return convolution(hidden, pointwise_weight, pointwise_bias, std::nullopt, kPointwise, outer);
}

using Operators =
    DepthwiseSeparableOperators<compute, depthwise_convolution, depthwise_convolution_backward, convolution_backward>;

}  // namespace
}  // namespace fastconv::cuda

FASTCONV_CUDA_LIBRARY(m) {
  m.impl("depthwise_separable_conv2d", TORCH_BOX(&fastconv::cuda::Operators::depthwise_separable_conv2d));
  m.impl("depthwise_separable_conv2d_backward",
         TORCH_BOX(&fastconv::cuda::Operators::depthwise_separable_conv2d_backward));
}
