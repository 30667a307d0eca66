// Divider's device functions
#pragma once

#include "cuda/runtime/divider.h"
#include "cuda/runtime/types.cuh"

namespace fastconv::cuda {

// n / by for 0 <= n < 2^31
FASTCONV_DEVICE int quotient(const Divider& by, int n) {
  const auto high = static_cast<uint32_t>(static_cast<uint64_t>(static_cast<uint32_t>(n)) * by.factor >> 32);
  return static_cast<int>((high + static_cast<uint32_t>(n)) >> by.shift);
}
FASTCONV_DEVICE int divide(const Divider& by, int n, int& remainder) {
  const int q = quotient(by, n);
  remainder = n - q * static_cast<int>(by.divisor);
  return q;
}

}  // namespace fastconv::cuda
