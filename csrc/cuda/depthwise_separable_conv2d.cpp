// depthwise_separable_conv2d and its backward on CUDA.
//
// 16-bit types and TF32 in channels_last run in one kernel, where that is the faster way; all else is two convolutions.
// The backward computes the depthwise result again.
#include "cuda/kernels/depthwise_separable_conv2d.h"

#include "common/layout.h"
#include "cuda/activation.h"
#include "cuda/conv2d.h"
#include "cuda/depthwise_conv2d.h"
#include "cuda/register.h"

namespace fastconv::cuda {
namespace {

const ConvGeometry kPointwise{{1, 1}, {0, 0}, {1, 1}, 1};

// For the checks: a tensor of this size without the memory
Tensor of_size(const Tensor& like, const IntList& size) {
  return call<Tensor>("aten::expand", "", torch::stable::new_empty(like, {1, 1, 1, 1}), size, false);
}

std::optional<Tensor> dense(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional(torch::stable::contiguous(*tensor)) : std::nullopt;
}

// The output of the one kernel, or nothing where two are better
std::optional<Tensor> fused(const Tensor& input, const Tensor& depthwise_weight, const Tensor& pointwise_weight,
                            const std::optional<Tensor>& depthwise_bias, const std::optional<Tensor>& pointwise_bias,
                            const IntList& hidden_size, const ConvGeometry& geometry, Activation inner,
                            Activation outer) {
  const bool channels_last =
      output_is_channels_last(input, depthwise_weight) || output_is_channels_last(input, pointwise_weight);
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
  return output;
}

Tensor depthwise_separable_conv2d(const Tensor& input, const Tensor& depthwise_weight, const Tensor& pointwise_weight,
                                  const std::optional<Tensor>& depthwise_bias,
                                  const std::optional<Tensor>& pointwise_bias, IntList stride, IntList padding,
                                  IntList dilation, std::string depthwise_activation,
                                  std::string pointwise_activation) {
  constexpr auto kOp = "fastconv::depthwise_separable_conv2d";
  const Activation inner = parse_activation(kOp, depthwise_activation);
  const Activation outer = parse_activation(kOp, pointwise_activation);
  const int64_t groups = check_depthwise_weight(kOp, "depthwise_weight", input, depthwise_weight);
  check_pointwise_weight(kOp, "pointwise_weight", pointwise_weight);
  const ConvGeometry geometry{std::move(stride), std::move(padding), std::move(dilation), groups};
  const IntList hidden_size = check_conv2d(kOp, input, depthwise_weight, depthwise_bias, std::nullopt, geometry);
  check_conv2d(kOp, of_size(input, hidden_size), pointwise_weight, pointwise_bias, std::nullopt, kPointwise);

  const std::optional<Tensor> output = fused(input, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias,
                                             hidden_size, geometry, inner, outer);
  if (output) return *output;
  const Tensor hidden = depthwise_convolution(input, depthwise_weight, depthwise_bias, hidden_size, geometry, inner);
  return convolution(hidden, pointwise_weight, pointwise_bias, std::nullopt, kPointwise, outer);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> depthwise_separable_conv2d_backward(
    const Tensor& grad_output, const std::optional<Tensor>& output, const Tensor& input, const Tensor& depthwise_weight,
    const Tensor& pointwise_weight, const std::optional<Tensor>& depthwise_bias, IntList stride, IntList padding,
    IntList dilation, std::string depthwise_activation, std::string pointwise_activation,
    std::vector<bool> output_mask) {
  constexpr auto kOp = "fastconv::depthwise_separable_conv2d_backward";
  check_output_mask(kOp, output_mask, 5);
  const Activation inner = parse_activation(kOp, depthwise_activation);
  const Activation outer = parse_activation(kOp, pointwise_activation);
  const int64_t groups = check_depthwise_weight(kOp, "depthwise_weight", input, depthwise_weight);
  check_pointwise_weight(kOp, "pointwise_weight", pointwise_weight);
  const ConvGeometry geometry{std::move(stride), std::move(padding), std::move(dilation), groups};
  const IntList hidden_size = check_conv2d(kOp, input, depthwise_weight, depthwise_bias, std::nullopt, geometry);
  check_conv2d(kOp, of_size(input, hidden_size), pointwise_weight, std::nullopt, grad_output, kPointwise,
               "grad_output");
  check_mask_source(kOp, grad_output, output, outer);

  const bool wants_depthwise = output_mask[0] || output_mask[1] || output_mask[3];
  const Tensor hidden = depthwise_convolution(input, depthwise_weight, depthwise_bias, hidden_size, geometry, inner);
  auto [grad_hidden, grad_pointwise, grad_pointwise_bias] =
      convolution_backward(grad_output, output, hidden, pointwise_weight, kPointwise, outer,
                           {wants_depthwise, output_mask[2], output_mask[4]});
  if (!wants_depthwise) {
    return {empty_gradient(input), empty_gradient(input), grad_pointwise, empty_gradient(input), grad_pointwise_bias};
  }
  auto [grad_input, grad_depthwise, grad_depthwise_bias] = depthwise_convolution_backward(
      grad_hidden, hidden, input, depthwise_weight, geometry, inner, {output_mask[0], output_mask[1], output_mask[3]});
  return {grad_input, grad_depthwise, grad_pointwise, grad_depthwise_bias, grad_pointwise_bias};
}

}  // namespace
}  // namespace fastconv::cuda

FASTCONV_CUDA_LIBRARY(m) {
  m.impl("depthwise_separable_conv2d", TORCH_BOX(&fastconv::cuda::depthwise_separable_conv2d));
  m.impl("depthwise_separable_conv2d_backward", TORCH_BOX(&fastconv::cuda::depthwise_separable_conv2d_backward));
}
