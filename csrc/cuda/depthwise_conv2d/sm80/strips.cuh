// Depthwise convolution by 3x3 and 5x5 filters with stride 1 or 2 and without dilation; formulas as in kernel.cuh.
//
// A thread owns strips of the result: kColumns neighbouring columns of a channel (or of a vector of channels), and
// p.strip_rows rows of them, from top to bottom. Every row of the source is loaded once, a step before it is needed,
// and serves all results that it belongs to while it is in registers:
//
//   fprop  the sums of the kLive rows of the output that a row of the input may belong to
//   dgrad  likewise of grad_input, where a step makes kStride rows
//   wgrad  kFilter rows of the input, and the sums of all taps, which end up in the workspace as kernel.cuh's do
//
// Sums move on by one row with each step: the first multiplication of a step adds to the sum of the row below. Filters
// lie in shared memory, as [tap][channel] in the type of computation, the bias behind them; those of 3x3 taps are kept
// in registers.
//
// Bound by memory: x and y (or dy, y and dx) once, but for the rows that strips share.
#pragma once

#include "cuda/depthwise_conv2d/sm80/kernel.cuh"
#include "cuda/runtime/packed.cuh"

namespace fastconv::cuda::inline sm80::depthwise {

// Where a strip is: image n, the number of the strip from the top, and of its columns from the left
struct StripPosition {
  FASTCONV_DEVICE StripPosition(unsigned strip, const DepthwiseConv2dParams& p) {
    const unsigned rest = strip / p.row_tiles;
    column = static_cast<int>(strip - rest * p.row_tiles);
    n = static_cast<int>(rest / p.strips);
    const int first = static_cast<int>(rest - n * p.strips) * p.strip_rows;
    begin = p.first_row + first;
    end = p.first_row + (first + p.strip_rows < p.rows ? first + p.strip_rows : p.rows);
  }
  int n, column;
  int begin, end;  // rows
};

FASTCONV_DEVICE bool is_row(int h, int height) { return static_cast<unsigned>(h) < static_cast<unsigned>(height); }

// Which of the columns left ... left + kCount - 1 a row has, as bits
template <int kCount>
FASTCONV_DEVICE unsigned columns_in(int left, int width) {
  unsigned bits = 0;
#pragma unroll
  for (int j = 0; j < kCount; ++j)
    bits |= static_cast<unsigned>(left + j) < static_cast<unsigned>(width) ? 1u << j : 0u;
  return bits;
}

// The pixels of a row, zeros for those that do not exist
template <class T, int kWidth, int kCount>
FASTCONV_DEVICE void load_row(Packed<T, kWidth> (&pixels)[kCount], const T* row, int64_t step, unsigned exist) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) pixels[j] = load_packed_if<kWidth>(exist >> j & 1, row + j * step);
}

template <class T, int kWidth, int kCount>
FASTCONV_DEVICE void unpack_row(const Packed<T, kWidth> (&pixels)[kCount], Compute<T> (&values)[kCount][kWidth]) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) unpack<T, kWidth>(pixels[j], values[j]);
}

// The filters of a thread's channels, and the bias behind them
template <class A, int kWidth, int kFilter>
struct Taps {
  FASTCONV_DEVICE Taps(const A* filters, int count) : filters(filters), count(count) {
    if constexpr (kHeld) {
#pragma unroll
      for (int tap = 0; tap <= kFilter * kFilter; ++tap) read(tap, held[tap]);
    }
  }
  FASTCONV_DEVICE void get(int tap, A (&values)[kWidth]) const {
    if constexpr (kHeld) {
      copy(held[tap], values);
    } else {
      read(tap, values);
    }
  }
  // Once in every step. The dilation is 1, but the compiler does not know, and reads the taps where they are used
  // rather than all of them before the loop, which would not fit into the registers.
  FASTCONV_DEVICE void keep(const DepthwiseConv2dParams& p) {
    if constexpr (!kHeld) filters += p.dilation_width - 1;
  }

 private:
  FASTCONV_DEVICE void read(int tap, A (&values)[kWidth]) const {
    const Vec<A, kWidth> found = load<kWidth>(filters + tap * count);
    copy(found.v, values);
  }
  static constexpr bool kHeld = kFilter == 3;
  const A* filters;
  int count;
  A held[kHeld ? kFilter * kFilter + 1 : 1][kWidth];
};

