// torch's own convolutions, for what our kernels leave alone
#pragma once

#include "common/checks.h"
#include "common/layout.h"

namespace fastconv {

inline Tensor aten_convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                               const ConvGeometry& geometry) {
  return call<Tensor>("aten::convolution", "", input, weight, bias, geometry.stride, geometry.padding,
                      geometry.dilation, false, IntList{0, 0}, geometry.groups);
}

// Gradients of input, weight and bias; those outside of the mask are empty.
inline std::tuple<Tensor, Tensor, Tensor> aten_convolution_backward(const Tensor& grad, const Tensor& input,
                                                                    const Tensor& weight, const ConvGeometry& geometry,
                                                                    std::array<bool, 3> mask) {
  auto [grad_input, grad_weight, grad_bias] = call<std::tuple<Tensor, Tensor, Tensor>>(
      "aten::convolution_backward", "", grad, input, weight, std::optional<IntList>(IntList{weight.size(0)}),
      geometry.stride, geometry.padding, geometry.dilation, false, IntList{0, 0}, geometry.groups,
      torch::headeronly::HeaderOnlyArrayRef<bool>(mask.data(), mask.size()));
  return {mask[0] ? grad_input : empty_gradient(input), mask[1] ? grad_weight : empty_gradient(input),
          mask[2] ? grad_bias : empty_gradient(input)};
}

}  // namespace fastconv
