// conv2d_relu, conv2d_add_relu, pointwise_conv2d and their backward on the CPU.
//
// The convolution itself is oneDNN's, through torch's own fused operators, which take bias and
// residual in the epilogue. Where oneDNN has no kernel for a 16-bit type on this processor, torch
// falls back to a slow one; here such tensors are computed in fp32 and rounded once instead (10 to
// 70 times faster on an AVX2 machine, and at least as exact). So are the few shapes for which oneDNN's
// 16-bit kernels fail. float64 and a torch without oneDNN go through aten::convolution. None of these
// writes into a tensor of the caller's: `out` is copied to.
#include "cpu/conv2d.h"

#include "common/aten.h"
#include "common/conv2d_operators.h"
#include "cpu/activation.h"

namespace fastconv::cpu {
namespace {

bool torch_has(const char* query) {
  StableIValue answer[1];
  return torch_call_dispatcher(query, "", answer, TORCH_ABI_VERSION) == 0 && torch::stable::detail::to<bool>(answer[0]);
}

}  // namespace

// torch without oneDNN has neither the queries nor the fused operators.
bool onednn_computes(ScalarType dtype) {
  static const bool bf16 = torch_has("mkldnn::_is_mkldnn_bf16_supported");
  static const bool fp16 = torch_has("mkldnn::_is_mkldnn_fp16_supported");
  static const bool fp32 = [] {
    StableIValue answer[1];
    return torch_call_dispatcher("mkldnn::_is_mkldnn_bf16_supported", "", answer, TORCH_ABI_VERSION) == 0;
  }();
  switch (dtype) {
    case ScalarType::Float:
      return fp32;
    case ScalarType::BFloat16:
      return bf16;
    case ScalarType::Half:
      return fp16;
    default:
      return false;
  }
}

std::optional<Tensor> to_dtype(const std::optional<Tensor>& tensor, ScalarType dtype) {
  return tensor ? std::optional(torch::stable::to(*tensor, dtype)) : std::nullopt;
}

namespace {

std::optional<Tensor> dense(const std::optional<Tensor>& bias) {
  return bias ? std::optional(torch::stable::contiguous(*bias)) : std::nullopt;
}

// conv2d(input, weight) + bias [+ residual]. The fused operators ignore a bias's stride. oneDNN
// could take ReLU along, too, but its ReLU turns NaN into 0, which would hide a diverged training
// run.
Tensor onednn_convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                          const std::optional<Tensor>& residual, const ConvGeometry& geometry) {
  const torch::headeronly::HeaderOnlyArrayRef<double> no_scalars;
  if (residual) {
    return call<Tensor>("mkldnn::_convolution_pointwise", "binary", input, *residual, weight, dense(bias),
                        geometry.padding, geometry.stride, geometry.dilation, geometry.groups, std::string("add"),
                        std::nullopt, std::nullopt, no_scalars, std::nullopt);
  }
  return call<Tensor>("mkldnn::_convolution_pointwise", "", input, weight, dense(bias), geometry.padding,
                      geometry.stride, geometry.dilation, geometry.groups, std::string("none"), no_scalars,
                      std::nullopt);
}

Tensor without_onednn(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                      const std::optional<Tensor>& residual, const ConvGeometry& geometry, Activation activation) {
  const Tensor output = aten_convolution(input, weight, bias, geometry);
  if (residual) {
    add_activation_inplace(output, *residual, activation);
  } else {
    activation_inplace(output, activation);
  }
  return residual || activation == Activation::kRelu ? with_plain_strides(output) : output;
}

// Whether some tap of the filter meets some row of the image, and not the padding alone.
bool meets_a_row(int64_t height, int64_t rows, int64_t output_height, const ConvGeometry& geometry) {
  const int64_t stride = geometry.stride[0];
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t start = row * geometry.dilation[0] - geometry.padding[0];
    const int64_t first =
        start >= 0 ? 0 : (-start + stride - 1) / stride;  // the output's row whose tap is in the image
    if (first < output_height && start + first * stride < height) return true;
  }
  return false;
}

// Whether a 16-bit convolution is left to oneDNN's kernels for float32: there are none for its type, or they fail for
// its shape (seen with torch 2.14). In bfloat16 results are wrong where the filter's step is over 1 and the output has
// a single column, weight gradients where the step is longer than the image; and the process ends where all rows of a
// dilated filter meet padding alone.
bool through_fp32(const Tensor& input, const Tensor& weight, int64_t output_height, int64_t output_width,
                  const ConvGeometry& geometry) {
  const ScalarType dtype = input.scalar_type();
  if (!is_low_precision(dtype)) return false;
  if (!onednn_computes(dtype)) return true;
  if (dtype != ScalarType::BFloat16) return false;
  const int64_t step = geometry.stride[1];
  return (step > 1 && output_width == 1) || step > input.size(3) ||
         (geometry.dilation[0] > 1 && !meets_a_row(input.size(2), weight.size(2), output_height, geometry));
}

