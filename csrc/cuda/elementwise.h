// From tensors to the kernels of kernels/add_relu.h.
#pragma once

#include "cuda/device.h"
#include "cuda/kernels/add_relu.h"

namespace fastconv::cuda {

// Runs the operation; `output` is dense, the others have its shape. `input` may be the output.
void elementwise(Elementwise operation, const Tensor& input, const Tensor& other, const Tensor& output,
                 Activation activation);

}  // namespace fastconv::cuda
