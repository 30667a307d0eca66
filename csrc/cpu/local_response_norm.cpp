// local_response_norm and its backward on the CPU. Dimension 1 of a dense tensor splits it into what lies outside and
// inside of a channel's stride.
#include "cpu/kernels/local_response_norm.h"

#include "common/local_response_norm_operators.h"
#include "cpu/dispatch.h"

namespace fastconv::cpu {
namespace {

LocalResponseNormParams make_params(const Tensor& input, const Tensor* grad_output, const Tensor& output,
                                    const LocalResponseNormSettings& settings) {
  LocalResponseNormParams params{};
  params.input = input.const_data_ptr();
  params.grad_output = grad_output ? grad_output->const_data_ptr() : nullptr;
  params.output = output.mutable_data_ptr();
  params.dtype = kernel_dtype(input);
  params.channels = input.size(1);
  params.inner = params.channels > 1 ? input.stride(1) : input.numel();
  params.before = std::min(settings.size / 2, params.channels);
  params.after = std::min((settings.size - 1) / 2, params.channels);
  params.scale = settings.alpha / static_cast<double>(settings.size);
  params.beta = settings.beta;
  params.k = settings.k;
  params.activation = settings.activation;
  return params;
}

void forward(const char*, const Tensor& input, const Tensor& output, const LocalResponseNormSettings& settings) {
  const auto params = make_params(input, nullptr, output, settings);
  const auto kernel = FASTCONV_KERNEL(local_response_norm_fprop);
  parallel_for(input.numel() / params.channels, 2 * params.channels * input.element_size(),
               [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
}

void backward(const char*, const Tensor& grad_output, const Tensor& input, const Tensor& grad_input,
              const LocalResponseNormSettings& settings) {
  const auto params = make_params(input, &grad_output, grad_input, settings);
  const auto kernel = FASTCONV_KERNEL(local_response_norm_dgrad);
  parallel_for(input.numel() / params.channels, 3 * params.channels * input.element_size(),
               [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
}

}  // namespace
}  // namespace fastconv::cpu

STABLE_TORCH_LIBRARY_IMPL(fastconv, CPU, m) {
  fastconv::LocalResponseNormOperators<fastconv::cpu::forward, fastconv::cpu::backward>::implement(m);
}
