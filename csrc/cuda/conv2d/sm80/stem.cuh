// The kernel of a network's first convolution, see ../stem.h: windows of a patch of the image (see stem_patch.cuh) by
// filters. Weights come once to a block, which does one tile after the other.
//
// Taps beyond the filter have weights of 0, but an image may have an Inf there: the last step of a row drops them.
#pragma once

#include "cuda/conv2d/sm80/math.cuh"
#include "cuda/conv2d/sm80/stem_patch.cuh"

namespace fastconv::cuda::inline sm80 {

template <class T_, int kFilters_, int kStride_>
struct StemConfig {
  using T = T_;
  static constexpr int kFilters = kFilters_, kStride = kStride_, kBlocks = stem_blocks(kFilters);
  static constexpr int kRows = kStemRows * 32 / kStemThreads;  // of the result, to a warp
  static constexpr int kPixelPitch = stem_pixel_pitch(kFilters), kSlabBytes = stem_slab_bytes(kFilters);
  static_assert(kFilters % 16 == 0 && (kStride == 1 || kStride == 2 || kStride == 4));
};

// ---------------------------------------------------------------------------------------------------- operands

template <class C>
FASTCONV_DEVICE void bring_stem_filters(const StemParams& p, unsigned char* shared, int first) {
  using T = typename C::T;
  const Strides& strides = p.weight_strides;
  const int taps = p.steps * kStemTaps, all = C::kFilters * p.r * taps;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < all; i += kStemThreads) {
    int s, r;
    const int filter = divide(p.by_rows, divide(p.by_taps, i, s), r);
    const int k = first + filter;
    const T* const from = static_cast<const T*>(p.weight) + (k * strides.n + r * strides.h + s * strides.w);
    const auto tap = channels_of(from, strides.c, p.c, k < p.k && s < p.s);
    store(reinterpret_cast<T*>(shared + filter * p.filter_pitch) + (r * taps + s) * kStemChannels, tap);
  }
  float* const biases = reinterpret_cast<float*>(shared + p.biases_at);
  if (const int k = first + static_cast<int>(threadIdx.x); threadIdx.x < C::kFilters) {
    biases[threadIdx.x] = p.bias && k < p.k ? to_float(static_cast<const T*>(p.bias)[k]) : 0.0f;
  }
}

// ---------------------------------------------------------------------------------------------------- products

template <class C>
FASTCONV_DEVICE void multiply_stem(const StemParams& p, unsigned char* shared, int warp, int lane,
                                   Accumulator<C::kRows, C::kFilters / 8>& sums) {
  using T = typename C::T;
  constexpr uint32_t kPatchStep = kStemStep<C::kStride>, kFilterStep = 32;
  // Of a row's last step: whether the filter has the taps that this lane's elements belong to
  const int last_taps = p.s - (p.steps - 1) * kStemTaps, tap = lane % 4 / 2;
  const uint32_t low = tap < last_taps ? ~0u : 0u, high = 2 + tap < last_taps ? ~0u : 0u;
  const int filter = lane % 8 + lane / 16 * 8;
  uint32_t filters = ptx::smem_address(shared) + static_cast<uint32_t>(filter * p.filter_pitch + lane / 8 % 2 * 16);
  const uint32_t row_step = static_cast<uint32_t>(p.stride_h * p.row_pitch);
  uint32_t row = ptx::smem_address(shared) + static_cast<uint32_t>(p.patch_at + stem_row_of_lane<C::kStride>(p, lane)) +
                 static_cast<uint32_t>(warp * C::kRows) * row_step;
#pragma unroll 1
  for (int r = 0; r < p.r; ++r, row += static_cast<uint32_t>(p.dilation_h * p.row_pitch)) {
    uint32_t pixels = row;
#pragma unroll 1
    for (int step = 1; step <= p.steps; ++step, pixels += kPatchStep, filters += kFilterStep) {
      typename HalfMath<T>::template Fragments<C::kRows, C::kFilters / 8> f;
#pragma unroll
      for (int i = 0; i < C::kRows; ++i) ptx::ldmatrix_x4(f.a[i], pixels + static_cast<uint32_t>(i) * row_step);
#pragma unroll
      for (int j = 0; j < C::kFilters / 16; ++j) {
        ptx::ldmatrix_x4(f.b[j], filters + static_cast<uint32_t>(16 * j * p.filter_pitch));
      }
      if (step == p.steps) {
#pragma unroll
        for (int i = 0; i < C::kRows; ++i) f.a[i][0] &= low, f.a[i][1] &= low, f.a[i][2] &= high, f.a[i][3] &= high;
      }
      HalfMath<T>::multiply(sums, f);
    }
  }
}

// ----------------------------------------------------------------------------------------------------- results

