// The operators that are a convolution with more or less around it: arguments checked and brought into one form, for
// the convolution of any backend.
#pragma once

#include "common/checks.h"

namespace fastconv {

// `kConvolution` is Tensor(input, weight, bias, residual, geometry, activation), as cpu/conv2d.h declares it.
template <auto kConvolution>
struct Conv2dOperators {
  static Tensor conv2d_relu(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                            IntList stride, IntList padding, IntList dilation, int64_t groups, std::string activation) {
    constexpr auto kOp = "fastconv::conv2d_relu";
    const ConvGeometry geometry{std::move(stride), std::move(padding), std::move(dilation), groups};
    check_conv2d(kOp, input, weight, bias, std::nullopt, geometry);
    return kConvolution(input, weight, bias, std::nullopt, geometry, parse_activation(kOp, activation));
  }

  static Tensor conv2d_add_relu(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                                const Tensor& residual, IntList stride, IntList padding, IntList dilation,
                                int64_t groups, std::string activation) {
    constexpr auto kOp = "fastconv::conv2d_add_relu";
    const ConvGeometry geometry{std::move(stride), std::move(padding), std::move(dilation), groups};
    check_conv2d(kOp, input, weight, bias, residual, geometry);
    return kConvolution(input, weight, bias, residual, geometry, parse_activation(kOp, activation));
  }

  static Tensor pointwise_conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                                 const std::optional<Tensor>& residual, IntList stride, std::string activation) {
    constexpr auto kOp = "fastconv::pointwise_conv2d";
    const ConvGeometry geometry{std::move(stride), {0, 0}, {1, 1}, 1};
    check_pointwise_weight(kOp, "weight", weight);
    check_conv2d(kOp, input, weight, bias, residual, geometry);
    return kConvolution(input, weight, bias, residual, geometry, parse_activation(kOp, activation));
  }
};

}  // namespace fastconv
