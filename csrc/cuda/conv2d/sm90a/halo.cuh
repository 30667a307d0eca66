// The kernel for filters that meet each pixel many times, of few channels, where kernel.cuh would bring the same pixels
// once for each position: here a box of pixels comes once, and each position multiplies with the boxes from another row
// of them on.
//
// Extent a of the GEMM are the pixels of the results and the columns and rows between them that the filter reaches
// into, so that a position is always so many of them further: `row_pitch` from one row of the image to the next. What
// is no pixel of the results is computed and dropped. The tensor cores have it the other way around, 64 filters by 128
// pixels, which reads shared memory less often. A block does a run of tiles that follow each other. Where there is one
// box of channels its pixels slide through the ring: the next tile needs but the boxes behind those that have come.
// Else each box of channels has a patch of its own, halo included.
//
// One thread brings pixels, another one filters; these stay if all fit. The two warpgroups that multiply have tiles in
// turns, and one stores its results while the other multiplies.
// Needs 227 KiB of shared memory; bound by the tensor cores, or by memory.
#pragma once

#include <type_traits>

#include "cuda/conv2d/sm90a/halo_results.cuh"
#include "cuda/conv2d/sm90a/loads.cuh"

namespace fastconv::cuda::inline sm90a {

// The tiles of a block
struct Run {
  int a, b;   // first row and column of the first one
  int tiles;  // each below the one before
};
template <class C>
FASTCONV_DEVICE Run run_of_block(const BoxParams& p) {
  int tile_b;
  const int first = divide(p.by_tiles_b, static_cast<int>(blockIdx.x), tile_b) * p.halo.run;
  return {first * C::kTileA, tile_b * C::kTileB, min(p.halo.run, p.halo.tiles - first)};
}

// The way through the depth: the positions, for one box of channels after the other
struct HaloDepth {
  int channel_box = 0;
  Position position{};

