// How the sums of halo.cuh leave a warpgroup. A box of 64 pixels at a time is finished in registers, turned in shared
// memory, where its residual lies, and stored by all threads.
#pragma once

#include "cuda/conv2d/sm90a/halo_tile.cuh"
#include "cuda/conv2d/sm90a/results.cuh"

namespace fastconv::cuda::inline sm90a {

template <Pass kPass, class C>
class HaloResults {
 public:
  using T = typename C::T;

  FASTCONV_DEVICE HaloResults(const BoxParams& params, const HaloShared<C>& of_block, int warpgroup, int column)
      : p(params),
        shared(of_block),
        consumer(warpgroup),
        thread(static_cast<int>(threadIdx.x) % kWarpgroup),
        first_filter(column) {}

  // Before the products of a tile: has the residual of its first boxes come.
  FASTCONV_DEVICE void begin(int row) const {
    if (!adds_residual()) return;
    sync();  // all have stored what was in the places
    for (int i = 0; i < 2; ++i) load_residual(row + i * kBox, turn + i);
  }

  FASTCONV_DEVICE void finish(int row, const HaloSums<C>& sums) {
    float bias[2] = {};
    if constexpr (kPass == Pass::kFprop) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int filter = first_filter + thread / 32 * 16 + lane_of_warp() / 4 + 8 * half;
        if (p.bias[0] && filter < p.extent_b) bias[half] = to_float(static_cast<const T*>(p.bias[0])[filter]);
      }
    }
#pragma unroll
    for (int box = 0; box < C::kBoxesOfTile; ++box) {
      if (row + box * kBox >= p.extent_a) break;
      float of_box[kBox / 2];
#pragma unroll
      for (int i = 0; i < kBox / 2; ++i) {
        of_box[i] = sums.of[box / C::kBoxesOfProduct][box % C::kBoxesOfProduct * kBox / 2 + i] + bias[i / 2 % 2];
      }
      finish_box(row, box, of_box);
    }
  }

 private:
  FASTCONV_DEVICE bool adds_residual() const { return kPass == Pass::kFprop && p.has_residual; }
  FASTCONV_DEVICE void sync() const { ptx::named_barrier_sync(1 + consumer, kWarpgroup); }

  FASTCONV_DEVICE void load_residual(int row, uint32_t of_turn) const {
    if (thread != 0 || row >= p.extent_a) return;
    const uint32_t barrier = shared.residual(consumer, of_turn % 2);
    const Pixel start = pixel_at(p.by_pixels, p.by_columns, row);
    ptx::mbarrier_arrive_expect(barrier, kBoxBytes);
    ptx::tma_load_im2col(shared.result(consumer, of_turn % 2), p.residual, barrier, first_filter, start.column,
                         start.row, start.n, 0, 0);
  }

  // The 16 filters of a warp, two by two eights of them and of pixels
  FASTCONV_DEVICE void finish_box(int first_row, int box, float (&sums)[kBox / 2]) {
    const int lane = lane_of_warp(), row = first_row + box * kBox;
    const uint32_t result = shared.result(consumer, turn % 2);
    const auto at = [&](int i) {
      return at_chunk(result, i / 4 * 8 + lane / 16 * 8 + lane % 8, thread / 32 * 2 + lane / 8 % 2);
    };
    if (adds_residual()) {
      ptx::mbarrier_wait(shared.residual(consumer, turn % 2), turn / 2 % 2);
#pragma unroll
      for (int i = 0; i < kBox / 2; i += 8) {
        uint32_t pairs[4];
        ptx::ldmatrix_x4_trans(pairs, at(i));
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float2 pair = unpack2<T>(pairs[e]);
          sums[i + 2 * e] += pair.x, sums[i + 2 * e + 1] += pair.y;
        }
      }
      __syncwarp();
    }
    if constexpr (kPass == Pass::kFprop) {
#pragma unroll
      for (int i = 0; i < kBox / 2; ++i) sums[i] = activate(sums[i], p.activation);
    }
#pragma unroll
    for (int i = 0; i < kBox / 2; i += 8) {
      uint32_t pairs[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) pairs[e] = pack2<T>(sums[i + 2 * e], sums[i + 2 * e + 1]);
      ptx::stmatrix_x4_trans(at(i), pairs);
    }
    if (adds_residual()) ptx::fence_proxy_async();
    sync();  // the box is whole, and all have stored the one before, whose place is free
    if (adds_residual() && box > 0 && box + 1 < C::kBoxesOfTile) load_residual(row + kBox, turn + 1);
    store_pixels<T, true>(p, shared, result, row, first_filter / kBox);
    ++turn;
  }

  const BoxParams& p;
  const HaloShared<C> shared;
  const int consumer, thread;  // of the warpgroup
  const int first_filter;
  uint32_t turn = 0;  // boxes that have been finished
};

}  // namespace fastconv::cuda::inline sm90a
