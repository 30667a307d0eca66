// What plans and launchers are made of: neither torch nor CUDA headers, so that the glue, the kernels and the emulator
// all include the same files.
#pragma once

#include <cstdint>

#include "common/activation.h"

namespace fastconv::cuda {

// A cudaStream_t; the emulator has only one and ignores it.
using Stream = void*;

enum class DType { kFloat32, kBFloat16, kFloat16, kFloat64 };

// The forward, and the gradients of its input and of its weight
enum class Pass { kFprop, kDgrad, kWgrad };

constexpr int element_bytes(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool is_aligned(const void* pointer, int bytes = 16) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// Elements between neighbours along each dimension of an image
struct Strides {
  int64_t n, c, h, w;
};

struct Extent {
  unsigned x = 1, y = 1, z = 1;
};

// How a kernel is launched
struct LaunchShape {
  Extent grid, block;
  int64_t shared_bytes = 0;
  unsigned cluster = 1;  // neighbours along x of the grid, a multiple of it, that reach each other's shared memory
};

}  // namespace fastconv::cuda
