// add_relu and its backward on the CPU, in one pass over memory each.
#include "common/checks.h"
#include "cpu/activation.h"
#include "cpu/dispatch.h"

namespace fastconv::cpu {
namespace {

// What input + other allocates for tensors of one layout
Tensor allocate_like(const Tensor& input) {
  return input.is_contiguous() ? torch::stable::new_empty(input, input.sizes()) : torch::stable::empty_like(input);
}

Tensor add_relu(const Tensor& input, const Tensor& other, std::string activation) {
  constexpr auto kOp = "fastconv::add_relu";
  check_floating(kOp, input);
  check_like_input(kOp, input, "other", other);
  check_same_shape(kOp, input, "other", other);
  const Activation kind = parse_activation(kOp, activation);
  if (input.strides().equals(other.strides()) && is_dense(input)) {
    const Tensor output = allocate_like(input);
    add_activation(input, other, output, kind);
    return output;
  }
  // torch chooses the layout of the result when the layouts differ.
  const Tensor output = torch::stable::subtract(input, other, -1.0);
  activation_inplace(output, kind);
  return output;
}

Tensor add_relu_backward(const Tensor& grad_output, const Tensor& output, std::string activation) {
  constexpr auto kOp = "fastconv::add_relu_backward";
  check_floating(kOp, output);
  check_like_input(kOp, output, "grad_output", grad_output);
  check_same_shape(kOp, output, "grad_output", grad_output);
  return activation_backward(grad_output, output, parse_activation(kOp, activation));
}

}  // namespace
}  // namespace fastconv::cpu

STABLE_TORCH_LIBRARY_IMPL(fastconv, CPU, m) {
  m.impl("add_relu", TORCH_BOX(&fastconv::cpu::add_relu));
  m.impl("add_relu_backward", TORCH_BOX(&fastconv::cpu::add_relu_backward));
}
