// local_response_norm and its backward on CUDA. The kernels take any dense tensor as it lies in memory: dimension 1
// splits it into what lies outside and inside of a channel's stride.
#include "common/local_response_norm_operators.h"
#include "cuda/elementwise/activation.h"
#include "cuda/local_response_norm/plan.h"
#include "cuda/runtime/device.h"
#include "cuda/runtime/register.h"

namespace fastconv::cuda {
namespace {

LocalResponseNormParams make_params(const char* op, Device& device, const Tensor& input,
                                    const LocalResponseNormSettings& settings) {
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
  params.before = static_cast<int>(std::min(settings.size / 2, reach));
  params.after = static_cast<int>(std::min((settings.size - 1) / 2, reach));
  const double scale = settings.alpha / static_cast<double>(settings.size);
  params.coefficients = {scale, settings.k, settings.beta, 2 * scale * settings.beta};
  params.activation = settings.activation;
  return params;
}

void forward(const char* op, const Tensor& input, const Tensor& output, const LocalResponseNormSettings& settings) {
  Device device(input);
  LocalResponseNormParams params = make_params(op, device, input, settings);
  params.output = device.out(output);
  LrnPlan plan = plan_local_response_norm(false, params, device.info());
  launch_local_response_norm(plan, nullptr, device.stream());
}

void backward(const char* op, const Tensor& grad_output, const Tensor& input, const Tensor& grad_input,
              const LocalResponseNormSettings& settings) {
  Device device(input);
  LocalResponseNormParams params = make_params(op, device, input, settings);
  params.grad_output = device.in(grad_output);
  params.output = device.out(grad_input);
  LrnPlan plan = plan_local_response_norm(true, params, device.info());
  std::optional<Tensor> workspace;
  if (plan.workspace > 0) {
    const ScalarType compute = input.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    workspace = torch::stable::new_empty(input, IntList{plan.workspace}, compute);
  }
  launch_local_response_norm(plan, workspace ? device.scratch(*workspace) : nullptr, device.stream());
}

}  // namespace
}  // namespace fastconv::cuda

FASTCONV_CUDA_LIBRARY(m) {
  fastconv::LocalResponseNormOperators<fastconv::cuda::forward, fastconv::cuda::backward>::implement(m);
}
