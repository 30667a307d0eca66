// depthwise_separable_conv2d and its backward on the CPU.
//
// channels_last with one filter for each channel runs in one kernel; everything else is two
// convolutions.
#include "cpu/kernels/depthwise_separable_conv2d.h"

#include "common/depthwise_operators.h"
#include "cpu/activation.h"
#include "cpu/conv2d.h"
#include "cpu/depthwise.h"
#include "cpu/dispatch.h"

namespace fastconv::cpu {
namespace {

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
  if (!separable_is_channels_last(input, depthwise_weight, pointwise_weight, hidden_size, depthwise_activation)) {
    return with_plain_strides(torch::stable::contiguous(output));
  }
  return pointwise_activation == Activation::kRelu ? with_plain_strides(output) : output;
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
  const IntList size{hidden_size[0], pointwise_weight.size(0), hidden_size[2], hidden_size[3]};
  return convolution(hidden, pointwise_weight, pointwise_bias, std::nullopt, size, kPointwise, outer);
}

}  // namespace
}  // namespace fastconv::cpu

STABLE_TORCH_LIBRARY_IMPL(fastconv, CPU, m) {
  using namespace fastconv::cpu;
  fastconv::DepthwiseSeparableOperators<compute, depthwise_convolution, activated_convolution_backward,
                                        activated_convolution_backward>::implement(m);
}
