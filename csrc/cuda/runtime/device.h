// What the glue needs of a device around its launches: a guard, the current stream, and the memory of tensors.
#pragma once

#include <memory>

#include "common/stable.h"
#include "cuda/runtime/device_info.h"
#include "cuda/runtime/launcher.h"

namespace fastconv::cuda {

// One per call of an operator, alive until its last launch. Every tensor goes through it, for the sake of its twin in
// emulator/, which lets kernels touch the memory that was named here and nothing else.
class Device {
 public:
  // Makes the tensor's device current until the end of this object.
  explicit Device(const Tensor& tensor);
  ~Device() noexcept(false);
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  Stream stream() const { return stream_; }
  DeviceInfo info() const;

  // To be read
  template <class T = void>
  const T* in(const Tensor& tensor) {
    return static_cast<const T*>(pointer(tensor, Use::kIn));
  }
  template <class T = void>
  const T* in(const std::optional<Tensor>& tensor) {
    return tensor ? in<T>(*tensor) : nullptr;
  }
  // To be written, every element of it
  template <class T = void>
  T* out(const Tensor& tensor) {
    return static_cast<T*>(pointer(tensor, Use::kOut));
  }
  // To be written where the kernels like, and read after that
  template <class T = void>
  T* scratch(const Tensor& tensor) {
    return static_cast<T*>(pointer(tensor, Use::kScratch));
  }
  // To be read and written
  template <class T = void>
  T* inout(const Tensor& tensor) {
    return static_cast<T*>(pointer(tensor, Use::kInOut));
  }

 private:
  enum class Use { kIn, kOut, kScratch, kInOut };
  void* pointer(const Tensor& tensor, Use use);

  struct State;
  std::unique_ptr<State> state_;
  Stream stream_ = nullptr;
};

// The kernels' name of a tensor's dtype
DType element_type(const Tensor& tensor);

}  // namespace fastconv::cuda
