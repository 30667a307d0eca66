// depthwise_conv2d on CUDA, and its backward for conv2d_backward. The kernels read any strides, so nothing is copied
// but gradients in another layout than the output's.
#include "cuda/depthwise_conv2d/depthwise_conv2d.h"

#include "common/aten.h"
#include "common/depthwise_operators.h"
#include "common/layout.h"
#include "cuda/depthwise_conv2d/plan.h"
#include "cuda/elementwise/activation.h"
#include "cuda/runtime/device.h"
#include "cuda/runtime/register.h"

namespace fastconv::cuda {
namespace {

int to_int(int64_t value) {
  STD_TORCH_CHECK(value <= INT32_MAX, "fastconv: got ", value,
                  " as a size or step of a depthwise convolution, needed less than 2^31; split the tensor");
  return static_cast<int>(value);
}

}  // namespace

Strides image_strides(const Tensor& tensor) {
  // What torch keeps for a dimension of one element means nothing, and would only look unaligned.
  const auto stride = [&](int d) { return tensor.size(d) == 1 ? int64_t{0} : tensor.stride(d); };
  return {stride(0), tensor.stride(1), stride(2), stride(3)};
}

DepthwiseConv2dParams depthwise_params(const Tensor& input, const Tensor& weight, const IntList& output_size,
                                       const ConvGeometry& geometry, Activation activation) {
  DepthwiseConv2dParams params{};
  params.dtype = element_type(input);
  params.activation = activation;
  params.batch = to_int(input.size(0));
  params.channels = to_int(input.size(1));
  params.multiplier = to_int(weight.size(0) / input.size(1));
  params.height = to_int(input.size(2));
  params.width = to_int(input.size(3));
  params.filter_height = to_int(weight.size(2));
  params.filter_width = to_int(weight.size(3));
  params.out_height = to_int(output_size[2]);
  params.out_width = to_int(output_size[3]);
  params.stride_height = to_int(geometry.stride[0]);
  params.stride_width = to_int(geometry.stride[1]);
  params.padding_height = to_int(geometry.padding[0]);
  params.padding_width = to_int(geometry.padding[1]);
  params.dilation_height = to_int(geometry.dilation[0]);
  params.dilation_width = to_int(geometry.dilation[1]);
  return params;
}

Tensor depthwise_convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                             const IntList& output_size, const ConvGeometry& geometry, Activation activation) {
  DepthwiseConv2dParams params = depthwise_params(input, weight, output_size, geometry, activation);
  Device device(input);
  if (!depthwise_conv2d_takes(params, device.info())) {
    const Tensor output = aten_convolution(input, weight, bias, geometry);
    activation_inplace(output, activation);
    return activation == Activation::kRelu ? with_plain_strides(output) : output;
  }
  const Tensor output = output_is_channels_last(input, weight) ? empty_channels_last(input, output_size)
                                                               : torch::stable::new_empty(input, output_size);
  if (output.numel() == 0) return output;
  const Tensor filters = torch::stable::contiguous(weight);
  std::optional<Tensor> dense_bias;
  if (bias) dense_bias = torch::stable::contiguous(*bias);
  params.input = device.in(input);
  params.weight = device.in(filters);
  params.bias = device.in(dense_bias);
  params.output = device.out(output);
  params.in = image_strides(input);
  params.out = image_strides(output);
  DepthwisePlan plan = plan_depthwise_conv2d(Pass::kFprop, params, device.info());
  launch_depthwise_conv2d(plan, nullptr, device.stream());
  return activation == Activation::kRelu ? with_plain_strides(output) : output;
}

std::tuple<Tensor, Tensor, Tensor> depthwise_convolution_backward(const Tensor& grad_output,
                                                                  const std::optional<Tensor>& output,
                                                                  const Tensor& input, const Tensor& weight,
                                                                  const ConvGeometry& geometry, Activation activation,
                                                                  std::array<bool, 3> mask) {
  const IntList output_size(grad_output.sizes().begin(), grad_output.sizes().end());
  DepthwiseConv2dParams params = depthwise_params(input, weight, output_size, geometry, activation);
  const bool masked = activation != Activation::kNone;
  Device device(input);
  if (!depthwise_conv2d_takes(params, device.info())) {
    const Tensor grad = masked ? activation_backward(grad_output, *output, activation) : grad_output;
    return aten_convolution_backward(grad, input, weight, geometry, mask);
  }
  const bool channels_last = output_is_channels_last(input, weight);
  const auto layout = channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  const Tensor grad = torch::stable::contiguous(grad_output, layout);
  std::optional<Tensor> activated;
  if (masked) activated = torch::stable::contiguous(*output, layout);

  Tensor grad_input = empty_gradient(input), grad_weight = empty_gradient(input), grad_bias = empty_gradient(input);
  if (mask[0]) {
    grad_input = channels_last ? empty_channels_last(input, {input.sizes().begin(), input.sizes().end()})
                               : torch::stable::new_empty(input, input.sizes());
  }
  if (mask[1]) grad_weight = torch::stable::new_empty(weight, weight.sizes());
  if (mask[2]) grad_bias = torch::stable::new_empty(weight, IntList{weight.size(0)});
  if (grad.numel() == 0) {  // sums of nothing
    for (const Tensor* result : {&grad_input, &grad_weight, &grad_bias}) {
      if (result->numel() > 0) torch::stable::zero_(*const_cast<Tensor*>(result));
    }
    return {grad_input, grad_weight, grad_bias};
  }

  const Tensor filters = torch::stable::contiguous(weight);
  params.grad_output = device.in(grad);
  params.activated = device.in(activated);
  params.out = image_strides(grad);
  if (grad_input.numel() > 0) {
    params.weight = device.in(filters);
    params.grad_input = device.out(grad_input);
    params.in = image_strides(grad_input);
    DepthwisePlan plan = plan_depthwise_conv2d(Pass::kDgrad, params, device.info());
    launch_depthwise_conv2d(plan, nullptr, device.stream());
    params.grad_input = nullptr;
  }
  if (mask[1] || mask[2]) {
    params.input = device.in(input);
    params.in = image_strides(input);
    if (mask[1]) params.grad_weight = device.out(grad_weight);
    if (mask[2]) params.grad_bias = device.out(grad_bias);
    const ScalarType compute = input.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    DepthwisePlan plan = plan_depthwise_conv2d(Pass::kWgrad, params, device.info());
    const Tensor workspace = torch::stable::new_empty(input, IntList{plan.workspace}, compute);
    launch_depthwise_conv2d(plan, device.scratch(workspace), device.stream());
  }
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace fastconv::cuda

FASTCONV_CUDA_LIBRARY(m) { fastconv::DepthwiseOperators<fastconv::cuda::depthwise_convolution>::implement(m); }
