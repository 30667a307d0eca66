#include "memory.h"

#include <algorithm>
#include <cstring>

namespace fastconv::emulator {

std::vector<Range>& global_ranges() {
  thread_local std::vector<Range> ranges;
  return ranges;
}

void WarpClocks::reset() {
  std::memset(known, 0, sizeof(known));
  std::memset(everyone, 0, sizeof(everyone));
  for (int lane = 0; lane < 32; ++lane) known[lane][lane] = 1;
  least = 1;
}

void WarpClocks::sync(uint32_t mask) {
  uint32_t joined[32] = {};
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) {
      for (int other = 0; other < 32; ++other) joined[other] = std::max(joined[other], known[lane][other]);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) {
      std::memcpy(known[lane], joined, sizeof(joined));
      ++known[lane][lane];
    }
  }
  std::fill_n(everyone, 32, UINT32_MAX);
  least = UINT32_MAX;
  for (int lane = 0; lane < 32; ++lane) {
    for (int other = 0; other < 32; ++other) everyone[other] = std::min(everyone[other], known[lane][other]);
    least = std::min(least, known[lane][lane]);
  }
}

}  // namespace fastconv::emulator
