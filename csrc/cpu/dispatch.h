// From tensors to the kernels in cpu/kernels: their element types and the threads that run them.
#pragma once

#include "common/stable.h"
#include "cpu/capability.h"
#include "cpu/kernels/kernel.h"

namespace fastconv::cpu {

inline DType kernel_dtype(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      return DType::kFloat32;
  }
}

// f(begin, end) over all `items` on torch's threads, each of which moves at least 128 KiB: less
// would not pay for waking another one.
template <class F>
void parallel_for(int64_t items, int64_t bytes_per_item, F&& f) {
  const int64_t grain = std::max<int64_t>(1, (int64_t{128} << 10) / std::max<int64_t>(1, bytes_per_item));
  torch::stable::parallel_for(0, items, grain, f);
}

// Whether the elements fill one stretch of memory, each once, in any order of the dimensions
inline bool is_dense(const Tensor& tensor) {
  if (tensor.is_contiguous()) return true;
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  const int64_t numel = tensor.numel();
  for (int64_t stride = 1; stride < numel;) {
    size_t axis = 0;
    while (axis < sizes.size() && !(sizes[axis] > 1 && strides[axis] == stride)) ++axis;
    if (axis == sizes.size()) return false;
    stride *= sizes[axis];
  }
  return true;
}

// `tensor` itself where its elements lie in memory as those of the dense `like`, else a copy that
// does
inline Tensor with_layout_of(const Tensor& like, const Tensor& tensor) {
  if (tensor.strides().equals(like.strides())) return tensor;
  Tensor copy = torch::stable::empty_like(like);
  torch::stable::copy_(copy, tensor);
  return copy;
}

// A dense tensor: `tensor` itself, or a copy with its dimensions in the same order
inline Tensor to_dense(const Tensor& tensor) {
  if (is_dense(tensor)) return tensor;
  Tensor copy = torch::stable::empty_like(tensor);
  torch::stable::copy_(copy, tensor);
  return copy;
}

}  // namespace fastconv::cpu
