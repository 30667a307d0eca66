// The kernel for the gradient of 3x3 filters, whose operands come once: like halo.cuh, the depth being the pixels of
// the results and what lies between them, where the gradient is 0.
//
// A block has 64 filters by nine positions of 64 channels, and a part of the depth. The three warpgroups that multiply
// have a row of positions each. A product has its three columns at once: what is 64 columns of channels further in it
// is the pixel that the next column meets. One thread brings pixels, another one gradients. What is not finite in the
// image meets the zeros, too, so that it may spoil positions that it does not meet otherwise. Needs 227 KiB of shared
// memory; bound by the tensor cores, or by memory.
#pragma once

#include "cuda/conv2d/sm90a/halo_tile.cuh"
#include "cuda/runtime/instructions.h"

namespace fastconv::cuda::inline sm90a {

template <class T_>
struct HaloWgradConfig {
  using T = T_;
  static constexpr int kSide = kHaloSide, kColumns = kSide * kBox;
  static constexpr int kTileA = kBox, kTileB = kSide * kColumns;
  static constexpr int kSlots = kHaloWgradSlots, kStages = 8, kCluster = 1;
  static constexpr bool kHasHalo = true;
  static constexpr const char* kNeeds = "channels_last, channels in multiples of 16 bytes, no groups, no stride, 3x3";
  static constexpr int kConsumers = kSide;  // warpgroups
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;

