// The dense convolution that the CPU kernels of several operators share.
#pragma once

#include "common/checks.h"
#include "common/layout.h"

namespace fastconv::cpu {

// Whether oneDNN has convolutions of this type for the running processor
bool onednn_computes(ScalarType dtype);

std::optional<Tensor> to_dtype(const std::optional<Tensor>& tensor, ScalarType dtype);

// activation(conv2d(input, weight) + bias [+ residual]), layout as eager's, or copied into `out`.
// Arguments are already checked.
Tensor convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& residual, const IntList& output_size, const ConvGeometry& geometry,
                   Activation activation, const std::optional<Tensor>& out = std::nullopt);

// Gradients of input, weight and bias for the gradient of the convolution's own output (the
// activation's mask already applied). An entry outside of the mask is empty.
std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& grad_output, const Tensor& input,
                                                        const Tensor& weight, const ConvGeometry& geometry,
                                                        std::array<bool, 3> mask);

// The same for the gradient of the activation's output; `output` is that output, and not looked at without an
// activation.
std::tuple<Tensor, Tensor, Tensor> activated_convolution_backward(const Tensor& grad_output,
                                                                  const std::optional<Tensor>& output,
                                                                  const Tensor& input, const Tensor& weight,
                                                                  const ConvGeometry& geometry, Activation activation,
                                                                  std::array<bool, 3> mask);

}  // namespace fastconv::cpu
