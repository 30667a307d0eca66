// What a block of halo.cuh is made of: its configuration, its shared memory, a thread's sums.
#pragma once

#include "cuda/conv2d/sm90a/tile.cuh"

namespace fastconv::cuda::inline sm90a {

template <class T_, int kStages_>
struct HaloConfig : Roles {
  using T = T_;
  static constexpr int kTileA = kHaloTile, kTileB = kBox, kSlots = kHaloSlots, kStages = kStages_;
  static constexpr int kCluster = 1;
  static constexpr bool kHasHalo = true;
  static constexpr const char* kNeeds =
      "channels_last, channels in multiples of 16 bytes, no groups, no stride, no 1x1";
  static constexpr int kColumns = 128;  // pixels of a product
  static constexpr int kProducts = kTileA / kColumns, kBoxesOfProduct = kColumns / kBox, kBoxesOfTile = kTileA / kBox;

  // Shared memory, from a multiple of 1024 bytes on: boxes of pixels, and the first ones once more, so that those of a
  // product follow each other from any row on; boxes of filters; two boxes of results of each warpgroup; the barriers
  static constexpr int kFilters = (kSlots + kBoxesOfProduct) * kBoxBytes;
  static constexpr int kResults = kFilters + kStages * kBoxBytes;
  static constexpr int kBarriers = kResults + kConsumers * 2 * kBoxBytes;
  static constexpr int kBarrierCount = 2 * kSlots + 2 * kStages + 3 * kConsumers;
  static constexpr int kSharedBytes = 1024 + kBarriers + 8 * kBarrierCount;
};

template <class C>
struct HaloShared : SharedMemory {
  FASTCONV_DEVICE uint32_t pixels(int slot) const { return base + slot * kBoxBytes; }
  FASTCONV_DEVICE uint32_t filters(int stage) const { return base + C::kFilters + stage * kBoxBytes; }
  FASTCONV_DEVICE uint32_t result(int consumer, int index) const {
    return base + C::kResults + (2 * consumer + index) * kBoxBytes;
  }
  // That a box has come; that it has been read
  FASTCONV_DEVICE uint32_t pixels_full(int slot) const { return barrier(slot); }
  FASTCONV_DEVICE uint32_t pixels_empty(int slot) const { return barrier(C::kSlots + slot); }
  FASTCONV_DEVICE uint32_t filters_full(int stage) const { return barrier(2 * C::kSlots + stage); }
  FASTCONV_DEVICE uint32_t filters_empty(int stage) const { return barrier(2 * C::kSlots + C::kStages + stage); }
  FASTCONV_DEVICE uint32_t residual(int consumer, int index) const {
    return barrier(2 * C::kSlots + 2 * C::kStages + 2 * consumer + index);
  }
  // Of a warpgroup that multiplies: the other one has met all boxes of the tile before this one's.
  FASTCONV_DEVICE uint32_t order(int consumer) const { return residual(C::kConsumers, consumer); }

 private:
  FASTCONV_DEVICE uint32_t barrier(int number) const { return base + C::kBarriers + 8 * number; }
};

// Of a thread: 64 filters by the pixels of each product
template <class C>
struct HaloSums {
  float of[C::kProducts][C::kColumns / 2];
};

}  // namespace fastconv::cuda::inline sm90a
