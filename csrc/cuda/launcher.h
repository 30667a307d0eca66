// What the declaration of a launcher (kernels/<stem>.h) is made of: neither torch nor CUDA headers, so that the glue,
// the kernels and the emulator all include the same file.
#pragma once

#include <cstdint>
#include <vector>

#include "common/activation.h"
#include "cuda/kernel_table.h"

namespace fastconv::cuda {

// A cudaStream_t; the emulator has only one and ignores it.
using Stream = void*;

enum class DType { kFloat32, kBFloat16, kFloat16, kFloat64 };

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fastconv::cuda
