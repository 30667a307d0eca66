// Depthwise convolution and its gradients; letters as in fastconv/operators/convolution.py:
//
//   fprop  y[n,k,p,q]  = act(b[k] + sum over r,s of w[k,r,s] x[n,c, p*stride + r*dilation - padding, ...]), c = k / M
//   dgrad  dx[n,c,h,w] = sum over k of c, r, s of w[k,r,s] dz[n,k,p,q], where (p,q) reads (h,w) through (r,s)
//   wgrad  dw[k,r,s]   = sum over n,p,q of dz[n,k,p,q] x[n,c,...]     db[k] = sum over n,p,q of dz[n,k,p,q]
//
// where dz is dy behind the activation's mask. A block is x lanes of channels (a vector of 16 bytes each, or one
// element) by y lanes of tiles; a tile is kTile pixels of a row. A loaded vector serves all pixels of the tile that it
// belongs to, and the rows that tiles below each other share come from L1. Filters lie in shared memory, as
// [tap][channel] in the type of computation, the bias behind them.
//
//   nhwc  vectors of channels: x lanes run along memory. One filter per channel.
//   any   single elements, any strides: of NCHW a block has one channel, and y lanes run along the row.
//
// Any filter, stride and dilation; strips.cuh has kernels for the usual ones.
//
// wgrad: a block has one tap of the filter, a channel lane its sum over a chunk of the tiles; partial sums go to a
// workspace [chunk][tap, bias][k], which a second kernel adds up: always in the same order.
//
// Bound by memory: x and y (or dy, y and dx) once. Chosen among in ../plan.cpp.
#pragma once

#include "cuda/depthwise_conv2d/sm80/tile.cuh"

namespace fastconv::cuda::inline sm80::depthwise {

constexpr int kThreads = kDepthwiseThreads;

// dy where the activation let y through, else 0; zeros where there is none
template <class T, int kWidth>
FASTCONV_DEVICE void load_masked(const DepthwiseConv2dParams& p, bool exists, int64_t offset,
                                 Compute<T> (&grad)[kWidth]) {
  load_wide_if(exists, static_cast<const T*>(p.grad_output) + offset, grad);
  if (p.activated) {
    Compute<T> output[kWidth];
    load_wide_if(exists, static_cast<const T*>(p.activated) + offset, output);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) grad[i] = passes_gradient(output[i], p.activation) ? grad[i] : Compute<T>(0);
  }
}

// ---------------------------------------------------------------------------------------------- fprop

template <class T, int kWidth>
FASTCONV_KERNEL(kThreads, 2)
fprop(const DepthwiseConv2dParams p) {
  using A = Compute<T>;
  const BlockFilters<T> block(p, kWidth);
  const int lane = static_cast<int>(threadIdx.x) * kWidth;
  const int64_t k = block.first + lane;
  if (k >= int64_t{p.channels} * p.multiplier) return;
  const T* input = static_cast<const T*>(p.input) + (kWidth > 1 ? k : k / p.multiplier) * p.in.c;
  T* output = static_cast<T*>(p.output) + k * p.out.c;
  const A* const filters = block.data + lane;
  const int count = block.count;

  for (int64_t tile = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; tile < p.tiles;
       tile += int64_t{gridDim.x} * blockDim.y) {
    const TilePosition at(static_cast<unsigned>(tile), p.out_height, p);
    const int q0 = at.column * kTile;
    A sums[kTile][kWidth];
    convolve_tile<0, 1>(p, input, filters, count, at, sums);

    T* out_row = output + at.n * p.out.n + at.row * p.out.h;
#pragma unroll
    for (int q = 0; q < kTile; ++q) {
      if (q0 + q >= p.out_width) break;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sums[q][i] = activate(sums[q][i], p.activation);
      store_narrow(out_row + (q0 + q) * p.out.w, sums[q]);
    }
  }
}

// ---------------------------------------------------------------------------------------------- dgrad

// Tiles are of the input's pixels.
template <class T, int kWidth>
FASTCONV_KERNEL(kThreads, 2)
dgrad(const DepthwiseConv2dParams p) {
  using A = Compute<T>;
  const int multiplier = kWidth > 1 ? 1 : p.multiplier;
  const BlockFilters<T> block(p, kWidth * multiplier);
  const int lane = static_cast<int>(threadIdx.x) * kWidth;
  const int64_t c = int64_t{blockIdx.y} * blockDim.x * kWidth + lane;
  if (c >= p.channels) return;
  T* grad_input = static_cast<T*>(p.grad_input) + c * p.in.c;
  const A* const filters = block.data + lane * multiplier;
  const int count = block.count;

  for (int64_t tile = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; tile < p.tiles;
       tile += int64_t{gridDim.x} * blockDim.y) {
    const TilePosition at(static_cast<unsigned>(tile), p.height, p);
    const int w0 = at.column * kTile;
    A sums[kTile][kWidth];
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sums[i][j] = 0;
    }
    for (int m = 0; m < multiplier; ++m) {
      const int64_t image = at.n * p.out.n + (c * multiplier + m) * p.out.c;
      for (int r = 0; r < p.filter_height; ++r) {
        const int above = at.row + p.padding_height - r * p.dilation_height;
        const int row = above / p.stride_height;
        if (above < 0 || row * p.stride_height != above || row >= p.out_height) continue;
        const int64_t out_row = image + row * p.out.h;
        const A* row_filters = filters + r * p.filter_width * count + m;
        for (int s = 0; s < p.filter_width; ++s) {
          A tap[kWidth];
          copy(row_filters + s * count, tap);
#pragma unroll
          for (int i = 0; i < kTile; ++i) {
            const int before = w0 + i + p.padding_width - s * p.dilation_width;
            const int q = before / p.stride_width;
            if (before < 0 || q * p.stride_width != before || q >= p.out_width) continue;
            A grad[kWidth];
            load_masked<T>(p, true, out_row + q * p.out.w, grad);
            multiply_add(grad, tap, sums[i]);
          }
        }
      }
    }
    T* in_row = grad_input + at.n * p.in.n + at.row * p.in.h;
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      if (w0 + i < p.width) store_narrow(in_row + (w0 + i) * p.in.w, sums[i]);
    }
  }
}

