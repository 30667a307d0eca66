// The dense convolution that several operators share. Arguments are already checked.
#pragma once

#include "common/checks.h"

namespace fastconv::cuda {

// Whether convolutions of this tensor round their factors to TF32: torch's switch, for float32. It is on by default.
bool allows_tf32(const Tensor& input);

// activation(conv2d(input, weight) + bias [+ residual]), layout as eager's, or in `out`
Tensor convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& residual, const IntList& output_size, const ConvGeometry& geometry,
                   Activation activation, const std::optional<Tensor>& out = std::nullopt);

// Gradients of input, weight and bias, for the gradient of the activation's output; `output` is that output, and not
// looked at without an activation. An entry outside of the mask is empty.
std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& grad_output, const std::optional<Tensor>& output,
                                                        const Tensor& input, const Tensor& weight,
                                                        const ConvGeometry& geometry, Activation activation,
                                                        std::array<bool, 3> mask);

}  // namespace fastconv::cuda
