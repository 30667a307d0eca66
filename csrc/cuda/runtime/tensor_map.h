// Tensor maps: how the TMA of sm_90 walks a tensor. A map is a pure function of what it is made from, pointer included:
// it goes into a kernel's parameters by value, so that a captured graph has it, too. tensor_map.cpp has the driver make
// it; emulator/tensor_map.cpp is its twin.
#pragma once

#include <cstdint>

#include "cuda/runtime/launcher.h"

namespace fastconv::cuda {

// A CUtensorMap, aligned as the TMA needs it
struct alignas(64) TensorMap {
  unsigned char bytes[128];
};

// Images whose channels lie side by side. A box has 64 channels of 16 bits, in swizzled rows of 128 bytes.
constexpr int kBoxChannels = 64, kBoxRowBytes = 128;

// A tensor as it lies, the innermost dimension first; 16-bit types. Sizes and boxes of dimensions that do not exist are
// 1.
struct TiledMap {
  const void* data = nullptr;  // a multiple of 16 bytes
  DType dtype = DType::kFloat16;
  int rank = 2;  // 2 or 3
  int64_t size[3] = {1, 1, 1};
  int64_t stride[2] = {0, 0};  // of the dimensions but the innermost, in elements; multiples of 8
  int box[2] = {1, 1};         // of the same; the innermost has kBoxChannels
};

// Pixels of images [n, h, w, c] as one filter position meets them: those at first + i * step of each axis, i from 0 to
// count - 1, columns within rows within images.
struct Im2colMap {
  const void* data = nullptr;  // of image 0, row 0, column 0; a multiple of 16 bytes
  DType dtype = DType::kFloat16;
  int n = 1, h = 1, w = 1, c = 1;
  int64_t stride_n = 0, stride_h = 0, stride_w = 0;  // in elements; multiples of 8
  int first_h = 0, first_w = 0;                      // of the first filter position; may be outside
  int step_h = 1, step_w = 1;                        // 1 to 8
  int count_h = 1, count_w = 1;
  int pixels = 64;  // of a box, at most 256
};

// What they cannot have is refused before, by these.
constexpr int kMostStep = 8, kMostCorner = 127, kMostOffset = 255;
constexpr int64_t kMostStrideBytes = (int64_t{1} << 40) - 1;

TensorMap tiled_map(const TiledMap& of);
TensorMap im2col_map(const Im2colMap& of);

}  // namespace fastconv::cuda
