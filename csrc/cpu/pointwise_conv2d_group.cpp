// Several 1x1 convolutions of one input on the CPU, where the second branch finds the input in the
// cache. The backward joins the branches' gradients, so that one convolution sums over all of them.
#include "common/conv2d_operators.h"
#include "cpu/activation.h"
#include "cpu/conv2d.h"

namespace fastconv::cpu {
namespace {

std::vector<Tensor> pointwise_conv2d_group(const std::optional<std::vector<Tensor>>& out, const Tensor& input,
                                           std::vector<Tensor> weights, std::vector<Tensor> biases,
                                           std::string activation) {
  constexpr auto kOp = "fastconv::pointwise_conv2d_group";
  const Activation kind = parse_activation(kOp, activation);
  check_pointwise_group(kOp, input, weights, biases);
  if (out) check_pointwise_group_destinations(kOp, *out, input, weights, biases);
  std::vector<Tensor> outputs;
  for (size_t i = 0; i < weights.size(); ++i) {
    outputs.push_back(convolution(input, weights[i], entry(biases, i), std::nullopt, kPointwise, kind, entry(out, i)));
  }
  return outputs;
}

// The gradients of `parts` from that of all of them joined in dimension 0: copies, as an operator's
// results may not share memory, or empty ones where there is none.
std::vector<Tensor> split_like(Tensor joined, bool wanted, const std::vector<Tensor>& parts) {
  std::vector<Tensor> gradients;
  int64_t start = 0;
  for (const Tensor& part : parts) {
    gradients.push_back(wanted ? torch::stable::clone(torch::stable::narrow(joined, 0, start, part.size(0)))
                               : empty_gradient(joined));
    start += part.size(0);
  }
  return gradients;
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> pointwise_conv2d_group_backward(
    std::vector<Tensor> grad_outputs, std::vector<Tensor> outputs, const Tensor& input, std::vector<Tensor> weights,
    std::string activation, std::vector<bool> output_mask) {
  constexpr auto kOp = "fastconv::pointwise_conv2d_group_backward";
  check_output_mask(kOp, output_mask, 3);
  const Activation kind = parse_activation(kOp, activation);
  check_pointwise_group_backward(kOp, grad_outputs, outputs, input, weights, kind);
  if (kind != Activation::kNone) {
    for (size_t i = 0; i < weights.size(); ++i) {
      grad_outputs[i] = activation_backward(grad_outputs[i], outputs[i], kind);
    }
  }
  const Tensor grad = call<Tensor>("aten::cat", "", grad_outputs, int64_t{1});
  const Tensor weight = call<Tensor>("aten::cat", "", weights, int64_t{0});
  auto [grad_input, grad_weight, grad_bias] =
      convolution_backward(grad, input, weight, kPointwise, {output_mask[0], output_mask[1], output_mask[2]});
  auto grad_weights = split_like(grad_weight, output_mask[1], weights);
  if (input.numel() == 0 && output_mask[1]) {  // eager's zeros lie as the weights do
    for (size_t i = 0; i < weights.size(); ++i) grad_weights[i] = with_layout_of(weights[i], grad_weights[i]);
  }
  return {grad_input, grad_weights, split_like(grad_bias, output_mask[2], weights)};
}

}  // namespace
}  // namespace fastconv::cpu

STABLE_TORCH_LIBRARY_IMPL(fastconv, CPU, m) {
  using Forward = fastconv::Overloads<&fastconv::cpu::pointwise_conv2d_group>;
  m.impl("pointwise_conv2d_group", TORCH_BOX(&Forward::functional));
  m.impl("pointwise_conv2d_group.out", TORCH_BOX(&Forward::out));
  m.impl("pointwise_conv2d_group_backward", TORCH_BOX(&fastconv::cpu::pointwise_conv2d_group_backward));
}