  // Shared memory, from a multiple of 1024 bytes on: boxes of pixels, some of them twice: 64 from any on, and those
  // that the next columns meet, follow each other; boxes of the gradient; the barriers
  static constexpr int kOnceMore = 2;
  static constexpr int kGradients = (kSlots + kOnceMore) * kBoxBytes;
  static constexpr int kBarriers = kGradients + kStages * kBoxBytes;
  static constexpr int kSharedBytes = 1024 + kBarriers + 8 * 2 * (kSlots + kStages);
};

template <class C>
struct HaloWgradShared : SharedMemory {
  FASTCONV_DEVICE BoxRing<C::kSlots> pixels() const { return {base, base + C::kBarriers}; }
  FASTCONV_DEVICE BoxRing<C::kStages> gradient() const {
    return {base + C::kGradients, base + C::kBarriers + 8 * 2 * C::kSlots};
  }
};

// What a block does: boxes of filters and of channels, boxes along the depth
struct HaloPart {
  int filter_box, channel_box;
  int first, boxes, split;
};
FASTCONV_DEVICE HaloPart part_of_block(const BoxParams& p) {
  HaloPart part;
  int tile;
  part.split = divide(p.by_tiles, static_cast<int>(blockIdx.x), tile);
  part.filter_box = divide(p.by_channel_boxes, tile, part.channel_box);
  part.first = part.split * p.split_deep;
  part.boxes = min(p.split_deep, p.deep - part.first);
  return part;
}

template <class C>
FASTCONV_DEVICE void bring_image(const BoxParams& p, const HaloWgradShared<C>& shared, const HaloPart& part) {
  Turn<C::kSlots> turn;
  for (int i = 0; i < part.boxes + p.halo.patch - 1; ++i) {
    bring_pixels<C::kOnceMore>(p, shared.pixels(), turn, part.channel_box * kBox, (part.first + i) * kBox);
  }
}

template <class C>
FASTCONV_DEVICE void bring_gradient(const BoxParams& p, const HaloWgradShared<C>& shared, const HaloPart& part) {
  const BoxRing<C::kStages> ring = shared.gradient();
  Turn<C::kStages> turn;
  for (int i = 0; i < part.boxes; ++i) {
    const Pixel start = pixel_at(p.by_pixels, p.by_columns, (part.first + i) * kBox);
    const uint32_t full = ring.full(turn.stage);
    ptx::mbarrier_wait(ring.empty(turn.stage), turn.parity ^ 1);
    ptx::mbarrier_arrive_expect(full, kBoxBytes);
    ptx::tma_load_im2col(ring.box(turn.stage), p.gradient, full, part.filter_box * kBox, start.column, start.row,
                         start.n, 0, 0);
    turn.advance();
  }
}

// Of a thread: 64 filters by a row of positions, each of 64 channels
template <class C>
struct HaloWgradSums {
  float of[C::kColumns / 2];
};

template <class C>
FASTCONV_DEVICE void multiply_with_halo(const BoxParams& p, const HaloWgradShared<C>& shared, const HaloPart& part,
                                        int row, HaloWgradSums<C>& sums) {
  using T = typename C::T;
  constexpr ptx::Major kMajor = ptx::Major::kExtent;
  constexpr int kSteps = kBox / 16, kStep = 2048;
  const int shift = row * p.tap_h * p.halo.row_pitch, reach = shift + (C::kSide - 1) * p.tap_w;
  const BoxRing<C::kSlots> pixels = shared.pixels();
  const BoxRing<C::kStages> gradients = shared.gradient();
  const uint64_t first_gradient = ptx::wgmma_operand<kMajor>(gradients.box(0));
  const uint64_t first_pixels =
      ptx::wgmma_operand<kMajor>(pixels.box(0) + shift % kBox * kBoxRowBytes, p.tap_w * kBoxRowBytes);
  Turn<C::kStages> gradient;
  Turn<C::kSlots> at, next;  // the box of the first position's first pixel; that which is to be met next
  at.advance(shift / kBox);
  int met = 0;
  Turn<C::kSlots> last;  // box that has been read
  int last_gradient = 0;
#pragma unroll 1
  for (int box = 0; box < part.boxes; ++box) {
#pragma unroll 1
    for (; met * kBox < (box + 1) * kBox + reach; ++met, next.advance()) {
      ptx::mbarrier_wait(pixels.full(next.stage), next.parity);
    }
    ptx::mbarrier_wait(gradients.full(gradient.stage), gradient.parity);
    const uint64_t a = first_gradient + gradient.stage * (kBoxBytes / 16);
    const uint64_t b = first_pixels + at.stage * (kBoxBytes / 16);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      ptx::wgmma<T, kMajor, kMajor>(sums.of, a + step * kStep / 16, b + step * kStep / 16, box > 0 || step > 0);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
    if (box > 0) {
      arrive_of_warp(gradients.empty(last_gradient));
      arrive_of_warp(pixels.empty(last.stage));
      last.advance();
    }
    last_gradient = gradient.stage;
    gradient.advance();
    at.advance();
  }
  ptx::wgmma_wait<0>();
  ptx::wgmma_sums(sums.of);
}

// To the workspace, or where the depth is not split to the gradient
template <class C>
FASTCONV_DEVICE void finish(const BoxParams& p, const HaloPart& part, int row, const HaloWgradSums<C>& sums) {
  using T = typename C::T;
  const int lane = lane_of_warp(), warp = static_cast<int>(threadIdx.x) % kWarpgroup / 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int filter = part.filter_box * kBox + 16 * warp + lane / 4 + 8 * half;
    if (filter >= p.filters[0]) continue;
#pragma unroll
    for (int i = 2 * half; i < C::kColumns / 2; i += 4) {
      const int position = row * C::kSide + 2 * i / kBox;
      const int channel = part.channel_box * kBox + i / 4 * 8 % kBox + lane % 4 * 2;
      if (channel >= p.channels) continue;
      const int column = position * p.channels + channel;
      if (p.splits > 1) {
        float* const to = p.workspace + (int64_t{part.split} * p.extent_a + filter) * p.pitch_b + column;
        store(to, Vec<float, 2>{sums.of[i], sums.of[i + 1]});
      } else {
        T* const to = static_cast<T*>(p.output) + int64_t{filter} * p.extent_b + column;
        store(reinterpret_cast<uint32_t*>(to), Vec<uint32_t, 1>{pack2<T>(sums.of[i], sums.of[i + 1])});
      }
    }
  }
}

template <class C>
FASTCONV_KERNEL(C::kThreads, 1)
conv2d_halo_wgrad_kernel(const __grid_constant__ BoxParams p) {
  const HaloWgradShared<C> shared{SharedMemory::of_block()};
  if (threadIdx.x == 0) {
    constexpr int kReaders = C::kConsumers * kWarpgroup / 32;
    shared.pixels().init(kReaders);
    shared.gradient().init(kReaders);
    ptx::mbarrier_init_fence();
    ptx::tma_prefetch(p.image);
    ptx::tma_prefetch(p.gradient);
  }
  __syncthreads();
  // The same in all lanes, as the compiler then knows
  const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  const HaloPart part = part_of_block(p);
  if (warpgroup == 0) {
    if (threadIdx.x == 0) bring_image(p, shared, part);
    if (threadIdx.x == 32) bring_gradient(p, shared, part);
    return;
  }
  HaloWgradSums<C> sums;
  multiply_with_halo(p, shared, part, warpgroup - 1, sums);
  finish(p, part, warpgroup - 1, sums);
}

}  // namespace fastconv::cuda::inline sm90a
