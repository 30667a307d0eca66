#include "cuda/runtime/device.h"

namespace fastconv::cuda {

DType element_type(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Double:
      return DType::kFloat64;
    default:  // the checks let no other through
      STD_TORCH_CHECK(false, "fastconv: no CUDA kernel for dtype ", torch::headeronly::toString(tensor.scalar_type()));
  }
}

}  // namespace fastconv::cuda
