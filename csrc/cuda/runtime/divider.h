// Division by a number that the host knows, without a division on the device; `quotient` and `divide` are in
// divider.cuh. Source: Granlund and Montgomery 1994, "Division by Invariant Integers using Multiplication".
#pragma once

#include <cstdint>

namespace fastconv::cuda {

struct Divider {
  uint32_t divisor = 1, factor = 1, shift = 0;
  Divider() = default;
  explicit Divider(uint32_t d) : divisor(d) {
    while ((uint64_t{1} << shift) < d) ++shift;
    factor = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d)) / d + 1);
  }
};

}  // namespace fastconv::cuda
