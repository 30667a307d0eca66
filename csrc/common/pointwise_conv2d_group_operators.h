// Several 1x1 convolutions of one input: arguments checked and brought into one form, for the convolutions of any
// backend.
#pragma once

#include "common/checks.h"
#include "common/conv2d_operators.h"

namespace fastconv {

struct GroupGradients {
  Tensor input;
  std::vector<Tensor> weights, biases;
};

// The functions of a backend:
//   vector of Tensor kForward(input, weights, biases, output_sizes, activation, out)
//   GroupGradients kBackward(grad_outputs, outputs, input, weights, activation, mask)
// There are as many biases as weights, or none.
template <auto kForward, auto kBackward>
struct PointwiseConv2dGroupOperators {
  static std::vector<Tensor> pointwise_conv2d_group(const std::optional<std::vector<Tensor>>& out, const Tensor& input,
                                                    std::vector<Tensor> weights, std::vector<Tensor> biases,
                                                    std::string activation) {
    constexpr auto kOp = "fastconv::pointwise_conv2d_group";
    const Activation kind = parse_activation(kOp, activation);
    const std::vector<IntList> sizes = check_pointwise_group(kOp, input, weights, biases);
    if (out) check_pointwise_group_destinations(kOp, *out, sizes, input, weights, biases);
    return kForward(input, weights, biases, sizes, kind, out);
  }

  static std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> pointwise_conv2d_group_backward(
      std::vector<Tensor> grad_outputs, std::vector<Tensor> outputs, const Tensor& input, std::vector<Tensor> weights,
      std::string activation, std::vector<bool> output_mask) {
    constexpr auto kOp = "fastconv::pointwise_conv2d_group_backward";
    check_output_mask(kOp, output_mask, 3);
    const Activation kind = parse_activation(kOp, activation);
    check_pointwise_group_backward(kOp, grad_outputs, outputs, input, weights, kind);
    const std::array<bool, 3> mask{output_mask[0], output_mask[1], output_mask[2]};
    GroupGradients found = kBackward(std::move(grad_outputs), outputs, input, weights, kind, mask);
    return {found.input, found.weights, found.biases};
  }

  template <class Library>
  static void implement(Library& m) {
    using Forward = Overloads<&pointwise_conv2d_group>;
    m.impl("pointwise_conv2d_group", TORCH_BOX(&Forward::functional));
    m.impl("pointwise_conv2d_group.out", TORCH_BOX(&Forward::out));
    m.impl("pointwise_conv2d_group_backward", TORCH_BOX(&pointwise_conv2d_group_backward));
  }
};

}  // namespace fastconv
