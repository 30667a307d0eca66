// add_relu and its backward on the CPU, in one pass over memory each.
#include "common/add_relu_operators.h"
#include "cpu/activation.h"
#include "cpu/dispatch.h"

namespace fastconv::cpu {
namespace {

// What input + other allocates for tensors of one layout
Tensor allocate_like(const Tensor& input) {
  return input.is_contiguous() ? torch::stable::new_empty(input, input.sizes()) : torch::stable::empty_like(input);
}

Tensor sum(const Tensor& input, const Tensor& other, Activation activation) {
  if (input.strides().equals(other.strides()) && is_dense(input)) {
    const Tensor output = allocate_like(input);
    add_activation(input, other, output, activation);
    return output;
  }
  // torch chooses the layout of the result when the layouts differ.
  const Tensor output = torch::stable::subtract(input, other, -1.0);
  activation_inplace(output, activation);
  return output;
}

}  // namespace
}  // namespace fastconv::cpu

STABLE_TORCH_LIBRARY_IMPL(fastconv, CPU, m) {
  fastconv::AddReluOperators<fastconv::cpu::sum, fastconv::cpu::activation_backward>::implement(m);
}
