// The twin of csrc/cuda/runtime/launch.cuh for a host compiler.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/runtime/kernel_table.h"
#include "cuda/runtime/launcher.h"
#include "cuda/runtime/types.cuh"

namespace fastconv::cuda {

template <class T>
inline T* dynamic_smem() {
  return static_cast<T*>(emulator::shared_memory());
}

namespace detail {
// Not instrumented: it copies the parameters out of the host's memory.
template <class P>
__attribute__((no_sanitize("thread"))) void call(void* kernel, const void* params) {
  reinterpret_cast<void (*)(P)>(kernel)(*static_cast<const P*>(params));
}
}  // namespace detail

template <class P>
void launch(const KernelInfo& info, void (*kernel)(P), const LaunchShape& shape, Stream, const P& params,
            emulator::Where where = emulator::Where::current()) {
  static_assert(sizeof(P) <= 4096, "a kernel takes at most 4 KiB of parameters");
  const auto& [grid, block, shared_bytes, cluster] = shape;
  emulator::launch(info, &detail::call<P>, reinterpret_cast<void*>(kernel), &params, dim3(grid.x, grid.y, grid.z),
                   dim3(block.x, block.y, block.z), static_cast<size_t>(shared_bytes), cluster, where);
}

}  // namespace fastconv::cuda
