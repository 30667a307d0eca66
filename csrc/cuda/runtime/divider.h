// Division by a number that the host knows: the device multiplies and shifts.
#pragma once

#include "cuda/runtime/launcher.h"

namespace fastconv::cuda {

// Divides by a constant without a division (`quotient` and `divide` in divider.cuh).
// Source: Granlund and Montgomery 1994, "Division by Invariant Integers using Multiplication".
struct Divider {
  uint32_t divisor = 1, factor = 1, shift = 0;
  Divider() = default;
  explicit Divider(uint32_t d) : divisor(d) {
    while ((uint64_t{1} << shift) < d) ++shift;
    factor = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d)) / d + 1);
  }
};

}  // namespace fastconv::cuda