// A single tap has no neighbour to keep away from, but oneDNN's 16-bit kernels end the process over its dilation (seen
// with torch 2.14).
ConvGeometry without_idle_dilation(const Tensor& weight, ConvGeometry geometry) {
  for (int axis : {0, 1}) {
    if (weight.size(axis + 2) == 1) geometry.dilation[axis] = 1;
  }
  return geometry;
}

// A single channels_last image with a stride of the batch that leads out of it, which an unbatched one lacks. aten's
// float64 gradient of a channels_last weight of several groups is wrong without it (seen with torch 2.14).
Tensor with_whole_batch_stride(const Tensor& image) {
  const auto sizes = image.sizes(), strides = image.strides();
  const int64_t extent = std::max({sizes[1] * strides[1], sizes[2] * strides[2], sizes[3] * strides[3]});
  if (sizes[0] != 1 || strides[0] >= extent) return image;
  return call<Tensor>("aten::as_strided", "", image, IntList(sizes.begin(), sizes.end()),
                      IntList{extent, strides[1], strides[2], strides[3]}, std::optional<int64_t>());
}

// The gradient of the bias. aten adds in pairs, oneDNN one pixel after the other: ten times the
// rounding error.
Tensor sum_over_pixels(const Tensor& grad) {
  return call<Tensor>("aten::sum", "dim_IntList", grad, std::optional<IntList>(IntList{0, 2, 3}), false,
                      std::optional<ScalarType>());
}

Tensor new_convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                       const std::optional<Tensor>& residual, const IntList& size, const ConvGeometry& given,
                       Activation activation) {
  const ScalarType dtype = input.scalar_type();
  const ConvGeometry geometry = without_idle_dilation(weight, given);
  const bool in_fp32 = through_fp32(input, weight, size[2], size[3], geometry);
  if (input.numel() == 0 || !(onednn_computes(dtype) || in_fp32)) {
    return without_onednn(input, weight, bias, residual, geometry, activation);
  }
  constexpr ScalarType kFp32 = ScalarType::Float;
  // Rounding first lets the activation pass over half of the bytes; it changes neither sign nor
  // order.
  const Tensor output =
      in_fp32 ? torch::stable::to(onednn_convolution(torch::stable::to(input, kFp32), torch::stable::to(weight, kFp32),
                                                     to_dtype(bias, kFp32), to_dtype(residual, kFp32), geometry),
                                  dtype)
              : onednn_convolution(input, weight, bias, residual, geometry);
  activation_inplace(output, activation);
  return residual || activation == Activation::kRelu ? with_plain_strides(output) : output;
}

}  // namespace

Tensor convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& residual, const IntList& output_size, const ConvGeometry& geometry,
                   Activation activation, const std::optional<Tensor>& out) {
  return stored(new_convolution(input, weight, bias, residual, output_size, geometry, activation), out);
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& grad_output, const Tensor& input,
                                                        const Tensor& weight, const ConvGeometry& given,
                                                        std::array<bool, 3> mask) {
  const ScalarType dtype = input.scalar_type();
  const ConvGeometry geometry = without_idle_dilation(weight, given);
  if (through_fp32(input, weight, grad_output.size(2), grad_output.size(3), geometry)) {
    constexpr ScalarType kCompute = ScalarType::Float;
    auto [grad_input, grad_weight, grad_bias] =
        convolution_backward(torch::stable::to(grad_output, kCompute), torch::stable::to(input, kCompute),
                             torch::stable::to(weight, kCompute), geometry, mask);
    return {torch::stable::to(grad_input, dtype), torch::stable::to(grad_weight, dtype),
            torch::stable::to(grad_bias, dtype)};
  }
  const bool strict = dtype == ScalarType::Double && geometry.groups > 1 && has_channels_last_strides(weight);
  const Tensor image = strict ? with_whole_batch_stride(input) : input;
  auto [grad_input, grad_weight, no_bias] =
      aten_convolution_backward(grad_output, image, weight, geometry, {mask[0], mask[1], false});
  return {grad_input, grad_weight, mask[2] ? sum_over_pixels(grad_output) : no_bias};
}

std::tuple<Tensor, Tensor, Tensor> activated_convolution_backward(const Tensor& grad_output,
                                                                  const std::optional<Tensor>& output,
                                                                  const Tensor& input, const Tensor& weight,
                                                                  const ConvGeometry& geometry, Activation activation,
                                                                  std::array<bool, 3> mask) {
  const bool plain = activation == Activation::kNone;
  const Tensor grad = plain ? grad_output : activation_backward(grad_output, *output, activation);
  return convolution_backward(grad, input, weight, geometry, mask);
}

}  // namespace fastconv::cpu

STABLE_TORCH_LIBRARY_IMPL(fastconv, CPU, m) {
  using namespace fastconv::cpu;
  fastconv::Conv2dOperators<convolution, activated_convolution_backward, activation_backward>::implement(m);
}