// The activation is decided on for all of them at once.
template <class A, int kColumns, int kWidth>
FASTCONV_DEVICE void activate_all(A (&values)[kColumns][kWidth], Activation activation) {
  const auto each = [&](auto f) {
#pragma unroll
    for (int q = 0; q < kColumns; ++q) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) values[q][i] = f(values[q][i]);
    }
  };
  if (activation == Activation::kRelu) each([](A v) { return activate(v, Activation::kRelu); });
  if (activation == Activation::kRelu6) each([](A v) { return activate(v, Activation::kRelu6); });
}

// Pixels of a row of dy where the activation let y through, else 0
template <class T, int kWidth, int kCount>
struct MaskedRow {
  FASTCONV_DEVICE void load(const DepthwiseConv2dParams& p, int64_t offset, unsigned exist) {
    load_row<T, kWidth>(grads, static_cast<const T*>(p.grad_output) + offset, p.out.w, exist);
    if (p.activated) load_row<T, kWidth>(outputs, static_cast<const T*>(p.activated) + offset, p.out.w, exist);
  }
  FASTCONV_DEVICE void unpack(const DepthwiseConv2dParams& p, Compute<T> (&values)[kCount][kWidth]) const {
    using A = Compute<T>;
    unpack_row<T, kWidth>(grads, values);
    const auto each = [&](auto passes) {
      A activated[kCount][kWidth];
      unpack_row<T, kWidth>(outputs, activated);
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) values[j][i] = passes(activated[j][i]) ? values[j][i] : A(0);
      }
    };
    if (!p.activated) return;
    if (p.activation == Activation::kRelu) {
      each([](A v) { return passes_gradient(v, Activation::kRelu); });
    } else {
      each([](A v) { return passes_gradient(v, Activation::kRelu6); });
    }
  }

 private:
  Packed<T, kWidth> grads[kCount], outputs[kCount];
};

// ---------------------------------------------------------------------------------------------- fprop

