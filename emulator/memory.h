// What a launch may touch: the ranges of global memory that were named for it, and the shadow of shared memory that
// knows who wrote and who read each element when.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace fastconv::emulator {

// ---- global memory

struct Range {
  uintptr_t begin, end;
  bool writable;
  // Only the first `run` bytes of every `pitch` belong to it: a channel slice of a wider tensor.
  size_t run, pitch;
  std::string name;
  // Who last wrote two bytes in this launch (see GlobalAccess); empty until the first write.
  std::vector<uint64_t> writers;
};

// The ranges that launches of this thread may touch; a Device adds and removes its own.
std::vector<Range>& global_ranges();

// ---- shared memory

// Shadow of two bytes. Times are those of `Clock`.
struct Cell {
  enum State : uint8_t { kUnwritten, kWritten, kInFlight };
  uint32_t write_epoch = 0;
  uint32_t write_clock = 0;
  uint32_t read_epoch = 0;
  uint32_t read_clock = 0;
  uint32_t read_lanes = 0;  // of read_warp, since they were last ordered
  uint16_t writer = 0;
  uint8_t read_warp = 0;
  uint8_t other_read_warp = kNobody;  // a second warp that read in the same epoch, and one of its lanes
  uint8_t other_read_lane = 0;
  State state = kUnwritten;
  static constexpr uint8_t kNobody = 255;
};

// A vector clock in two levels, which is all that __syncthreads and __syncwarp can express. The epoch counts block
// barriers: what happened in an earlier one is ordered before everything now. Within an epoch only lanes of one warp
// can be ordered: each has a clock of its own and knows up to which time of every other lane it has synchronised.
struct WarpClocks {
  uint32_t known[32][32];  // [lane][other lane]; [lane][lane] is the lane's own time
  uint32_t everyone[32];   // the least of known[.][other]: what all lanes know
  uint32_t least;          // of the lanes' own times

  void reset();
  void sync(uint32_t mask);
};

}  // namespace fastconv::emulator
