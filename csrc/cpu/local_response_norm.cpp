// local_response_norm and its backward on the CPU. The kernels take any dense tensor as it lies in
// memory: dimension 1 splits it into what lies outside and inside of a channel's stride.
#include "cpu/kernels/local_response_norm.h"

#include "common/checks.h"
#include "cpu/dispatch.h"

namespace fastconv::cpu {
namespace {

LocalResponseNormParams make_params(const Tensor& input, const Tensor* grad_output, const Tensor& output, int64_t size,
                                    double alpha, double beta, double k, Activation activation) {
  LocalResponseNormParams params{};
  params.input = input.const_data_ptr();
  params.grad_output = grad_output ? grad_output->const_data_ptr() : nullptr;
  params.output = output.mutable_data_ptr();
  params.dtype = kernel_dtype(input);
  params.channels = input.size(1);
  params.inner = params.channels > 1 ? input.stride(1) : input.numel();
  params.before = std::min(size / 2, params.channels);
  params.after = std::min((size - 1) / 2, params.channels);
  params.scale = alpha / static_cast<double>(size);
  params.beta = beta;
  params.k = k;
  params.activation = activation;
  return params;
}

Tensor local_response_norm(const Tensor& input, int64_t size, double alpha, double beta, double k,
                           std::string activation) {
  const Activation kind = check_local_response_norm("fastconv::local_response_norm", input, size, activation);
  const Tensor x = to_dense(input);
  const Tensor output = x.is_contiguous() ? torch::stable::new_empty(x, x.sizes()) : torch::stable::empty_like(x);
  if (x.numel() == 0) return output;
  const auto params = make_params(x, nullptr, output, size, alpha, beta, k, kind);
  const auto kernel = FASTCONV_KERNEL(local_response_norm_fprop);
  parallel_for(x.numel() / params.channels, 2 * params.channels * x.element_size(),
               [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
  return output;
}

Tensor local_response_norm_backward(const Tensor& grad_output, const Tensor& input, int64_t size, double alpha,
                                    double beta, double k, std::string activation) {
  constexpr auto kOp = "fastconv::local_response_norm_backward";
  const Activation kind = check_local_response_norm(kOp, input, size, activation);
  check_like_input(kOp, input, "grad_output", grad_output);
  check_same_shape(kOp, input, "grad_output", grad_output);
  const Tensor x = to_dense(input);
  const Tensor grad_input = torch::stable::empty_like(x);
  if (x.numel() == 0) return grad_input;
  const Tensor grad = with_layout_of(x, grad_output);
  const auto params = make_params(x, &grad, grad_input, size, alpha, beta, k, kind);
  const auto kernel = FASTCONV_KERNEL(local_response_norm_dgrad);
  parallel_for(x.numel() / params.channels, 3 * params.channels * x.element_size(),
               [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
  return grad_input;
}

}  // namespace
}  // namespace fastconv::cpu

STABLE_TORCH_LIBRARY_IMPL(fastconv, CPU, m) {
  m.impl("local_response_norm", TORCH_BOX(&fastconv::cpu::local_response_norm));
  m.impl("local_response_norm_backward", TORCH_BOX(&fastconv::cpu::local_response_norm_backward));
}