template <class T, int kWidth, int kColumns, int kFilter, int kStride>
FASTCONV_KERNEL(kStripThreads, strip_resident(Pass::kFprop, kFilter, kStride))
fprop_strips(const DepthwiseConv2dParams p) {
  using A = Compute<T>;
  constexpr int kLive = (kFilter + kStride - 1) / kStride, kPixels = (kColumns - 1) * kStride + kFilter;
  A* filters = dynamic_smem<A>();
  const int count = static_cast<int>(blockDim.x) * kWidth;
  const int64_t first = int64_t{blockIdx.y} * count;
  fill_filters<T>(filters, p, first, count);
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x) * kWidth;
  const int64_t k = first + lane;
  if (k >= int64_t{p.channels} * p.multiplier) return;
  const T* input = static_cast<const T*>(p.input) + (kWidth > 1 ? k : k / p.multiplier) * p.in.c;
  T* output = static_cast<T*>(p.output) + k * p.out.c;
  Taps<A, kWidth, kFilter> taps(filters + lane, count);

  for (int64_t strip = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; strip < p.tiles;
       strip += int64_t{gridDim.x} * blockDim.y) {
    const StripPosition at(static_cast<unsigned>(strip), p);
    const int q0 = at.column * kColumns, left = q0 * kStride - p.padding_width;
    const unsigned columns = columns_in<kPixels>(left, p.width);
    // A step adds rows kFilter - kStride ... kFilter - 1 of the filter to row `out` of the output, which is then
    // complete, and the rows above them to the next kLive - 1.
    int out = at.begin - (kLive - 1);
    int h = out * kStride - p.padding_height + kFilter - kStride;
    const T* row = input + at.n * p.in.n + h * p.in.h + left * p.in.w;
    T* out_row = output + at.n * p.out.n + out * p.out.h + q0 * p.out.w;
    Packed<T, kWidth> packed[kPixels];
    load_row<T, kWidth>(packed, row, p.in.w, is_row(h, p.height) ? columns : 0);
    A sums[kLive][kColumns][kWidth] = {};
    for (; out < at.end; ++out, out_row += p.out.h) {
      taps.keep(p);
#pragma unroll
      for (int b = 0; b < kStride; ++b) {
        A pixels[kPixels][kWidth];
        unpack_row<T, kWidth>(packed, pixels);
        ++h;
        row += p.in.h;
        load_row<T, kWidth>(packed, row, p.in.w, is_row(h, p.height) ? columns : 0);
#pragma unroll
        for (int m = 0; m < kLive; ++m) {
          const int r = kFilter - kStride + b - kStride * m;
          if (r < 0) continue;
          const bool begins = b == 0 || r == 0;
          A bias[kWidth];
          if (m + 1 == kLive) taps.get(kFilter * kFilter, bias);
#pragma unroll
          for (int s = 0; s < kFilter; ++s) {
            A tap[kWidth];
            taps.get(r * kFilter + s, tap);
#pragma unroll
            for (int q = 0; q < kColumns; ++q) {
#pragma unroll
              for (int i = 0; i < kWidth; ++i) {
                const A before = !begins || s > 0 ? sums[m][q][i] : m + 1 < kLive ? sums[m + 1][q][i] : bias[i];
                sums[m][q][i] = fused_multiply_add(pixels[q * kStride + s][i], tap[i], before);
              }
            }
          }
        }
      }
      if (out < at.begin) continue;
      activate_all(sums[0], p.activation);
#pragma unroll
      for (int q = 0; q < kColumns; ++q) {
        if (q < p.out_width - q0) store_packed(out_row + q * p.out.w, sums[0][q]);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------- dgrad

// The loop is over rows of grad_output. Row a meets the rows a * kStride + r of the padded input: after it, those with
// r < kStride are complete. In tiles of kColumns columns, which begin where (w + padding) is a multiple of the stride.
template <class T, int kWidth, int kColumns, int kFilter, int kStride>
FASTCONV_KERNEL(kStripThreads, strip_resident(Pass::kDgrad, kFilter, kStride))
dgrad_strips(const DepthwiseConv2dParams p) {
  using A = Compute<T>;
  constexpr int kLive = (kFilter + kStride - 1) / kStride, kBefore = (kFilter - 1) / kStride;
  constexpr int kPixels = kBefore + (kColumns - 1) / kStride + 1;
  A* filters = dynamic_smem<A>();
  const int count = static_cast<int>(blockDim.x) * kWidth;
  const int64_t first = int64_t{blockIdx.y} * count;
  fill_filters<T>(filters, p, first, count);
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x) * kWidth;
  const int64_t c = first + lane;
  if (c >= p.channels) return;
  Taps<A, kWidth, kFilter> taps(filters + lane, count);

  for (int64_t strip = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; strip < p.tiles;
       strip += int64_t{gridDim.x} * blockDim.y) {
    const StripPosition at(static_cast<unsigned>(strip), p);
    const int w0 = at.column * kColumns - p.row_shift, q0 = (w0 + p.padding_width) / kStride - kBefore;
    const unsigned columns = columns_in<kPixels>(q0, p.out_width), in_columns = columns_in<kColumns>(w0, p.width);
    int row = at.begin - (kLive - 1), h = row * kStride - p.padding_height;
    int64_t offset = at.n * p.out.n + c * p.out.c + row * p.out.h + q0 * p.out.w;
    T* in_row = static_cast<T*>(p.grad_input) + at.n * p.in.n + c * p.in.c + h * p.in.h + w0 * p.in.w;
    MaskedRow<T, kWidth, kPixels> next;
    next.load(p, offset, is_row(row, p.out_height) ? columns : 0);
    A sums[kLive][kStride][kColumns][kWidth] = {};
    for (; row < at.end;) {
      taps.keep(p);
      A grads[kPixels][kWidth];
      next.unpack(p, grads);
      offset += p.out.h;
      next.load(p, offset, is_row(row + 1, p.out_height) ? columns : 0);
#pragma unroll
      for (int m = 0; m < kLive; ++m) {
#pragma unroll
        for (int b = 0; b < kStride; ++b) {
          const int r = b + m * kStride;
          if (r >= kFilter) continue;
#pragma unroll
          for (int s = 0; s < kFilter; ++s) {
            A tap[kWidth];
            taps.get(r * kFilter + s, tap);
#pragma unroll
            for (int i = 0; i < kColumns; ++i) {
              if ((i - s) % kStride != 0) continue;
              const int j = (i - s) / kStride + kBefore;
#pragma unroll
              for (int v = 0; v < kWidth; ++v) {
                const A before = s >= kStride ? sums[m][b][i][v] : r + kStride < kFilter ? sums[m + 1][b][i][v] : A(0);
                sums[m][b][i][v] = fused_multiply_add(grads[j][v], tap[v], before);
              }
            }
          }
        }
      }
#pragma unroll
      for (int b = 0; b < kStride; ++b) {
        if (row >= at.begin && is_row(h + b, p.height)) {
#pragma unroll
          for (int i = 0; i < kColumns; ++i) {
            if (in_columns >> i & 1) store_packed(in_row + b * p.in.h + i * p.in.w, sums[0][b][i]);
          }
        }
      }
      ++row;
      h += kStride;
      in_row += kStride * p.in.h;
    }
  }
}

// ---------------------------------------------------------------------------------------------- wgrad

template <class T, int kWidth, int kColumns, int kFilter, int kStride>
FASTCONV_KERNEL(kStripThreads, strip_resident(Pass::kWgrad, kFilter, kStride))
wgrad_strips(const DepthwiseConv2dParams p) {
  using A = Compute<T>;
  constexpr int kPixels = (kColumns - 1) * kStride + kFilter;
  const int chunk = static_cast<int>(blockIdx.x), all = p.channels * p.multiplier;
  const int k = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x) * kWidth;
  A sums[kFilter * kFilter + 1][kWidth] = {};  // the last: of the bias
  if (k < all) {
    const T* input = static_cast<const T*>(p.input) + int64_t{kWidth > 1 ? k : k / p.multiplier} * p.in.c;
    const int64_t begin = int64_t{chunk} * p.tiles_per_chunk;
    const int64_t end = begin + p.tiles_per_chunk < p.tiles ? begin + p.tiles_per_chunk : p.tiles;
    for (int64_t strip = begin + threadIdx.y; strip < end; strip += blockDim.y) {
      const StripPosition at(static_cast<unsigned>(strip), p);
      const int q0 = at.column * kColumns, left = q0 * kStride - p.padding_width, rest = p.out_width - q0;
      const unsigned columns = columns_in<kPixels>(left, p.width), out_columns = columns_in<kColumns>(q0, p.out_width);
      int h = at.begin * kStride - p.padding_height;
      const T* row = input + at.n * p.in.n + h * p.in.h + left * p.in.w;
      int64_t offset = at.n * p.out.n + k * p.out.c + at.begin * p.out.h + q0 * p.out.w;
      Packed<T, kWidth> rows[kFilter][kPixels];  // of the input, one for each of the filter
      const auto load_next = [&](int r) {
        load_row<T, kWidth>(rows[r], row, p.in.w, is_row(h, p.height) ? columns : 0);
        ++h;
        row += p.in.h;
      };
#pragma unroll
      for (int r = 0; r < kFilter; ++r) load_next(r);
      MaskedRow<T, kWidth, kColumns> next;
      next.load(p, offset, out_columns);
      for (int out = at.begin; out < at.end; ++out) {
        A grads[kColumns][kWidth];
        next.unpack(p, grads);
        offset += p.out.h;
        next.load(p, offset, out + 1 < at.end ? out_columns : 0);
#pragma unroll
        for (int q = 0; q < kColumns; ++q) {
#pragma unroll
          for (int i = 0; i < kWidth; ++i) sums[kFilter * kFilter][i] += grads[q][i];
        }
#pragma unroll
        for (int r = 0; r < kFilter; ++r) {
          A pixels[kPixels][kWidth];
          unpack_row<T, kWidth>(rows[r], pixels);
          if (r + kStride < kFilter) {
#pragma unroll
            for (int j = 0; j < kPixels; ++j) rows[r][j] = rows[r + kStride][j];
          } else {
            load_next(r);
          }
#pragma unroll
          for (int q = 0; q < kColumns; ++q) {
            // A gradient of 0 beyond the row's end would not do: the pixel may be Inf.
            if (q > 0 && q >= rest) break;
#pragma unroll
            for (int s = 0; s < kFilter; ++s) multiply_add(pixels[q * kStride + s], grads[q], sums[r * kFilter + s]);
          }
        }
      }
    }
  }

  A* memory = dynamic_smem<A>();
  A* partial = static_cast<A*>(p.workspace) + int64_t{chunk} * (kFilter * kFilter + 1) * all;
#pragma unroll
  for (int tap = 0; tap <= kFilter * kFilter; ++tap) {
    sum_lanes(memory, sums[tap]);
    if (threadIdx.y != 0 || k >= all) continue;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) partial[int64_t{tap} * all + k + i] = sums[tap][i];
  }
}

}  // namespace fastconv::cuda::inline sm80::depthwise
