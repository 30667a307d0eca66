#include "cuda/device.h"

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <atomic>

// Weak, so that one library also loads under a CPU-only torch, which lacks it and never comes here.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace fastconv::cuda {

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

int Device::multiprocessors() const {
  // Asked once: the driver takes a while to answer.
  static std::array<std::atomic<int>, 64> known{};
  const size_t slot = static_cast<size_t>(state_->index) % known.size();
  int count = known[slot];
  if (count == 0) {
    const cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, state_->index);
    STD_TORCH_CHECK(error == cudaSuccess, "fastconv: cuda:", state_->index, ": ", cudaGetErrorString(error));
    known[slot] = count;
  }
  return count;
}

void* Device::pointer(const Tensor& tensor, Use use) {
  return use == Use::kIn ? const_cast<void*>(tensor.const_data_ptr()) : tensor.mutable_data_ptr();
}

}  // namespace fastconv::cuda
