// depthwise_separable_conv2d and its backward on CUDA.
//
// 16-bit types and TF32 in channels_last run in one kernel, where that is the faster way; all else is two convolutions.
// The backward computes the depthwise result again.
#include "common/depthwise_operators.h"
#include "common/layout.h"
#include "cuda/conv2d/conv2d.h"
#include "cuda/depthwise_conv2d/depthwise_conv2d.h"
#include "cuda/depthwise_separable_conv2d/plan.h"
#include "cuda/runtime/device.h"
#include "cuda/runtime/register.h"

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
  if (input.numel() == 0) return std::nullopt;
  const Tensor filters = torch::stable::contiguous(depthwise_weight);
  const Tensor weight = torch::stable::contiguous(pointwise_weight);
  const std::optional<Tensor> bias1 = dense(depthwise_bias), bias2 = dense(pointwise_bias);

  Device device(input);
  DepthwiseSeparableConv2dParams params{};
  params.depthwise = depthwise_params(input, depthwise_weight, hidden_size, geometry, inner);
  params.depthwise.input = device.in(input);
  params.depthwise.in = image_strides(input);
  params.weight = device.in(weight);
  params.out_channels = static_cast<int>(size[1]);
  params.activation = outer;
  params.tf32 = allows_tf32(input);
  params.channels_last = channels_last;
  SeparablePlan plan = plan_depthwise_separable_conv2d(params, device.info());
  if (!plan.variant) return std::nullopt;
  const Tensor output = empty_channels_last(input, size);
  DepthwiseSeparableConv2dParams& planned = plan.params;
  planned.depthwise.weight = device.in(filters);
  planned.depthwise.bias = device.in(bias1);
  planned.depthwise.out = image_strides(output);
  planned.bias = device.in(bias2);
  planned.output = device.out(output);
  launch_depthwise_separable_conv2d(plan, device.stream());
  return outer == Activation::kRelu ? with_plain_strides(output) : output;
}

Tensor compute(const Tensor& input, const Tensor& depthwise_weight, const Tensor& pointwise_weight,
               const std::optional<Tensor>& depthwise_bias, const std::optional<Tensor>& pointwise_bias,
               const IntList& hidden_size, const ConvGeometry& geometry, Activation inner, Activation outer) {
  const std::optional<Tensor> output = fused(input, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias,
                                             hidden_size, geometry, inner, outer);
  if (output) return *output;
  const Tensor hidden = depthwise_convolution(input, depthwise_weight, depthwise_bias, hidden_size, geometry, inner);
  const IntList size{hidden_size[0], pointwise_weight.size(0), hidden_size[2], hidden_size[3]};
  return convolution(hidden, pointwise_weight, pointwise_bias, std::nullopt, size, kPointwise, outer);
}

}  // namespace
}  // namespace fastconv::cuda

FASTCONV_CUDA_LIBRARY(m) {
  using namespace fastconv::cuda;
  fastconv::DepthwiseSeparableOperators<compute, depthwise_convolution, depthwise_convolution_backward,
                                        convolution_backward>::implement(m);
}
