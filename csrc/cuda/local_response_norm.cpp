// local_response_norm and its backward on CUDA. The kernels take any dense tensor as it lies in memory: dimension 1
// splits it into what lies outside and inside of a channel's stride.
#include "cuda/kernels/local_response_norm.h"

#include "common/checks.h"
#include "common/layout.h"
#include "cuda/activation.h"
#include "cuda/register.h"

namespace fastconv::cuda {
namespace {

LocalResponseNormParams make_params(const char* op, Device& device, const Tensor& input, int64_t size, double alpha,
                                    double beta, double k, Activation activation) {
  const int64_t channels = input.size(1);
  STD_TORCH_CHECK(channels <= INT32_MAX, op, ": got ", channels, " channels, needed fewer than 2^31; split the tensor");
  LocalResponseNormParams params{};
  params.input = device.in(input);
  params.dtype = element_type(input);
  params.channels = static_cast<int>(channels);
  params.inner = channels > 1 ? input.stride(1) : input.numel();
  params.outer = input.numel() / (channels * params.inner);
  // A window that reaches further finds nothing more. Size 5 remains 5, for which there are kernels of its own.
  const int64_t reach = std::max<int64_t>(channels, 2);
  params.before = static_cast<int>(std::min(size / 2, reach));
  params.after = static_cast<int>(std::min((size - 1) / 2, reach));
  params.scale = alpha / static_cast<double>(size);
  params.beta = beta;
  params.k = k;
  params.activation = activation;
  params.multiprocessors = device.multiprocessors();
  return params;
}

Tensor local_response_norm(const Tensor& input, int64_t size, double alpha, double beta, double k,
                           std::string activation) {
  constexpr auto kOp = "fastconv::local_response_norm";
  const Activation kind = check_local_response_norm(kOp, input, size, activation);
  const Tensor x = to_dense(input);
  const Tensor output = x.is_contiguous() ? torch::stable::new_empty(x, x.sizes()) : torch::stable::empty_like(x);
  if (x.numel() == 0) return output;
  Device device(x);
  LocalResponseNormParams params = make_params(kOp, device, x, size, alpha, beta, k, kind);
  params.output = device.out(output);
  local_response_norm_fprop(params, device.stream());
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
  Device device(x);
  LocalResponseNormParams params = make_params(kOp, device, x, size, alpha, beta, k, kind);
  params.grad_output = device.in(grad);
  params.output = device.out(grad_input);
  std::optional<Tensor> workspace;
  if (const int64_t elements = local_response_norm_workspace(params)) {
    const ScalarType compute = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    workspace = torch::stable::new_empty(x, IntList{elements}, compute);
    params.workspace = device.scratch(*workspace);
  }
  local_response_norm_dgrad(params, device.stream());
  return grad_input;
}

}  // namespace
}  // namespace fastconv::cuda

FASTCONV_CUDA_LIBRARY(m) {
  m.impl("local_response_norm", TORCH_BOX(&fastconv::cuda::local_response_norm));
  m.impl("local_response_norm_backward", TORCH_BOX(&fastconv::cuda::local_response_norm_backward));
}
