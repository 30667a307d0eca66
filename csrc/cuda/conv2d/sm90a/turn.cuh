// The way around a ring of stages in shared memory.
#pragma once

#include <cstdint>

#include "cuda/runtime/types.cuh"

namespace fastconv::cuda::inline sm90a {

// A stage of a ring, and how often the ring has been gone around
template <int kStages>
struct Turn {
  int stage = 0;
  uint32_t parity = 0;

  FASTCONV_DEVICE void advance() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
  FASTCONV_DEVICE void advance(int stages) {
    stage += stages;
    parity ^= stage / kStages & 1;
    stage %= kStages;
  }
};

}  // namespace fastconv::cuda::inline sm90a
