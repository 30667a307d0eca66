// The gradient of a first convolution's weight, see ../stem.h: filters x taps, over the pixels of the result. A block
// brings 16 x 16 pixels of the gradient and the patch of the image that they meet; windows of the patch (see
// stem_patch.cuh) are rows of the operand here too, now along the depth. A block adds up one tile after the other in
// registers, and leaves one part of a split depth.
#pragma once

#include "cuda/conv2d/sm80/math.cuh"
#include "cuda/conv2d/sm80/stem_patch.cuh"

namespace fastconv::cuda::inline sm80 {

// Some warps share the filters, the others the taps: each has so many steps of four.
template <class T_, int kFilters_, int kStride_, int kWarpsA_, int kSteps_>
struct StemWgradConfig {
  using T = T_;
  static constexpr int kFilters = kFilters_, kStride = kStride_, kSteps = kSteps_;
  static constexpr int kWarpsA = kWarpsA_, kWarpsB = kStemThreads / 32 / kWarpsA;
  static constexpr int kBlocksA = kFilters / 16 / kWarpsA;  // of 16 filters
  static_assert(kStemThreads / 32 % kWarpsA == 0 && kFilters % (16 * kWarpsA) == 0);
  static constexpr int kBlocks = stem_wgrad_blocks(kFilters, kSteps* kWarpsB), kPitch = stem_pixel_pitch(kFilters);
};

template <class C>
FASTCONV_DEVICE void bring_stem_gradient(const StemParams& p, uint32_t to, const StemTile& tile, int first) {
  using T = typename C::T;
  constexpr int kRuns = C::kFilters / kStemRun;  // to a pixel
  const T* const from = static_cast<const T*>(p.gradient) + (tile.n * p.y.n + tile.row * p.y.h + tile.column * p.y.w);
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < kStemPixels * kRuns; i += kStemThreads) {
    const int pixel = i / kRuns, filter = i % kRuns * kStemRun;
    const int row = pixel / kStemColumns, column = pixel % kStemColumns;
    const bool exists = tile.row + row < p.p && tile.column + column < p.q && first + filter < p.gradient_channels;
    const T* const source = exists ? from + (row * p.y.h + column * p.y.w + first + filter) : from;
    ptx::cp_async<16>(to + static_cast<uint32_t>(pixel * C::kPitch + filter * 2), source, exists);
  }
  ptx::cp_async_commit();
}

// Where the windows of this step begin in the patch
template <class C>
FASTCONV_DEVICE uint32_t stem_window(const StemParams& p, int step) {
  int of_row;
  const int r = divide(p.by_steps, min(step, p.r * p.steps - 1), of_row);
  return static_cast<uint32_t>(r * p.dilation_h * p.row_pitch + of_row * kStemStep<C::kStride>);
}

template <class C>
FASTCONV_KERNEL(kStemThreads, C::kBlocks)
conv2d_stem_wgrad_kernel(const __grid_constant__ StemParams p) {
  using T = typename C::T;
  unsigned char* const shared = dynamic_smem<unsigned char>();
  const uint32_t window = ptx::smem_address(shared);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = lane_of_warp();
  const int first_filter = static_cast<int>(blockIdx.y) * C::kFilters;
  const int filter = warp / C::kWarpsB * C::kBlocksA * 16;  // of the warp's, in the tile
  const int first_step = (static_cast<int>(blockIdx.z) * C::kWarpsB + warp % C::kWarpsB) * C::kSteps;
  // Four matrices of 8 x 8 of the gradient: filters from pixels 0 and, for the second two, 8 on
  const uint32_t gradient = window + static_cast<uint32_t>(p.slabs_at + (lane % 8 + lane / 16 * 8) * C::kPitch +
                                                           (filter + lane / 8 % 2 * 8) * 2);
  uint32_t windows[C::kSteps];
#pragma unroll
  for (int j = 0; j < C::kSteps; ++j) {
    windows[j] = window + static_cast<uint32_t>(p.patch_at + stem_row_of_lane<C::kStride>(p, lane)) +
                 stem_window<C>(p, first_step + j);
  }
  Accumulator<C::kBlocksA, 2 * C::kSteps> sums{};
#pragma unroll 1
  for (int index = static_cast<int>(blockIdx.x); index < p.tiles; index += static_cast<int>(gridDim.x)) {
    const StemTile tile = stem_tile(p, index);
    __syncthreads();  // all have read the tile before
    bring_stem_gradient<C>(p, window + static_cast<uint32_t>(p.slabs_at), tile, first_filter);
    bring_stem_patch<T, C::kStride>(p, shared + p.patch_at, tile);
    ptx::cp_async_wait<0>();
    __syncthreads();
    // Pixels beyond the result have gradients of 0, but windows of the image, which may have an Inf.
    const int rows = min(kStemRows, p.p - tile.row), columns = p.q - tile.column, pixel = lane % 4 * 2;
    const auto kept = [&](int column) {
      return (column < columns ? 0xFFFFu : 0u) | (column + 1 < columns ? 0xFFFF0000u : 0u);
    };
    const uint32_t low = kept(pixel), high = kept(pixel + 8);
#pragma unroll 1
    for (int row = 0; row < rows; ++row) {
      typename HalfMath<T>::template Fragments<C::kBlocksA, 2 * C::kSteps> f;
#pragma unroll
      for (int i = 0; i < C::kBlocksA; ++i) {
        ptx::ldmatrix_x4_trans(f.a[i], gradient + static_cast<uint32_t>(row * kStemColumns * C::kPitch + i * 32));
      }
#pragma unroll
      for (int j = 0; j < C::kSteps; ++j) {
        ptx::ldmatrix_x4_trans(f.b[j], windows[j] + static_cast<uint32_t>(row * p.stride_h * p.row_pitch));
      }
      if (columns < kStemColumns) {
#pragma unroll
        for (int j = 0; j < C::kSteps; ++j) f.b[j][0] &= low, f.b[j][1] &= high, f.b[j][2] &= low, f.b[j][3] &= high;
      }
      HalfMath<T>::multiply(sums, f);
    }
  }

  static_assert(kStemThreads >= C::kFilters);
  float* const part = p.workspace + int64_t{blockIdx.x} * p.extent_a * p.pitch_b;
  // Rows end with what nobody asks for.
  if (const int k = first_filter + static_cast<int>(threadIdx.x);
      p.extent_b < p.pitch_b && blockIdx.z == 0 && threadIdx.x < C::kFilters && k < p.extent_a) {
    store(part + (int64_t{k} * p.pitch_b + p.extent_b), Vec<float, 4>{});
  }
#pragma unroll
  for (int j = 0; j < 2 * C::kSteps; ++j) {
    const int step = first_step + j / 2;
    int of_row;
    const int r = divide(p.by_steps, step, of_row);
    // Two channels of a tap
    const int s = of_row * kStemTaps + j % 2 * 2 + lane % 4 / 2, channel = lane % 2 * 2;
    if (step >= p.r * p.steps || s >= p.s) continue;
#pragma unroll
    for (int i = 0; i < C::kBlocksA; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int k = first_filter + filter + 16 * i + lane / 4 + 8 * half;
        if (k >= p.extent_a) continue;
        float* const to = part + (int64_t{k} * p.pitch_b + (r * p.s + s) * kStemChannels + channel);
        store(to, Vec<float, 2>{sums.v[i][j][2 * half], sums.v[i][j][2 * half + 1]});
      }
    }
  }
}

}  // namespace fastconv::cuda::inline sm80
