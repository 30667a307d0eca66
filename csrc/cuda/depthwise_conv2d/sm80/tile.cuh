// What the kernels of depthwise and depthwise-separable convolutions share: how filters come into shared
// memory, and how a thread convolves a tile of pixels.
#pragma once

#include "cuda/depthwise_conv2d/params.h"
#include "cuda/runtime/scalar.cuh"

namespace fastconv::cuda::inline sm80::depthwise {

constexpr int kTile = kDepthwiseTile;
template <class T>
constexpr int kLane = lane_channels(sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32);

FASTCONV_DEVICE int flat_thread() { return static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x); }

// A tile of pixels: image n, row, and the number of the tile in the row
struct TilePosition {
  FASTCONV_DEVICE TilePosition(unsigned tile, int rows, const DepthwiseConv2dParams& p) {
    const unsigned inner = p.rows_first ? rows : p.row_tiles, outer = p.rows_first ? p.row_tiles : rows;
    const unsigned rest = tile / inner, a = tile - rest * inner;
    n = static_cast<int>(rest / outer);
    const unsigned b = rest - n * outer;
    row = static_cast<int>(p.rows_first ? a : b);
    column = static_cast<int>(p.rows_first ? b : a);
  }
  int n, row, column;
};

// The filters of `count` output channels from `first`, as [tap][count], and the bias (or zeros) behind them
template <class T>
FASTCONV_DEVICE void fill_filters(Compute<T>* filters, const DepthwiseConv2dParams& p, int64_t first, int count) {
  const int taps = p.filter_height * p.filter_width, threads = static_cast<int>(blockDim.x * blockDim.y);
  const int64_t all = int64_t{p.channels} * p.multiplier;
  const T* weight = static_cast<const T*>(p.weight) + first * taps;
  for (int i = flat_thread(); i < count * taps; i += threads) {
    const int k = i / taps, tap = i - k * taps;
    filters[tap * count + k] = first + k < all ? widen(weight[i]) : Compute<T>(0);
  }
  const T* bias = static_cast<const T*>(p.bias);
  for (int k = flat_thread(); k < count; k += threads) {
    filters[taps * count + k] = bias && first + k < all ? widen(bias[first + k]) : Compute<T>(0);
  }
}

// The filters of a block's channels, `count` of them, that all its threads have filled in
template <class T>
struct BlockFilters {
  int count;
  int64_t first;
  Compute<T>* data;

  FASTCONV_DEVICE BlockFilters(const DepthwiseConv2dParams& p, int of_lane)
      : count(static_cast<int>(blockDim.x) * of_lane),
        first(int64_t{blockIdx.y} * count),
        data(dynamic_smem<Compute<T>>()) {
    fill_filters<T>(data, p, first, count);
    __syncthreads();
  }
};

template <class A, int kWidth>
FASTCONV_DEVICE void multiply_add(const A (&a)[kWidth], const A (&b)[kWidth], A (&sum)[kWidth]) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sum[i] = fused_multiply_add(a[i], b[i], sum[i]);
}

// The sums of a tile's pixels, from the bias. `input` and `filters` begin with this thread's channels; `count` as in
// fill_filters. kFilter: the filter's width, for dilation 1 and stride kStride along the row; 0 for any.
template <int kFilter, int kStride, class T, int kWidth>
FASTCONV_DEVICE void convolve_tile(const DepthwiseConv2dParams& p, const T* input, const Compute<T>* filters, int count,
                                   const TilePosition& at, Compute<T> (&sums)[kTile][kWidth]) {
  using A = Compute<T>;
#pragma unroll
  for (int q = 0; q < kTile; ++q) copy(filters + p.filter_height * p.filter_width * count, sums[q]);
  const int left = at.column * kTile * p.stride_width - p.padding_width;
  for (int r = 0; r < p.filter_height; ++r) {
    const int h = at.row * p.stride_height - p.padding_height + r * p.dilation_height;
    if (h < 0 || h >= p.height) continue;
    const T* row = input + at.n * p.in.n + h * p.in.h;
    const A* row_filters = filters + r * p.filter_width * count;
    if constexpr (kFilter > 0) {
      A taps[kFilter][kWidth];
#pragma unroll
      for (int s = 0; s < kFilter; ++s) copy(row_filters + s * count, taps[s]);
#pragma unroll
      for (int j = 0; j < (kTile - 1) * kStride + kFilter; ++j) {
        const int w = left + j;
        A pixel[kWidth];
        load_wide_if(w >= 0 && w < p.width, row + w * p.in.w, pixel);
#pragma unroll
        for (int q = 0; q < kTile; ++q) {
          const int s = j - q * kStride;
          if (s >= 0 && s < kFilter) multiply_add(pixel, taps[s], sums[q]);
        }
      }
    } else {
      for (int s = 0; s < p.filter_width; ++s) {
        A tap[kWidth];
        copy(row_filters + s * count, tap);
#pragma unroll
        for (int q = 0; q < kTile; ++q) {
          const int w = left + q * p.stride_width + s * p.dilation_width;
          if (w < 0 || w >= p.width) continue;
          A pixel[kWidth];
          load_wide(row + w * p.in.w, pixel);
          multiply_add(pixel, tap, sums[q]);
        }
      }
    }
  }
}

}  // namespace fastconv::cuda::inline sm80::depthwise
