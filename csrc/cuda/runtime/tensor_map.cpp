#include "cuda/runtime/tensor_map.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <array>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

namespace fastconv::cuda {
namespace {

static_assert(sizeof(TensorMap) == sizeof(CUtensorMap));

// All numbers of a map, so that equal ones mean the same map
using Key = std::array<int64_t, 16>;

// Found at run time: the library is not linked to the driver, which machines without a GPU lack.
template <class Function>
Function driver_function(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result);
#endif
  if (error != cudaSuccess || result != cudaDriverEntryPointSuccess || found == nullptr) {
    throw std::runtime_error("fastconv: the CUDA driver has no " + std::string(name) +
                             ", which kernels for compute capability 9.0 need; install one of CUDA 12.0 or later");
  }
  return reinterpret_cast<Function>(found);
}

// What was made before, or make()'s; some thousands are kept.
template <class Make>
TensorMap cached(const Key& key, Make&& make) {
  constexpr size_t kMost = 4096;
  static std::mutex mutex;
  static auto& known = *new std::map<Key, TensorMap>;
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto found = known.find(key); found != known.end()) return found->second;
  CUtensorMap made;
  const CUresult status = make(made);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("fastconv: the CUDA driver refused a tensor map, status " + std::to_string(status));
  }
  if (known.size() >= kMost) known.clear();
  TensorMap& map = known[key];
  std::memcpy(map.bytes, &made, sizeof(made));
  return map;
}

CUtensorMapDataType data_type(DType dtype) {
  return dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
}

constexpr cuuint64_t kElementBytes = 2;

}  // namespace

TensorMap tiled_map(const TiledMap& of) {
  const Key key{0,
                reinterpret_cast<int64_t>(of.data),
                static_cast<int64_t>(of.dtype),
                of.rank,
                of.size[0],
                of.size[1],
                of.size[2],
                of.stride[0],
                of.stride[1],
                of.box[0],
                of.box[1]};
  return cached(key, [&](CUtensorMap& map) {
    static const auto encode = driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
    cuuint64_t size[3], stride[2];
    cuuint32_t box[3] = {kBoxChannels}, step[3] = {1, 1, 1};
    for (int i = 0; i < 3; ++i) size[i] = static_cast<cuuint64_t>(of.size[i]);
    for (int i = 0; i < 2; ++i) {
      stride[i] = static_cast<cuuint64_t>(of.stride[i]) * kElementBytes;
      box[i + 1] = static_cast<cuuint32_t>(of.box[i]);
    }
    return encode(&map, data_type(of.dtype), static_cast<cuuint32_t>(of.rank), const_cast<void*>(of.data), size, stride,
                  box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  });
}

TensorMap im2col_map(const Im2colMap& of) {
  const Key key{1,
                reinterpret_cast<int64_t>(of.data),
                static_cast<int64_t>(of.dtype) << 32 | of.pixels,
                of.n,
                of.h,
                of.w,
                of.c,
                of.stride_n,
                of.stride_h,
                of.stride_w,
                of.first_h,
                of.first_w,
                of.step_h,
                of.step_w,
                of.count_h,
                of.count_w};
  return cached(key, [&](CUtensorMap& map) {
    static const auto encode = driver_function<decltype(&cuTensorMapEncodeIm2col)>("cuTensorMapEncodeIm2col");
    const cuuint64_t size[4] = {static_cast<cuuint64_t>(of.c), static_cast<cuuint64_t>(of.w),
                                static_cast<cuuint64_t>(of.h), static_cast<cuuint64_t>(of.n)};
    const cuuint64_t stride[3] = {static_cast<cuuint64_t>(of.stride_w) * kElementBytes,
                                  static_cast<cuuint64_t>(of.stride_h) * kElementBytes,
                                  static_cast<cuuint64_t>(of.stride_n) * kElementBytes};
    // Columns first, like the dimensions; a case of cuda/conformance fails on a GPU that takes rows first.
    const int lower[2] = {of.first_w, of.first_h};
    const int upper[2] = {of.first_w + (of.count_w - 1) * of.step_w - (of.w - 1),
                          of.first_h + (of.count_h - 1) * of.step_h - (of.h - 1)};
    const cuuint32_t step[4] = {1, static_cast<cuuint32_t>(of.step_w), static_cast<cuuint32_t>(of.step_h), 1};
    return encode(&map, data_type(of.dtype), 4, const_cast<void*>(of.data), size, stride, lower, upper, kBoxChannels,
                  static_cast<cuuint32_t>(of.pixels), step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  });
}

}  // namespace fastconv::cuda
