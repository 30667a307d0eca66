#include "cuda/runtime/device.h"

namespace fastconv::cuda {

DType cuda_dtype(const char* op, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": got input of dtype ", torch::headeronly::toString(tensor.scalar_type()),
                      ", needed float32, bfloat16 or float16 on CUDA; convert it, or use backend=\"reference\"");
  }
}

}  // namespace fastconv::cuda
