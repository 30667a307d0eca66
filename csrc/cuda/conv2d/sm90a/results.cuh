// Results: how a warpgroup's sums leave it. A box of 64 rows and 64 columns at a time is finished in registers (bias,
// residual, activation, rounding), turned in shared memory, and stored by the TMA while the next one is finished in the
// other of two places. Parts of a split depth go to the workspace as they are.
#pragma once

#include "cuda/conv2d/sm90a/tile.cuh"
#include "cuda/runtime/instructions.h"

namespace fastconv::cuda::inline sm90a {

// 16-byte chunk of a row of a box
FASTCONV_DEVICE uint32_t at_chunk(uint32_t box, int row, int chunk) {
  return box + row * kBoxRowBytes + (chunk ^ row % 8) * 16;
}

// A warpgroup stores a box whose rows are pixels without a pitch, as those of a phase of a stride are. With a halo
// there are rows between them that are no pixels.
template <class T, bool kHasHalo>
FASTCONV_DEVICE void store_pixels(const BoxParams& p, const SharedMemory& shared, uint32_t result, int row, int box) {
  constexpr int kChunks = kBoxRowBytes / 16, kRowsAtOnce = kWarpgroup / kChunks;
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  const int chunk = thread % kChunks, column = box * kBox + chunk * 8;
  if (column >= p.extent_b) return;
#pragma unroll 1
  for (int i = thread / kChunks; i < kBox && row + i < p.extent_a; i += kRowsAtOnce) {
    const Pixel pixel = pixel_at(p.by_pixels, p.by_columns, row + i);
    if (kHasHalo && (pixel.row >= p.rows.pixels || pixel.column >= p.columns.pixels)) continue;
    const int h = p.rows.first_pixel + pixel.row * p.rows.step_pixel;
    const int w = p.columns.first_pixel + pixel.column * p.columns.step_pixel;
    T* const to = static_cast<T*>(p.output) + (pixel.n * p.y.n + h * p.y.h + w * p.y.w + column);
    store(to, load<8>(shared.at<T>(at_chunk(result, i, chunk))));
  }
}

template <Pass kPass, class C>
class Results {
 public:
  using T = typename C::T;
  // Sums of 64 rows; a thread's of a box are kOfBox neighbours, see ptx::wgmma
  using Row = float[C::kTileB / 2];  // boxes side by side
  using Sums = Row[C::kBlocks];
  static constexpr int kOfBox = kBox / 2;

  FASTCONV_DEVICE Results(const BoxParams& params, const Shared<C>& of_block, int warpgroup)
      : p(params), shared(of_block), consumer(warpgroup), thread(static_cast<int>(threadIdx.x) % kWarpgroup) {}

  // Before the products of a tile: has what is to be added to its first boxes come.
  FASTCONV_DEVICE void begin(const Place& at) {
    if (!adds_residual()) return;
    const Extent extent = extent_of(at);
    if (thread != 0) return;
    ptx::tma_store_wait_read<0>();
#pragma unroll
    for (int i = 0; i < 2; ++i) load_residual(at, extent, i, turn + i);
  }

  FASTCONV_DEVICE void finish(const Place& at, const Sums& sums) {
    if (p.splits > 1) {
      write_parts(at, sums);
      return;
    }
    const Extent extent = extent_of(at);
#pragma unroll
    for (int block = 0; block < C::kBlocks; ++block) {
      if (block >= extent.blocks) break;
#pragma unroll
      for (int j = 0; j < C::kBoxesB; ++j) {
        if (j >= extent.boxes) break;
        float box[kOfBox];
#pragma unroll
        for (int i = 0; i < kOfBox; ++i) box[i] = sums[block][j * kOfBox + i];
        finish_box(at, extent, block, j, box);
      }
    }
  }

  // Shared memory must outlive what reads it.
  FASTCONV_DEVICE void end() const {
    if (thread == 0) ptx::tma_store_wait_read<0>();
  }

 private:
  // What of a warpgroup's part of a tile exists
  struct Extent {
    int blocks, boxes;
  };

  FASTCONV_DEVICE int first_row(const Place& at) const { return at.a + (C::kTogether ? consumer * C::kRows : 0); }
  FASTCONV_DEVICE Extent extent_of(const Place& at) const {
    const int row = first_row(at);
    // Along a wgrad counts boxes of branches.
    const int rows = kPass == Pass::kWgrad ? p.first_box[p.branches] * kBox : p.extent_a;
    return {max(0, min(C::kBlocks, (rows - row + kBox - 1) / kBox)), min(C::kBoxesB, p.boxes_b - at.b / kBox)};
  }
  FASTCONV_DEVICE bool adds_residual() const { return kPass == Pass::kFprop && p.has_residual && p.splits == 1; }

  // The index-th box of a tile, into the place that the turn has
  FASTCONV_DEVICE void load_residual(const Place& at, const Extent& extent, int index, uint32_t of_turn) const {
    if (index >= extent.blocks * extent.boxes) return;
    const int block = index / extent.boxes, j = index - block * extent.boxes;
    const uint32_t barrier = shared.residual(consumer, of_turn % 2);
    ptx::mbarrier_arrive_expect(barrier, kBoxBytes);
    ptx::tma_load_2d(shared.result(consumer, of_turn % 2), p.residual, barrier, at.b + j * kBox,
                     first_row(at) + block * kBox);
  }

