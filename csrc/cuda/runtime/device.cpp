#include "cuda/runtime/device.h"

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <map>
#include <mutex>

// Weak, so that one library also loads under a CPU-only torch, which lacks it and never comes here.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace fastconv::cuda {
namespace {

DeviceInfo ask(int32_t index) {
  const auto attribute = [index](cudaDeviceAttr which) {
    int value = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&value, which, index);
    STD_TORCH_CHECK(error == cudaSuccess, "fastconv: cuda:", index, ": ", cudaGetErrorString(error));
    return value;
  };
  DeviceInfo info{};
  info.arch = 10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
  info.multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  info.threads_per_multiprocessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
  info.shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  info.shared_per_multiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  info.l2_bytes = attribute(cudaDevAttrL2CacheSize);
  return info;
}

}  // namespace

struct Device::State {
  explicit State(int32_t index) : index(index), guard(index) {}
  int32_t index;
  torch::stable::accelerator::DeviceGuard guard;
};

Device::Device(const Tensor& tensor) : state_(std::make_unique<State>(tensor.get_device_index())) {
  STD_TORCH_CHECK(&aoti_torch_get_current_cuda_stream != nullptr,
                  "fastconv: got a CUDA tensor from a torch without CUDA; install a CUDA build of torch");
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(state_->index, &stream_) == 0,
                  "fastconv: torch does not tell the current stream of cuda:", state_->index,
                  "; its own message stands above");
}

Device::~Device() noexcept(false) = default;

DeviceInfo Device::info() const {
  // Asked once: the driver takes a while to answer.
  static std::mutex mutex;
  static std::map<int32_t, DeviceInfo> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(state_->index);
  return found != known.end() ? found->second : known[state_->index] = ask(state_->index);
}

void* Device::pointer(const Tensor& tensor, Use use) {
  return use == Use::kIn ? const_cast<void*>(tensor.const_data_ptr()) : tensor.mutable_data_ptr();
}

}  // namespace fastconv::cuda
