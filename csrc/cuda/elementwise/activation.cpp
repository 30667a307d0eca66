#include "cuda/elementwise/activation.h"

#include "common/layout.h"
#include "cuda/elementwise/elementwise.h"

namespace fastconv::cuda {

Tensor activation_backward(const Tensor& grad_output, const Tensor& output, Activation activation) {
  const Tensor mask = to_dense(output);
  const Tensor result = torch::stable::empty_like(mask);
  elementwise(Elementwise::kMask, grad_output, mask, result, activation);
  return result;
}

void activation_inplace(const Tensor& tensor, Activation activation) {
  if (activation != Activation::kNone) elementwise(Elementwise::kActivate, tensor, tensor, tensor, activation);
}

void add_activation_inplace(const Tensor& output, const Tensor& other, Activation activation) {
  elementwise(Elementwise::kAdd, output, other, output, activation);
}

}  // namespace fastconv::cuda
