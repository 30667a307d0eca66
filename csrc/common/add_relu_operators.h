// add_relu and its backward: arguments checked and brought into one form, for the sum of any backend.
#pragma once

#include "common/checks.h"

namespace fastconv {

// The functions of a backend:
//   Tensor kSum(input, other, activation), in the layout that eager's sum has
//   Tensor kActivationBackward(grad_output, output, activation)
template <auto kSum, auto kActivationBackward>
struct AddReluOperators {
  static Tensor add_relu(const Tensor& input, const Tensor& other, std::string activation) {
    constexpr auto kOp = "fastconv::add_relu";
    check(kOp, input, "other", other);
    return kSum(input, other, parse_activation(kOp, activation));
  }

  static Tensor add_relu_backward(const Tensor& grad_output, const Tensor& output, std::string activation) {
    constexpr auto kOp = "fastconv::add_relu_backward";
    check(kOp, output, "grad_output", grad_output);
    return kActivationBackward(grad_output, output, parse_activation(kOp, activation));
  }

  template <class Library>
  static void implement(Library& m) {
    m.impl("add_relu", TORCH_BOX(&add_relu));
    m.impl("add_relu_backward", TORCH_BOX(&add_relu_backward));
  }

 private:
  static void check(const char* op, const Tensor& input, const char* name, const Tensor& other) {
    check_floating(op, input);
    check_like_input(op, input, name, other);
    check_same_shape(op, input, name, other);
  }
};

}  // namespace fastconv
