// depthwise_conv2d on the CPU. Its backward is conv2d_backward.
//
// channels_last with one filter for each channel runs in cpu/kernels; the rest goes the way of every convolution.
// A kernel of our own for contiguous tensors was measured, too: no faster than oneDNN's at stride 1 and slower at
// stride 2, so there is none.
#include "common/depthwise_operators.h"
#include "cpu/conv2d.h"
#include "cpu/depthwise.h"
#include "cpu/dispatch.h"

namespace fastconv::cpu {
namespace {

// [channels, 1, R, S] as [R, S, channels]
Tensor taps_first(const Tensor& weight) {
  const Tensor from = NhwcDepthwise::in_compute_type(weight);
  const int64_t channels = weight.size(0), taps = weight.size(2) * weight.size(3);
  Tensor to = torch::stable::new_empty(from, {weight.size(2), weight.size(3), channels});
  const auto transpose = [&](auto element) {
    const auto* source = from.const_data_ptr<decltype(element)>();
    auto* target = to.mutable_data_ptr<decltype(element)>();
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t c = 0; c < channels; ++c) *target++ = source[c * taps + tap];
    }
  };
  from.scalar_type() == ScalarType::Double ? transpose(double{}) : transpose(float{});
  return to;
}

}  // namespace

bool nhwc_depthwise_takes(const Tensor& input, const Tensor& weight) {
  if (weight.size(0) != input.size(1) || input.numel() == 0) return false;
  const ScalarType dtype = input.scalar_type();
  return output_is_channels_last(input, weight) ||
         !onednn_computes(is_low_precision(dtype) ? ScalarType::Float : dtype);
}

Tensor NhwcDepthwise::in_compute_type(const Tensor& tensor) {
  return torch::stable::contiguous(is_low_precision(tensor.scalar_type()) ? torch::stable::to(tensor, ScalarType::Float)
                                                                          : tensor);
}

NhwcDepthwise::NhwcDepthwise(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                             const IntList& output_size, const ConvGeometry& geometry, Activation activation)
    : input(torch::stable::contiguous(input, MemoryFormat::ChannelsLast)),
      weight(taps_first(weight)),
      bias(bias ? std::optional(in_compute_type(*bias)) : std::nullopt),
      params{.input = this->input.const_data_ptr(),
             .weight = this->weight.const_data_ptr(),
             .bias = this->bias ? this->bias->const_data_ptr() : nullptr,
             .output = nullptr,
             .dtype = kernel_dtype(input),
             .batch = input.size(0),
             .channels = input.size(1),
             .height = input.size(2),
             .width = input.size(3),
             .filter_height = weight.size(2),
             .filter_width = weight.size(3),
             .out_height = output_size[2],
             .out_width = output_size[3],
             .stride_height = geometry.stride[0],
             .stride_width = geometry.stride[1],
             .padding_height = geometry.padding[0],
             .padding_width = geometry.padding[1],
             .dilation_height = geometry.dilation[0],
             .dilation_width = geometry.dilation[1],
             .activation = activation} {}

Tensor depthwise_convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                             const IntList& output_size, const ConvGeometry& geometry, Activation activation) {
  if (!nhwc_depthwise_takes(input, weight)) {
    return convolution(input, weight, bias, std::nullopt, output_size, geometry, activation);
  }
  NhwcDepthwise arguments(input, weight, bias, output_size, geometry, activation);
  DepthwiseConv2dParams& params = arguments.params;
  const Tensor output = empty_channels_last(input, output_size);
  params.output = output.mutable_data_ptr();
  const auto kernel = FASTCONV_KERNEL(depthwise_conv2d_fprop_nhwc);
  const int64_t bytes_per_pixel =
      params.channels * (params.filter_height * params.filter_width + 1) * static_cast<int64_t>(input.element_size());
  parallel_for(output.numel() / params.channels, bytes_per_pixel,
               [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
  if (!output_is_channels_last(input, weight)) return with_plain_strides(torch::stable::contiguous(output));
  return activation == Activation::kRelu ? with_plain_strides(output) : output;
}

}  // namespace fastconv::cpu

STABLE_TORCH_LIBRARY_IMPL(fastconv, CPU, m) {
  fastconv::DepthwiseOperators<fastconv::cpu::depthwise_convolution>::implement(m);
}
