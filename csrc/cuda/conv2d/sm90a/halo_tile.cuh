// What the kernels with a halo share, the rings of boxes and how pixels come into them; and what a block of halo.cuh is
// made of: its configuration, its shared memory, a thread's sums.
#pragma once

#include "cuda/conv2d/sm90a/tile.cuh"

namespace fastconv::cuda::inline sm90a {

template <int kStages>
struct BoxRing {
  uint32_t boxes, barriers;  // addresses

  FASTCONV_DEVICE uint32_t box(int stage) const { return boxes + stage * kBoxBytes; }
  // That a box has come; that it has been read, by so many warps
  FASTCONV_DEVICE uint32_t full(int stage) const { return barriers + 8 * stage; }
  FASTCONV_DEVICE uint32_t empty(int stage) const { return full(kStages + stage); }
  FASTCONV_DEVICE void init(int readers) const {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(full(stage), 1);
      ptx::mbarrier_init(empty(stage), readers);
    }
  }
};

// Brings 64 pixels from this one on, those between rows counted, to where the turn is. The ring's first boxes come once
// more behind its last one, so that what a position meets follows each other from any pixel on.
template <int kOnceMore, int kSlots>
FASTCONV_DEVICE void bring_pixels(const BoxParams& p, const BoxRing<kSlots>& ring, Turn<kSlots>& turn, int c,
                                  int pixel) {
  const Pixel start = pixel_at(p.by_pixels, p.by_columns, min(pixel, p.halo.pixels - 1));
  const int w = p.first_w + start.column, h = p.first_h + start.row;
  const uint32_t full = ring.full(turn.stage);
  const bool twice = turn.stage < kOnceMore;
  ptx::mbarrier_wait(ring.empty(turn.stage), turn.parity ^ 1);
  ptx::mbarrier_arrive_expect(full, twice ? 2 * kBoxBytes : kBoxBytes);
  ptx::tma_load_im2col(ring.box(turn.stage), p.image, full, c, w, h, start.n, 0, 0);
  if (twice) ptx::tma_load_im2col(ring.box(kSlots + turn.stage), p.image, full, c, w, h, start.n, 0, 0);
  turn.advance();
}

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

  // Shared memory, from a multiple of 1024 bytes on: boxes of pixels, some of them twice; boxes of filters; two boxes
  // of results of each warpgroup; the barriers
  static constexpr int kFilters = (kSlots + kBoxesOfProduct) * kBoxBytes;
  static constexpr int kResults = kFilters + kStages * kBoxBytes;
  static constexpr int kBarriers = kResults + kConsumers * 2 * kBoxBytes;
  static constexpr int kBarrierCount = 2 * kSlots + 2 * kStages + 3 * kConsumers;
  static constexpr int kSharedBytes = 1024 + kBarriers + 8 * kBarrierCount;
};

template <class C>
struct HaloShared : SharedMemory {
  FASTCONV_DEVICE BoxRing<C::kSlots> pixels() const { return {base, barrier(0)}; }
  FASTCONV_DEVICE BoxRing<C::kStages> filters() const { return {base + C::kFilters, barrier(2 * C::kSlots)}; }
  FASTCONV_DEVICE uint32_t result(int consumer, int index) const {
    return base + C::kResults + (2 * consumer + index) * kBoxBytes;
  }
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
