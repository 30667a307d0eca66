// depthwise_separable_conv2d and its backward on the CPU.
//
// channels_last with one filter for each channel runs in one kernel; everything else is two
// convolutions.
#include "cpu/kernels/depthwise_separable_conv2d.h"

#include "cpu/activation.h"
#include "cpu/conv2d.h"
#include "cpu/depthwise.h"
#include "cpu/dispatch.h"

namespace fastconv::cpu {
namespace {

const ConvGeometry kPointwise{{1, 1}, {0, 0}, {1, 1}, 1};

// For the checks: a tensor of this size without the memory
Tensor of_size(const Tensor& like, const IntList& size) {
  return call<Tensor>("aten::expand", "", torch::stable::new_empty(like, {1, 1, 1, 1}), size, false);
}

Tensor pack(const Tensor& pointwise_weight, const std::optional<Tensor>& pointwise_bias) {
  const Tensor weight = NhwcDepthwise::in_compute_type(pointwise_weight);
  std::optional<Tensor> bias;
  if (pointwise_bias) bias = NhwcDepthwise::in_compute_type(*pointwise_bias);
  PointwisePackParams params{.weight = weight.const_data_ptr(),
                             .bias = bias ? bias->const_data_ptr() : nullptr,
                             .packed = nullptr,
                             .is_double = weight.scalar_type() == ScalarType::Double,
                             .out_channels = weight.size(0),
                             .channels = weight.size(1)};
  const PointwisePackedSize size = FASTCONV_KERNEL(pointwise_packed_size)(params);
  const Tensor packed = torch::stable::new_empty(weight, {size.elements});
  params.packed = packed.mutable_data_ptr();
  const auto kernel = FASTCONV_KERNEL(pointwise_pack);
  parallel_for(size.panels, weight.numel() / size.panels * weight.element_size(),
               [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
  return packed;
}

Tensor fused(const Tensor& input, const Tensor& depthwise_weight, const Tensor& pointwise_weight,
             const std::optional<Tensor>& depthwise_bias, const std::optional<Tensor>& pointwise_bias,
             const IntList& hidden_size, const ConvGeometry& geometry, Activation depthwise_activation,
             Activation pointwise_activation) {
  const NhwcDepthwise depthwise(input, depthwise_weight, depthwise_bias, hidden_size, geometry, depthwise_activation);
  const Tensor weight = pack(pointwise_weight, pointwise_bias);
  const int64_t out_channels = pointwise_weight.size(0);
  const Tensor output = empty_channels_last(input, {hidden_size[0], out_channels, hidden_size[2], hidden_size[3]});
  const DepthwiseSeparableConv2dParams params{.depthwise = depthwise.params,
                                              .weight = weight.const_data_ptr(),
                                              .output = output.mutable_data_ptr(),
                                              .out_channels = out_channels,
                                              .activation = pointwise_activation};
  const auto kernel = FASTCONV_KERNEL(depthwise_separable_conv2d_fprop_nhwc);
  parallel_for(output.numel() / out_channels, pointwise_weight.numel(),
               [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
  const bool channels_last =
      output_is_channels_last(input, depthwise_weight) || output_is_channels_last(input, pointwise_weight);
  return channels_last ? output : torch::stable::contiguous(output);
}

Tensor compute(const Tensor& input, const Tensor& depthwise_weight, const Tensor& pointwise_weight,
               const std::optional<Tensor>& depthwise_bias, const std::optional<Tensor>& pointwise_bias,
               const IntList& hidden_size, const ConvGeometry& geometry, Activation inner, Activation outer) {
  const ScalarType dtype = input.scalar_type();
  // Where the processor computes in a 16-bit type, oneDNN's 1x1 convolution is faster than fp32 in
  // our kernel.
  const bool native_16_bit = is_low_precision(dtype) && onednn_computes(dtype);
  if (nhwc_depthwise_takes(input, depthwise_weight) && !native_16_bit) {
    return fused(input, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, hidden_size, geometry,
                 inner, outer);
  }
  if (is_low_precision(dtype) && !native_16_bit) {
    // In fp32 from end to end rather than in each of the two
    constexpr ScalarType kFp32 = ScalarType::Float;
    return torch::stable::to(compute(torch::stable::to(input, kFp32), torch::stable::to(depthwise_weight, kFp32),
                                     torch::stable::to(pointwise_weight, kFp32), to_dtype(depthwise_bias, kFp32),
                                     to_dtype(pointwise_bias, kFp32), hidden_size, geometry, inner, outer),
                             dtype);
  }
  const Tensor hidden = depthwise_convolution(input, depthwise_weight, depthwise_bias, hidden_size, geometry, inner);
  return convolution(hidden, pointwise_weight, pointwise_bias, std::nullopt, kPointwise, outer);
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

  return compute(input, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, hidden_size, geometry,
                 inner, outer);
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
  check_conv2d(kOp, of_size(input, hidden_size), pointwise_weight, std::nullopt, grad_output, kPointwise);
  STD_TORCH_CHECK(output || outer == Activation::kNone, kOp,
                  ": got no output, needed it for the activation's mask; pass the forward's output");

  const bool wants_depthwise = output_mask[0] || output_mask[1] || output_mask[3];
  const Tensor grad = outer == Activation::kNone ? grad_output : activation_backward(grad_output, *output, outer);
  const Tensor hidden = depthwise_convolution(input, depthwise_weight, depthwise_bias, hidden_size, geometry, inner);
  auto [grad_hidden, grad_pointwise, grad_pointwise_bias] = convolution_backward(
      grad, hidden, pointwise_weight, kPointwise, {wants_depthwise, output_mask[2], output_mask[4]});
  if (!wants_depthwise) {
    return {empty_gradient(input), empty_gradient(input), grad_pointwise, empty_gradient(input), grad_pointwise_bias};
  }
  if (inner != Activation::kNone) grad_hidden = activation_backward(grad_hidden, hidden, inner);
  auto [grad_input, grad_depthwise, grad_depthwise_bias] = convolution_backward(
      grad_hidden, input, depthwise_weight, geometry, {output_mask[0], output_mask[1], output_mask[3]});
  return {grad_input, grad_depthwise, grad_pointwise, grad_depthwise_bias, grad_pointwise_bias};
}

}  // namespace
}  // namespace fastconv::cpu

STABLE_TORCH_LIBRARY_IMPL(fastconv, CPU, m) {
  m.impl("depthwise_separable_conv2d", TORCH_BOX(&fastconv::cpu::depthwise_separable_conv2d));
  m.impl("depthwise_separable_conv2d_backward", TORCH_BOX(&fastconv::cpu::depthwise_separable_conv2d_backward));
}
