#include "cpu/activation.h"

#include "cpu/dispatch.h"
#include "cpu/kernels/activation.h"

namespace fastconv::cpu {

Tensor activation_backward(const Tensor& grad_output, const Tensor& output, Activation activation) {
  const Tensor mask = to_dense(output);
  const Tensor grad = with_layout_of(mask, grad_output);
  const Tensor result = torch::stable::empty_like(mask);
  const ActivationParams params{grad.const_data_ptr(), mask.const_data_ptr(), result.mutable_data_ptr(),
                                kernel_dtype(mask), activation};
  const auto kernel = FASTCONV_KERNEL(activation_dgrad);
  parallel_for(mask.numel(), 3 * mask.element_size(), [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
  return result;
}

void activation_inplace(const Tensor& tensor, Activation activation) {
  if (activation == Activation::kNone) return;
  void* const data = tensor.mutable_data_ptr();
  const ActivationParams params{data, nullptr, data, kernel_dtype(tensor), activation};
  const auto kernel = FASTCONV_KERNEL(activation_fprop);
  parallel_for(tensor.numel(), 2 * tensor.element_size(),
               [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
}

void add_activation(const Tensor& input, const Tensor& other, const Tensor& output, Activation activation) {
  const ActivationParams params{input.const_data_ptr(), other.const_data_ptr(), output.mutable_data_ptr(),
                                kernel_dtype(output), activation};
  const auto kernel = FASTCONV_KERNEL(add_activation_fprop);
  parallel_for(output.numel(), 3 * output.element_size(),
               [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
}

void add_activation_inplace(const Tensor& output, const Tensor& other, Activation activation) {
  add_activation(output, with_layout_of(output, other), output, activation);
}

}  // namespace fastconv::cpu
