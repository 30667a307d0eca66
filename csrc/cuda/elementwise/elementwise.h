// From tensors to the elementwise kernels.
#pragma once

#include "common/stable.h"
#include "cuda/elementwise/params.h"

namespace fastconv::cuda {

// Runs the operation; `output` is dense, the others have its shape. `input` may be the output.
void elementwise(Elementwise operation, const Tensor& input, const Tensor& other, const Tensor& output,
                 Activation activation);

}  // namespace fastconv::cuda
