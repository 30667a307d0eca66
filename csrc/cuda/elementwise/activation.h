// The activations as passes of their own, for where no other kernel can take them along.
#pragma once

#include "common/stable.h"
#include "cuda/runtime/launcher.h"

namespace fastconv::cuda {

// grad_output where the activation let `output` through, else 0, in the layout of `output`
Tensor activation_backward(const Tensor& grad_output, const Tensor& output, Activation activation);

// tensor = activation(tensor); `tensor` is dense
void activation_inplace(const Tensor& tensor, Activation activation);

// output = activation(output + other), in place; `output` is dense, and rounding happens once
void add_activation_inplace(const Tensor& output, const Tensor& other, Activation activation);

}  // namespace fastconv::cuda