  // Whether that was the last position
  FASTCONV_DEVICE bool advance(const BoxParams& p) {
    if (++position.s < p.s) return false;
    position.s = 0;
    if (++position.r < p.halo.r) return false;
    position.r = 0;
    ++channel_box;
    return true;
  }
};

// ---------------------------------------------------------------------------------------------------- operands

template <class C>
FASTCONV_DEVICE void bring_image(const BoxParams& p, const HaloShared<C>& shared, const Run& run) {
  Turn<C::kSlots> turn;
  for (int tile = 0; tile < run.tiles; ++tile) {
    for (int channel_box = 0; channel_box < p.channel_boxes; ++channel_box) {
      const int c = p.first_channel + channel_box * kBox;
      // Those of the tile before are there.
      for (int i = p.halo.slides && tile > 0 ? p.halo.patch - C::kBoxesOfTile : 0; i < p.halo.patch; ++i) {
        bring_pixels<C::kBoxesOfProduct>(p, shared.pixels(), turn, c, run.a + tile * C::kTileA + i * kBox);
      }
    }
  }
}

template <class C>
FASTCONV_DEVICE bool filters_stay(const BoxParams& p) {
  return p.deep <= C::kStages;
}

template <Pass kPass, class C>
FASTCONV_DEVICE void bring_filters(const BoxParams& p, const HaloShared<C>& shared, const Run& run) {
  const BoxRing<C::kStages> ring = shared.filters();
  Turn<C::kStages> turn;
  const int times = filters_stay<C>(p) ? 1 : run.tiles;
  for (int tile = 0; tile < times; ++tile) {
    HaloDepth depth;
    for (int box = 0; box < p.deep; ++box) {
      const int c = p.first_channel + depth.channel_box * kBox, number = number_in_weight(p, depth.position);
      const uint32_t to = ring.box(turn.stage), full = ring.full(turn.stage);
      ptx::mbarrier_wait(ring.empty(turn.stage), turn.parity ^ 1);
      ptx::mbarrier_arrive_expect(full, kBoxBytes);
      if constexpr (kPass == Pass::kFprop) {
        ptx::tma_load_3d(to, p.weight[0], full, c, number, run.b);
      } else {
        ptx::tma_load_3d(to, p.weight[0], full, run.b, number, c);
      }
      turn.advance();
      depth.advance(p);
    }
  }
}

// ---------------------------------------------------------------------------------------------------- products

// Of one tile of the run
template <Pass kPass, class C>
FASTCONV_DEVICE void multiply_with_halo(const BoxParams& p, const HaloShared<C>& shared, int consumer, int tile,
                                        HaloSums<C>& sums) {
  using T = typename C::T;
  constexpr ptx::Major kFilters = kPass == Pass::kFprop ? ptx::Major::kDepth : ptx::Major::kExtent;
  constexpr ptx::Major kPixels = ptx::Major::kDepth;
  constexpr int kSteps = kBox / 16, kFilterStep = kFilters == ptx::Major::kDepth ? 32 : 2048, kPixelStep = 32;
  const bool stay = filters_stay<C>(p);
  const BoxRing<C::kSlots> pixels = shared.pixels();
  const BoxRing<C::kStages> weights = shared.filters();
  const uint64_t first_filters = ptx::wgmma_operand<kFilters>(weights.box(0));
  const uint64_t first_pixels = ptx::wgmma_operand<kPixels>(pixels.box(0));

  Turn<C::kStages> filters;
  if (!stay) filters.advance(tile * p.deep);
  Turn<C::kSlots> patch;  // where it begins
  patch.advance(tile * (p.halo.slides ? C::kBoxesOfTile : p.channel_boxes * p.halo.patch));
  Turn<C::kSlots> next = patch;  // the box that is to be met next
  int met = 0;                   // boxes of the patch
  HaloDepth depth;
  const auto release_pixels = [&](int boxes) {
    Turn<C::kSlots> of = patch;
#pragma unroll 1
    for (; boxes > 0; --boxes, of.advance()) arrive_of_warp(pixels.empty(of.stage));
  };
  // Over so many times 16 channels of each position, `number` of all; the last ones go on when this returns.
  int number = 0;
  const auto products = [&](int last, auto over_channels) {
#pragma unroll 1
    for (; number < last; ++number) {
      const int before = filters.stage;
      if (number > 0) {
        if (depth.advance(p)) {
          ptx::wgmma_wait<0>();  // the next patch may need its places
          release_pixels(p.halo.patch);
          patch.advance(p.halo.patch);
          met = 0;
        }
        filters.advance();
      }
      const int shift = depth.position.r * p.tap_h * p.halo.row_pitch + depth.position.s * p.tap_w;
#pragma unroll 1
      for (; met * kBox < C::kTileA + shift; ++met, next.advance()) {
        ptx::mbarrier_wait(pixels.full(next.stage), next.parity);
      }
      ptx::mbarrier_wait(weights.full(filters.stage), filters.parity);
      const uint64_t a = first_filters + filters.stage * (kBoxBytes / 16);
      uint64_t b[C::kProducts];
#pragma unroll
      for (int i = 0; i < C::kProducts; ++i) {
        const int slot = patch.stage + shift / kBox + i * C::kBoxesOfProduct;
        b[i] = first_pixels + (slot < C::kSlots ? slot : slot - C::kSlots) * (kBoxBytes / 16) +
               shift % kBox * (kBoxRowBytes / 16);
      }
      ptx::wgmma_fence();
      over_channels([&](int step) {
#pragma unroll
        for (int i = 0; i < C::kProducts; ++i) {
          ptx::wgmma<T, kFilters, kPixels>(sums.of[i], a + step * (kFilterStep / 16), b[i] + step * (kPixelStep / 16),
                                           number > 0 || step > 0);
        }
      });
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
      if (!stay && number > 0) arrive_of_warp(weights.empty(before));
    }
  };

  // As in kernel.cuh; the first warpgroup begins, and what ended before the first phase is odd.
  ptx::mbarrier_wait(shared.order(consumer), (tile / C::kConsumers + 1 + consumer) % 2);
  // Positions with whole boxes of channels; where there is no position, it is one with zeros.
  const int full = min(p.channels / kBox * p.halo.r * p.s, p.deep);
  const auto unrolled = [&](int last, auto steps) {
    products(last, [](auto product) {
#pragma unroll
      for (int step = 0; step < decltype(steps)::value; ++step) product(step);
    });
  };
  unrolled(full, std::integral_constant<int, kSteps>());
  switch ((p.channels % kBox + 15) / 16) {
    case 1:
      unrolled(p.deep, std::integral_constant<int, 1>());
      break;
    case 2:
      unrolled(p.deep, std::integral_constant<int, 2>());
      break;
    case 3:
      unrolled(p.deep, std::integral_constant<int, 3>());
      break;
    default:
      unrolled(p.deep, std::integral_constant<int, kSteps>());
  }
  arrive_of_warp(shared.order(1 - consumer));
  ptx::wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < C::kProducts; ++i) ptx::wgmma_sums(sums.of[i]);
  if (!stay) arrive_of_warp(weights.empty(filters.stage));
  // The tiles before may have read the same boxes: they are filled after those that these alone have read, so after
  // them.
  release_pixels(p.halo.slides ? C::kBoxesOfTile : p.halo.patch);
}

// ---------------------------------------------------------------------------------------------------- kernel

template <Pass kPass, class C>
FASTCONV_KERNEL(C::kThreads, 1)
conv2d_halo_kernel(const __grid_constant__ BoxParams p) {
  const HaloShared<C> shared{SharedMemory::of_block()};
  constexpr int kWarps = kWarpgroup / 32;
  if (threadIdx.x == 0) {
    shared.pixels().init(kWarps);
    shared.filters().init(kWarps);
    for (int i = 0; i < C::kConsumers; ++i) {
      for (int j = 0; j < 2; ++j) ptx::mbarrier_init(shared.residual(i, j), 1);
      ptx::mbarrier_init(shared.order(i), kWarps);
    }
    ptx::mbarrier_init_fence();
    ptx::tma_prefetch(p.image);
    ptx::tma_prefetch(p.weight[0]);
  }
  __syncthreads();
  // The same in all lanes, as the compiler then knows
  const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  const Run run = run_of_block<C>(p);
  if (warpgroup == 0) {
    ptx::registers_decrease<C::kProducerRegisters>();
    if (threadIdx.x == 0) bring_image<C>(p, shared, run);
    if (threadIdx.x == 32) bring_filters<kPass, C>(p, shared, run);
    return;
  }
  ptx::registers_increase<C::kConsumerRegisters>();
  const int consumer = warpgroup - 1;
  HaloResults<kPass, C> results(p, shared, consumer, run.b);
  for (int tile = consumer; tile < run.tiles; tile += C::kConsumers) {
    const int row = run.a + tile * C::kTileA;
    HaloSums<C> sums;
    results.begin(row);
    multiply_with_halo<kPass, C>(p, shared, consumer, tile, sums);
    results.finish(row, sums);
  }
}

}  // namespace fastconv::cuda::inline sm90a
