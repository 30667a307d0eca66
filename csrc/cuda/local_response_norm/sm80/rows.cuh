// LRN of channels that lie side by side (NHWC): a block owns some pixels and all of their channels (or a tile with its
// halo), a thread a vector of channels; shared memory holds x, and t for the gradient. Its index skips every 33rd word,
// which keeps the threads' strides of a vector free of bank conflicts.
#pragma once

#include "cuda/local_response_norm/sm80/arithmetic.cuh"

namespace fastconv::cuda::inline sm80::lrn {

// Where word i of a row is kept
FASTCONV_HOST_DEVICE int slot(int i) { return i + i / 32; }

// A block's row of a pixel: `tile` channels from `first`, and a halo on both sides
struct RowTile {
  FASTCONV_DEVICE explicit RowTile(const LocalResponseNormParams& p, int width)
      : tile(static_cast<int>(blockDim.x) * width), first(static_cast<int>(blockIdx.y) * tile) {
    pixel = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
    inside = pixel < p.outer;
  }
  int tile, first;
  int64_t pixel;
  bool inside;
};

// x of the channels first - before ... first + tile + after - 1 into `row`; own: this thread's part of the tile
template <class T, int kWidth>
FASTCONV_DEVICE void fill_row(Compute<T>* row, Compute<T> (&own)[kWidth], const T* input, const RowTile& at, int before,
                              int after, const LocalResponseNormParams& p) {
  const int c = at.first + static_cast<int>(threadIdx.x) * kWidth;
  load_wide_if(at.inside && c < p.channels, input + c, own);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    own[i] = activate(own[i], p.activation);
    row[slot(before + c - at.first + i)] = own[i];
  }
  for (int h = threadIdx.x; h < before + after; h += blockDim.x) {
    const int position = h < before ? h : h + at.tile;
    const int channel = at.first - before + position;
    const bool exists = at.inside && channel >= 0 && channel < p.channels;
    row[slot(position)] = exists ? activate(widen(input[channel]), p.activation) : Compute<T>(0);
  }
}

// The sums of `count` words (or their squares) from position + 0, position + 1, ... . kSize: the count if known, which
// saves reading a word once for each sum it is in
template <bool kSquares, int kSize, class A, int kWidth>
FASTCONV_DEVICE void sum_row(const A* row, int position, int count, A (&sums)[kWidth]) {
  if constexpr (kSize > 0) {
    A words[kSize + kWidth - 1];
#pragma unroll
    for (int i = 0; i < kSize + kWidth - 1; ++i) {
      words[i] = row[slot(position + i)];
      if (kSquares) words[i] *= words[i];
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      sums[i] = words[i];
#pragma unroll
      for (int w = 1; w < kSize; ++w) sums[i] += words[i + w];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sums[i] = 0;
    for (int w = 0; w < count; ++w) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const A word = row[slot(position + w + i)];
        sums[i] = kSquares ? fused_multiply_add(word, word, sums[i]) : sums[i] + word;
      }
    }
  }
}

FASTCONV_HOST_DEVICE int row_words(int length) { return slot(length - 1) + 1; }

template <class T, int kWidth, int kSize>
FASTCONV_KERNEL(kThreads, 4)
fprop_rows(const LocalResponseNormParams p) {
  using A = Compute<T>;
  const RowTile at(p, kWidth);
  A* row = dynamic_smem<A>() + threadIdx.y * row_words(p.before + at.tile + p.after);
  const T* x = static_cast<const T*>(p.input) + at.pixel * p.channels;
  A own[kWidth];
  fill_row(row, own, x, at, p.before, p.after, p);
  __syncthreads();
  const int offset = static_cast<int>(threadIdx.x) * kWidth;
  if (!at.inside || at.first + offset >= p.channels) return;
  A sums[kWidth];
  sum_row<true, kSize>(row, offset, p.before + 1 + p.after, sums);
  normalize<T>(own, sums, p);
  store_narrow(static_cast<T*>(p.output) + at.pixel * p.channels + at.first + offset, own);
}

template <class T, int kWidth, int kSize>
FASTCONV_KERNEL(kThreads, 3)
dgrad_rows(const LocalResponseNormParams p) {
  using A = Compute<T>;
  const RowTile at(p, kWidth);
  const int halo = p.before + p.after, window = halo + 1;
  // Seen from channel i, the windows that hold it are the mirror image of its own: t reaches `after` to the left.
  const int x_words = row_words(at.tile + 2 * halo), t_words = row_words(at.tile + halo);
  A* x_row = dynamic_smem<A>() + threadIdx.y * (x_words + t_words);  // from channel first - halo
  A* t_row = x_row + x_words;                                        // from channel first - after
  const int64_t start = at.pixel * p.channels;
  const T* x = static_cast<const T*>(p.input) + start;
  const T* g = static_cast<const T*>(p.grad_output) + start;
  const int offset = static_cast<int>(threadIdx.x) * kWidth;
  const bool inside = at.inside && at.first + offset < p.channels;
  A own[kWidth], scaled[kWidth];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) scaled[i] = 0;
  if (inside) load_wide(g + at.first + offset, scaled);
  fill_row(x_row, own, x, at, halo, halo, p);
  __syncthreads();

  A sums[kWidth];
  if (inside) {
    sum_row<true, kSize>(x_row, offset + p.after, window, sums);
    make_terms<T>(scaled, own, sums, p);
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sums[i] = 0;
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) t_row[slot(p.after + offset + i)] = sums[i];
  for (int h = threadIdx.x; h < halo; h += blockDim.x) {
    const int position = h < p.after ? h : h + at.tile;
    const int channel = at.first - p.after + position;
    A t = 0;
    if (at.inside && channel >= 0 && channel < p.channels) {
      A sum[1];
      sum_row<true, kSize>(x_row, position, window, sum);
      A grad[1] = {widen(g[channel])};
      const A mine[1] = {x_row[slot(position + p.before)]};
      make_terms<T>(grad, mine, sum, p);
      t = sum[0];
    }
    t_row[slot(position)] = t;
  }
  __syncthreads();

  if (!inside) return;
  sum_row<false, kSize>(t_row, offset, window, sums);
  make_gradients<true>(scaled, own, sums, p);
  store_narrow(static_cast<T*>(p.output) + start + at.first + offset, scaled);
}

}  // namespace fastconv::cuda::inline sm80::lrn
