// Dynamic shared memory and the launch, each in one place. emulator/include/cuda/runtime/launch.cuh is the twin
// for a host compiler.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/runtime/kernel_table.h"
#include "cuda/runtime/launcher.h"
#include "cuda/runtime/types.cuh"

namespace fastconv::cuda {

// The start of the block's dynamic shared memory, a multiple of 128 bytes.
template <class T>
FASTCONV_DEVICE T* dynamic_smem() {
  extern __shared__ __align__(128) unsigned char fastconv_dynamic_smem[];
  return reinterpret_cast<T*>(fastconv_dynamic_smem);
}

inline void check_cuda(const KernelInfo& info, cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error("fastconv: kernel " + info.name + ": " + cudaGetErrorString(error));
  }
}

// Launches `kernel` unless the grid is empty. Neither allocates nor synchronises: safe under graph capture.
template <class P>
void launch(const KernelInfo& info, void (*kernel)(P), const LaunchShape& shape, Stream stream, const P& params) {
  static_assert(sizeof(P) <= 4096, "a kernel takes at most 4 KiB of parameters");
  const auto& [grid, block, shared_bytes, cluster] = shape;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared_bytes > 48 * 1024) {
    check_cuda(info, cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                          cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster, attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid.x, grid.y, grid.z), config.blockDim = dim3(block.x, block.y, block.z);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes), config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute, config.numAttrs = cluster > 1 ? 1 : 0;
  check_cuda(info, cudaLaunchKernelEx(&config, kernel, params));
}

}  // namespace fastconv::cuda