// What a warp has of 16 pixels of a row, through its slab: by pixels, or where those lie side by side in memory by
// filters.
template <class C>
class StemResults {
 public:
  using T = typename C::T;
  static constexpr int kRun = kStemRun;

  FASTCONV_DEVICE StemResults(const StemParams& params, unsigned char* shared, int warp, int first)
      : p(params),
        slab(shared + params.slabs_at + warp * C::kSlabBytes),
        biases(reinterpret_cast<const float*>(shared + params.biases_at)),
        first_filter(first) {}

  FASTCONV_DEVICE void put(const float (&sums)[C::kFilters / 8][4], int lane) const {
    const int pixel = lane / 4, filter = lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < C::kFilters / 8; ++j) {
      const Vec<float, 2> bias = load<2>(biases + 8 * j + filter);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Vec<T, 2> pair;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          pair.v[e] = from_float<T>(activate(sums[j][2 * half + e] + bias.v[e], p.activation));
        }
        if (p.runs == StemRuns::kColumns) {
          by_filter(8 * j + filter)[pixel + 8 * half] = pair.v[0];
          by_filter(8 * j + filter + 1)[pixel + 8 * half] = pair.v[1];
        } else {
          store(by_pixel(pixel + 8 * half) + 8 * j + filter, pair);
        }
      }
    }
  }

  // Writes them, from this pixel on.
  FASTCONV_DEVICE void write(const StemTile& at, int lane) const {
    if (at.row >= p.p) return;
    T* const row = static_cast<T*>(p.output) + (at.n * p.y.n + at.row * p.y.h);
    if (p.runs == StemRuns::kChannels) {
      constexpr int kRuns = C::kFilters / kRun;
#pragma unroll
      for (int i = lane; i < kStemColumns * kRuns; i += 32) {
        const int pixel = i / kRuns, filter = i % kRuns * kRun, column = at.column + pixel;
        if (column >= p.q || first_filter + filter >= p.k) continue;
        store(row + (column * p.y.w + first_filter + filter), load<kRun>(by_pixel(pixel) + filter));
      }
    } else if (p.runs == StemRuns::kColumns) {
      constexpr int kRuns = kStemColumns / kRun;
#pragma unroll
      for (int i = lane; i < C::kFilters * kRuns; i += 32) {
        const int filter = i / kRuns, pixel = i % kRuns * kRun, column = at.column + pixel;
        if (column >= p.q || first_filter + filter >= p.k) continue;
        store(row + ((first_filter + filter) * p.y.c + column), load<kRun>(by_filter(filter) + pixel));
      }
    } else {
#pragma unroll 2
      for (int i = lane; i < kStemColumns * C::kFilters; i += 32) {
        const int pixel = i % kStemColumns, filter = i / kStemColumns, column = at.column + pixel;
        if (column >= p.q || first_filter + filter >= p.k) continue;
        row[column * p.y.w + (first_filter + filter) * p.y.c] = by_pixel(pixel)[filter];
      }
    }
  }

 private:
  FASTCONV_DEVICE T* by_pixel(int pixel) const { return reinterpret_cast<T*>(slab + pixel * C::kPixelPitch); }
  FASTCONV_DEVICE T* by_filter(int filter) const { return reinterpret_cast<T*>(slab + filter * kStemFilterPitch); }

  const StemParams& p;
  unsigned char* const slab;
  const float* const biases;
  const int first_filter;
};

template <class C>
FASTCONV_KERNEL(kStemThreads, C::kBlocks)
conv2d_stem_kernel(const __grid_constant__ StemParams p) {
  unsigned char* const shared = dynamic_smem<unsigned char>();
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = lane_of_warp();
  const int first_filter = static_cast<int>(blockIdx.y) * C::kFilters;
  bring_stem_filters<C>(p, shared, first_filter);
  const StemResults<C> results(p, shared, warp, first_filter);
#pragma unroll 1
  for (int index = static_cast<int>(blockIdx.x); index < p.tiles; index += static_cast<int>(gridDim.x)) {
    StemTile tile = stem_tile(p, index);
    __syncthreads();  // all have read the patch before
    bring_stem_patch<typename C::T, C::kStride>(p, shared + p.patch_at, tile);
    __syncthreads();
    Accumulator<C::kRows, C::kFilters / 8> sums{};
    multiply_stem<C>(p, shared, warp, lane, sums);
    tile.row += warp * C::kRows;
#pragma unroll
    for (int i = 0; i < C::kRows; ++i, ++tile.row) {
      results.put(sums.v[i], lane);
      __syncwarp();
      results.write(tile, lane);
      __syncwarp();
    }
  }
}

}  // namespace fastconv::cuda::inline sm80
