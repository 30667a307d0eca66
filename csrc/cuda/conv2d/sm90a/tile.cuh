// What a block of the Hopper kernels is made of: its configuration, its shared memory, the tiles that it computes, and
// the ring of stages through which operands pass.
#pragma once

#include "cuda/conv2d/boxes.h"
#include "cuda/conv2d/sm90a/turn.cuh"
#include "cuda/ptx/sm90a.cuh"
#include "cuda/runtime/divider.cuh"
#include "cuda/runtime/launch.cuh"

namespace fastconv::cuda::inline sm90a {

constexpr int kWarpgroup = 128;                 // threads
constexpr int kBoxBytes = kBox * kBoxRowBytes;  // of 64 rows

FASTCONV_DEVICE int lane_of_warp() { return static_cast<int>(threadIdx.x) % 32; }

// Tells a barrier that waits for whole warps.
FASTCONV_DEVICE void arrive_of_warp(uint32_t barrier) {
  if (lane_of_warp() == 0) ptx::mbarrier_arrive(barrier);
}

// Who does what in a block: a warpgroup that brings boxes, and those that multiply
struct Roles {
  static constexpr int kConsumers = 2;  // warpgroups
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
  // Of a thread: 128 x 40 + 256 x 232 are what the launch had, 384 x 168.
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
};

// kTogether: whether the two warpgroups that multiply share a tile, half of its rows each; else each has its own, and
// one stores its results while the other multiplies.
// kCluster: blocks whose tiles lie below each other, and share the boxes of B: each brings its part of them for all.
template <class T_, int kTileA_, int kTileB_, int kStages_, bool kTogether_, int kCluster_ = 1>
struct BoxConfig : Roles {
  using T = T_;
  static constexpr int kTileA = kTileA_, kTileB = kTileB_, kStages = kStages_;
  static constexpr bool kTogether = kTogether_, kHasHalo = false;
  static constexpr const char* kNeeds = "channels_last, channels in multiples of 16 bytes, no groups";
  static constexpr int kCluster = kCluster_;
  static constexpr int kRows = kTogether ? kTileA / kConsumers : kTileA;  // of a warpgroup
  static constexpr int kBlocks = kRows / 64;                              // of rows that a product has
  static constexpr int kBoxesB = kTileB / kBox;
  static_assert(kTileA % kBox == 0 && kTileB % kBox == 0 && kBlocks * kTileB <= 256);

  // Shared memory, from a multiple of 1024 bytes on: the stages, each A before B; two boxes of results of each
  // warpgroup; the barriers
  static constexpr int kBytesA = kTileA * kBoxRowBytes, kBytesB = kTileB * kBoxRowBytes;
  static constexpr int kStageBytes = kBytesA + kBytesB;
  static constexpr int kResults = kStages * kStageBytes;
  static constexpr int kBarriers = kResults + kConsumers * 2 * kBoxBytes;
  static constexpr int kBarrierCount = 2 * kStages + 3 * kConsumers;
  static constexpr int kSharedBytes = 1024 + kBarriers + 8 * kBarrierCount;
};

// The block's shared memory, by addresses in the shared window
struct SharedMemory {
  unsigned char* memory;
  uint32_t base;  // its address, a multiple of 1024

  FASTCONV_DEVICE static SharedMemory of_block() {
    unsigned char* const memory = dynamic_smem<unsigned char>();
    const uint32_t address = ptx::smem_address(memory), base = (address + 1023) & ~1023u;
    return {memory + (base - address), base};
  }
  template <class T>
  FASTCONV_DEVICE const T* at(uint32_t address) const {
    return reinterpret_cast<const T*>(memory + (address - base));
  }
};

template <class C>
struct Shared : SharedMemory {
  FASTCONV_DEVICE uint32_t stage(int stage) const { return base + stage * C::kStageBytes; }
  // Of a stage: all of its boxes have come; all of its boxes have been read.
  FASTCONV_DEVICE uint32_t full(int stage) const { return base + C::kBarriers + 8 * stage; }
  FASTCONV_DEVICE uint32_t empty(int stage) const { return full(C::kStages + stage); }
  // Of a warpgroup that multiplies: where a box of its results lies, and when what is to be added to it has come there.
  FASTCONV_DEVICE uint32_t result(int consumer, int index) const {
    return base + C::kResults + (2 * consumer + index) * kBoxBytes;
  }
  FASTCONV_DEVICE uint32_t residual(int consumer, int index) const {
    return full(2 * C::kStages + 2 * consumer + index);
  }
  // Of a warpgroup with tiles of its own: the other one has met all boxes of the tile before this one's.
  FASTCONV_DEVICE uint32_t order(int consumer) const { return residual(C::kConsumers, consumer); }
};

// The place of this block in its cluster
template <class C>
FASTCONV_DEVICE int rank() {
  if constexpr (C::kCluster == 1) return 0;
  return static_cast<int>(ptx::cluster_rank());
}

// A tile, and the part of the depth that is done of it
struct Place {
  int a, b;                // first row and column
  int first, last, split;  // boxes along the depth
};

// What the cluster of this block does next: a tile, or for several blocks one for each. Tiles along b are neighbours:
// they are under way at the same time, and share A in the L2 cache.
template <class C>
FASTCONV_DEVICE Place place(const BoxParams& p, int work) {
  Place at;
  int tile, tile_b;
  at.split = divide(p.by_tiles, work, tile);
  at.a = (divide(p.by_tiles_b, tile, tile_b) * C::kCluster + rank<C>()) * C::kTileA;
  at.b = tile_b * C::kTileB;
  at.first = at.split * p.split_deep;
  at.last = min(at.first + p.split_deep, p.deep);
  return at;
}

// The branch that a box of filters belongs to, and the first of these filters in the branch. Boxes beyond the last one
// are of the last branch, whose filters end before them.
struct BranchBox {
  int branch, filter;
};
FASTCONV_DEVICE BranchBox branch_box(const BoxParams& p, int box) {
  int branch = 0;
  while (branch + 1 < p.branches && box >= p.first_box[branch + 1]) ++branch;
  return {branch, (box - p.first_box[branch]) * kBox};
}

}  // namespace fastconv::cuda::inline sm90a