  FASTCONV_DEVICE void finish_box(const Place& at, const Extent& extent, int block, int j, float (&sums)[kOfBox]) {
    const int lane = lane_of_warp(), warp = thread / 32, g = lane / 4, t = lane % 4;
    const uint32_t result = shared.result(consumer, turn % 2);
    const int row = first_row(at) + block * kBox, box = at.b / kBox + j;
    if (adds_residual()) {
      ptx::mbarrier_wait(shared.residual(consumer, turn % 2), turn / 2 % 2);
    } else {
      if (thread == 0) ptx::tma_store_wait_read<1>();
      ptx::named_barrier_sync(1 + consumer, kWarpgroup);  // the place is free
    }
    if constexpr (kPass == Pass::kFprop) {
      add_bias(box, sums);
      if (adds_residual()) {
#pragma unroll
        for (int i = 0; i < kOfBox; i += 2) {
          const int of_box = 16 * warp + g + 8 * (i / 2 % 2);
          const float2 pair =
              unpack2<T>(load<1>(shared.template at<uint32_t>(at_chunk(result, of_box, i / 4) + 4 * t)).v[0]);
          sums[i] += pair.x, sums[i + 1] += pair.y;
        }
        __syncwarp();
      }
#pragma unroll
      for (int i = 0; i < kOfBox; ++i) sums[i] = activate(sums[i], p.activation);
    }
#pragma unroll
    for (int i = 0; i < kOfBox; i += 8) {
      uint32_t pairs[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) pairs[e] = pack2<T>(sums[i + 2 * e], sums[i + 2 * e + 1]);
      const int of_box = 16 * warp + lane % 8 + 8 * (lane / 8 % 2);
      ptx::stmatrix_x4(at_chunk(result, of_box, i / 4 + lane / 16), pairs);
    }
    if (kPass == Pass::kWgrad || p.plain_result) ptx::fence_proxy_async();
    ptx::named_barrier_sync(1 + consumer, kWarpgroup);  // the box is whole
    if (kPass != Pass::kWgrad && !p.plain_result) {
      store_pixels<T, false>(p, shared, result, row, box);
    } else if (thread == 0) {
      store_box(result, row, box);
      ptx::tma_store_commit();
      const int next = block * extent.boxes + j + 2;
      if (adds_residual() && next < extent.blocks * extent.boxes) {
        ptx::tma_store_wait_read<0>();
        load_residual(at, extent, next, turn + 2);
      }
    }
    ++turn;
  }

  FASTCONV_DEVICE void add_bias(int box, float (&sums)[kOfBox]) const {
    const auto [branch, filter] = branch_box(p, box);
    const T* const bias = static_cast<const T*>(p.bias[branch]);
#pragma unroll
    for (int i = 0; i < kOfBox; i += 4) {
      const int column = filter + 2 * i + lane_of_warp() % 4 * 2;
      const bool exists = bias != nullptr && column < p.filters[branch];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float value = exists ? to_float(bias[column + e]) : 0.0f;
        sums[i + e] += value, sums[i + 2 + e] += value;
      }
    }
  }

  FASTCONV_DEVICE void store_box(uint32_t result, int row, int box) const {
    if constexpr (kPass == Pass::kFprop) {
      const auto [branch, filter] = branch_box(p, box);
      ptx::tma_store_2d(p.result[branch], result, filter, row);
    } else if constexpr (kPass == Pass::kDgrad) {
      ptx::tma_store_2d(p.result[0], result, box * kBox, row);
    } else {
      int channel_box;
      const int position = divide(p.by_channel_boxes, box, channel_box);
      const auto [branch, filter] = branch_box(p, row / kBox);
      ptx::tma_store_3d(p.result[branch], result, channel_box * kBox, position, filter);
    }
  }

  // In the workspace rows and columns are those of ConvParams.
  FASTCONV_DEVICE void write_parts(const Place& at, const Sums& sums) const {
    const int lane = lane_of_warp(), warp = thread / 32;
#pragma unroll
    for (int block = 0; block < C::kBlocks; ++block) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row_of(first_row(at) + block * kBox + 16 * warp + lane / 4 + 8 * half);
        if (row < 0) continue;
        float* const to = p.workspace + (int64_t{at.split} * p.extent_a + row) * p.pitch_b;
#pragma unroll
        for (int j = 0; j < C::kBoxesB; ++j) {
          const auto [column, columns] = columns_of(at.b / kBox + j);
#pragma unroll
          for (int i = 0; i < kOfBox; i += 4) {
            const int of_box = 2 * i + lane % 4 * 2, sum = j * kOfBox + i + 2 * half;
            if (of_box < columns) store(to + column + of_box, Vec<float, 2>{sums[block][sum], sums[block][sum + 1]});
          }
        }
      }
    }
  }
  // Negative where there is none
  FASTCONV_DEVICE int row_of(int row) const {
    if constexpr (kPass != Pass::kWgrad) return row < p.extent_a ? row : -1;
    if (row >= p.first_box[p.branches] * kBox) return -1;
    const auto [branch, first] = branch_box(p, row / kBox);
    const int filter = first + row % kBox;
    return filter < p.filters[branch] ? p.first_filter[branch] + filter : -1;
  }
  // The first column of a box, and how many it has
  struct Columns {
    int first, count;
  };
  FASTCONV_DEVICE Columns columns_of(int box) const {
    if (box >= p.boxes_b) return {0, 0};
    if constexpr (kPass == Pass::kFprop) {
      const auto [branch, filter] = branch_box(p, box);
      return {p.first_filter[branch] + filter, p.filters[branch] - filter};
    } else if constexpr (kPass == Pass::kDgrad) {
      return {box * kBox, p.extent_b - box * kBox};
    } else {
      int channel_box;
      const int position = divide(p.by_channel_boxes, box, channel_box);
      return {position * p.channels + channel_box * kBox, p.channels - channel_box * kBox};
    }
  }

  const BoxParams& p;
  const Shared<C> shared;
  const int consumer, thread;  // of the warpgroup
  uint32_t turn = 0;           // boxes that have been finished
};

}  // namespace fastconv::cuda::inline sm90a
