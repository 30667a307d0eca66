// Several 1x1 convolutions of one input on the CPU, where the second branch finds the input in the
// cache. The backward joins the branches' gradients, so that one convolution sums over all of them.
#include "common/pointwise_conv2d_group_operators.h"
#include "cpu/activation.h"
#include "cpu/conv2d.h"

namespace fastconv::cpu {
namespace {

std::vector<Tensor> forward(const Tensor& input, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                            const std::vector<IntList>& sizes, Activation activation,
                            const std::optional<std::vector<Tensor>>& out) {
  std::vector<Tensor> outputs;
  for (size_t i = 0; i < weights.size(); ++i) {
    outputs.push_back(convolution(input, weights[i], entry(biases, i), std::nullopt, sizes[i], kPointwise, activation,
                                  entry(out, i)));
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

GroupGradients backward(std::vector<Tensor> grad_outputs, const std::vector<Tensor>& outputs, const Tensor& input,
                        const std::vector<Tensor>& weights, Activation activation, std::array<bool, 3> mask) {
  if (activation != Activation::kNone) {
    for (size_t i = 0; i < weights.size(); ++i) {
      grad_outputs[i] = activation_backward(grad_outputs[i], outputs[i], activation);
    }
  }
  const Tensor grad = call<Tensor>("aten::cat", "", grad_outputs, int64_t{1});
  const Tensor weight = call<Tensor>("aten::cat", "", weights, int64_t{0});
  auto [grad_input, grad_weight, grad_bias] = convolution_backward(grad, input, weight, kPointwise, mask);
  auto grad_weights = split_like(grad_weight, mask[1], weights);
  if (input.numel() == 0 && mask[1]) {  // eager's zeros lie as the weights do
    for (size_t i = 0; i < weights.size(); ++i) grad_weights[i] = with_layout_of(weights[i], grad_weights[i]);
  }
  return {grad_input, grad_weights, split_like(grad_bias, mask[2], weights)};
}

}  // namespace
}  // namespace fastconv::cpu

STABLE_TORCH_LIBRARY_IMPL(fastconv, CPU, m) {
  using namespace fastconv::cpu;
  fastconv::PointwiseConv2dGroupOperators<forward, backward>::implement(m);
}