// ---------------------------------------------------------------------------------------------- wgrad

// The sum over the block's y lanes, in lane 0
template <class A, int kWidth>
FASTCONV_DEVICE void sum_lanes(A* memory, A (&values)[kWidth]) {
  // Vectors lie an x lane apart, so that neighbours use neighbouring banks.
  const int x = static_cast<int>(threadIdx.x), lanes = static_cast<int>(blockDim.x);
  const int y = static_cast<int>(threadIdx.y);
  A* own = memory + y * lanes * kWidth + x;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) own[i * lanes] = values[i];
  __syncthreads();
  for (int rows = static_cast<int>(blockDim.y); rows > 1; rows = (rows + 1) / 2) {
    const int half = (rows + 1) / 2;
    if (y + half < rows) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) own[i * lanes] += own[i * lanes + half * lanes * kWidth];
    }
    __syncthreads();
  }
  if (y == 0) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[i] = own[i * lanes];
  }
  __syncthreads();
}

template <class T, int kWidth>
FASTCONV_KERNEL(kThreads, 2)
wgrad(const DepthwiseConv2dParams p) {
  using A = Compute<T>;
  const int taps = p.filter_height * p.filter_width, all = p.channels * p.multiplier;
  // Blocks of one chunk are neighbours: what one reads, the others find in L2.
  const int chunk = static_cast<int>(blockIdx.x) / taps, tap = static_cast<int>(blockIdx.x) - chunk * taps;
  const int r = tap / p.filter_width, s = tap - r * p.filter_width;
  const int k = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x) * kWidth;
  A sums[kWidth], bias_sums[kWidth];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sums[i] = bias_sums[i] = 0;

  if (k < all) {
    const T* input = static_cast<const T*>(p.input) + int64_t{kWidth > 1 ? k : k / p.multiplier} * p.in.c;
    const int64_t begin = int64_t{chunk} * p.tiles_per_chunk;
    const int64_t end = begin + p.tiles_per_chunk < p.tiles ? begin + p.tiles_per_chunk : p.tiles;
    for (int64_t tile = begin + threadIdx.y; tile < end; tile += blockDim.y) {
      const TilePosition at(static_cast<unsigned>(tile), p.out_height, p);
      const int q0 = at.column * kTile;
      const int64_t out_row = at.n * p.out.n + k * p.out.c + at.row * p.out.h;
      A grad[kTile][kWidth];
#pragma unroll
      for (int q = 0; q < kTile; ++q) {
        load_masked<T>(p, q0 + q < p.out_width, out_row + (q0 + q) * p.out.w, grad[q]);
        if (tap == 0) {
#pragma unroll
          for (int i = 0; i < kWidth; ++i) bias_sums[i] += grad[q][i];
        }
      }
      const int h = at.row * p.stride_height - p.padding_height + r * p.dilation_height;
      if (h < 0 || h >= p.height) continue;
      const T* row = input + at.n * p.in.n + h * p.in.h;
#pragma unroll
      for (int q = 0; q < kTile; ++q) {
        const int w = (q0 + q) * p.stride_width - p.padding_width + s * p.dilation_width;
        if (q0 + q >= p.out_width || w < 0 || w >= p.width) continue;
        A pixel[kWidth];
        load_wide(row + w * p.in.w, pixel);
        multiply_add(pixel, grad[q], sums);
      }
    }
  }

  A* memory = dynamic_smem<A>();
  A* partial = static_cast<A*>(p.workspace) + int64_t{chunk} * (taps + 1) * all;
  const auto write = [&](int row, A(&values)[kWidth]) {
    sum_lanes(memory, values);
    if (threadIdx.y != 0 || k >= all) return;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) partial[int64_t{row} * all + k + i] = values[i];
  };
  write(tap, sums);
  if (tap == 0) write(taps, bias_sums);
}

// Adds up the chunks: a block has 32 neighbouring channels of a tap, its y lanes share the chunks.
constexpr int kSumX = kDepthwiseSumX, kSumY = kDepthwiseSumY;

template <class T>
FASTCONV_KERNEL(kSumX* kSumY, 4)
wgrad_sum(const DepthwiseConv2dParams p) {
  using A = Compute<T>;
  const int taps = p.filter_height * p.filter_width, all = p.channels * p.multiplier;
  const int tap = static_cast<int>(blockIdx.x) % (taps + 1);
  const int k = static_cast<int>(blockIdx.x) / (taps + 1) * kSumX + static_cast<int>(threadIdx.x);
  A sum[1] = {0};
  if (k < all) {
    const A* partial = static_cast<const A*>(p.workspace) + int64_t{tap} * all + k;
#pragma unroll 4
    for (int chunk = threadIdx.y; chunk < p.chunks; chunk += kSumY)
      sum[0] += partial[int64_t{chunk} * (taps + 1) * all];
  }
  sum_lanes(dynamic_smem<A>(), sum);
  if (threadIdx.y != 0 || k >= all) return;
  if (tap < taps) {
    if (p.grad_weight) static_cast<T*>(p.grad_weight)[int64_t{k} * taps + tap] = narrow<T>(sum[0]);
  } else if (p.grad_bias) {
    static_cast<T*>(p.grad_bias)[k] = narrow<T>(sum[0]);
  }
}

}  // namespace fastconv::cuda::inline sm80::depthwise
