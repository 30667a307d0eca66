#pragma once

#include "cpu/kernels/kernel.h"

namespace fastconv {

// Each works on the elements begin ... end - 1 of dense tensors.
struct ActivationParams {
  const void* input;
  const void* other;  // add_activation: the summand; activation_dgrad: the activation's output;
                      // activation: unused
  void* output;       // may be either of the two
  DType dtype;
  Activation activation;
};

// output = activation(input)
FASTCONV_DECLARE_KERNEL(void, activation_fprop, const ActivationParams& params, int64_t begin, int64_t end)
// output = activation(input + other)
FASTCONV_DECLARE_KERNEL(void, add_activation_fprop, const ActivationParams& params, int64_t begin, int64_t end)
// output = input where the activation let `other` through, else 0
FASTCONV_DECLARE_KERNEL(void, activation_dgrad, const ActivationParams& params, int64_t begin, int64_t end)

}  // namespace fastconv
