// Several 1x1 convolutions of one input on CUDA, in one launch each way.
#include "common/conv2d_operators.h"
#include "cuda/conv2d.h"
#include "cuda/register.h"

namespace fastconv::cuda {
namespace {

std::vector<Tensor> pointwise_conv2d_group(const std::optional<std::vector<Tensor>>& out, const Tensor& input,
                                           std::vector<Tensor> weights, std::vector<Tensor> biases,
                                           std::string activation) {
  constexpr auto kOp = "fastconv::pointwise_conv2d_group";
  const Activation kind = parse_activation(kOp, activation);
  check_pointwise_group(kOp, input, weights, biases);
  if (out) check_pointwise_group_destinations(kOp, *out, input, weights, biases);
  return convolution_group(input, weights, biases, kind, out);
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> pointwise_conv2d_group_backward(
    std::vector<Tensor> grad_outputs, std::vector<Tensor> outputs, const Tensor& input, std::vector<Tensor> weights,
    std::string activation, std::vector<bool> output_mask) {
  constexpr auto kOp = "fastconv::pointwise_conv2d_group_backward";
  check_output_mask(kOp, output_mask, 3);
  const Activation kind = parse_activation(kOp, activation);
  check_pointwise_group_backward(kOp, grad_outputs, outputs, input, weights, kind);
  auto found = convolution_group_backward(grad_outputs, outputs, input, weights, kind,
                                          {output_mask[0], output_mask[1], output_mask[2]});
  return {found.input, found.weights, found.biases};
}

}  // namespace
}  // namespace fastconv::cuda

FASTCONV_CUDA_LIBRARY(m) {
  using Forward = fastconv::Overloads<&fastconv::cuda::pointwise_conv2d_group>;
  m.impl("pointwise_conv2d_group", TORCH_BOX(&Forward::functional));
  m.impl("pointwise_conv2d_group.out", TORCH_BOX(&Forward::out));
  m.impl("pointwise_conv2d_group_backward", TORCH_BOX(&fastconv::cuda::pointwise_conv2d_group_backward));
}
