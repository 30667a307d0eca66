// From tensors to the kernels in cpu/kernels: their element types and the threads that run them.
#pragma once

#include "common/layout.h"
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

}  // namespace fastconv::cpu
