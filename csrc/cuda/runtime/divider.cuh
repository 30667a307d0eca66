// What kernels do with a Divider.
#pragma once

#include "cuda/runtime/divider.h"
#include "cuda/runtime/types.cuh"

namespace fastconv::cuda {

// n / by for 0 <= n < 2^31
FASTCONV_DEVICE int quotient(const Divider& by, int n) {
  const uint32_t high = __umulhi(static_cast<uint32_t>(n), by.factor);
  return static_cast<int>((high + static_cast<uint32_t>(n)) >> by.shift);
}
FASTCONV_DEVICE int divide(const Divider& by, int n, int& remainder) {
  const int q = quotient(by, n);
  remainder = n - q * static_cast<int>(by.divisor);
  return q;
}

// A pixel of images, counted through all of them
struct Pixel {
  int n, row, column;
};
FASTCONV_DEVICE Pixel pixel_at(const Divider& by_image, const Divider& by_row, int index) {
  Pixel found;
  int inner;
  found.n = divide(by_image, index, inner);
  found.row = divide(by_row, inner, found.column);
  return found;
}

}  // namespace fastconv::cuda
