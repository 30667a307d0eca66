// Depthwise convolution by 3x3 and 5x5 filters with stride 1 or 2 and without dilation; formulas, blocks and lanes as
// in kernel.cuh. For vectors of channels (nhwc), for vectors of pixels along a row (nchw), and for single elements
// (any).
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
// lie in shared memory; those that are small enough are kept in registers.
//
// Bound by memory: x and y (or dy, y and dx) once, but for the rows that strips share.
#pragma once

#include "cuda/depthwise_conv2d/sm80/kernel.cuh"
#include "cuda/depthwise_conv2d/sm80/strip_rows.cuh"

namespace fastconv::cuda::inline sm80::depthwise {

// ---------------------------------------------------------------------------------------------- fprop

template <class T, Vectors kVectors, int kWidth, int kColumns, int kFilter, int kStride>
FASTCONV_KERNEL(kStripThreads, strip_resident(Pass::kFprop, kVectors, kFilter, kStride))
fprop_strips(const DepthwiseConv2dParams p) {
  using A = Compute<T>;
  constexpr int kLive = (kFilter + kStride - 1) / kStride, kPixels = (kColumns - 1) * kStride + kFilter;
  const BlockFilters<T> filters(p, kWidth);
  const int lane = static_cast<int>(threadIdx.x) * kWidth;
  const int64_t k = filters.first + lane;
  if (k >= int64_t{p.channels} * p.multiplier) return;
  const T* input = static_cast<const T*>(p.input) + (kWidth > 1 ? k : k / p.multiplier) * p.in.c;
  T* output = static_cast<T*>(p.output) + k * p.out.c;
  Taps<A, kWidth, kFilter> taps(filters.data + lane, filters.count);

  // No overflow: a step is at most as many strips as there are, and a block.
  const unsigned strips = p.tiles;
  for (unsigned strip = blockIdx.x * blockDim.y + threadIdx.y; strip < strips; strip += gridDim.x * blockDim.y) {
    const StripPosition at(strip, p);
    const int q0 = at.column * kColumns, left = q0 * kStride - p.padding_width;
    const unsigned columns = columns_in<kPixels>(left, p.width), out_columns = columns_in<kColumns>(q0, p.out_width);
    // A step adds rows kFilter - kStride ... kFilter - 1 of the filter to row `out` of the output, which is then
    // complete, and the rows above them to the next kLive - 1.
    int out = at.begin - (kLive - 1);
    int h = out * kStride - p.padding_height + kFilter - kStride;
    const T* row = input + at.n * p.in.n + h * p.in.h + left * p.in.w;
    T* out_row = output + at.n * p.out.n + out * p.out.h + q0 * p.out.w;
    InputRow<T, kVectors, kWidth, kColumns, kFilter, kStride> next;
    next.load(row, p.in.w, is_inside(h, p.height) ? columns : 0);
    A sums[kLive][kColumns][kWidth] = {};
    for (; out < at.end; ++out, out_row += p.out.h) {
      taps.keep(p);
#pragma unroll
      for (int b = 0; b < kStride; ++b) {
        A pixels[kPixels][kWidth];
        next.unpack(pixels);
        ++h;
        row += p.in.h;
        next.load(row, p.in.w, is_inside(h, p.height) ? columns : 0);
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
      store_row<kVectors == Vectors::kPixels>(out_row, p.out.w, out_columns, sums[0]);
    }
  }
}

// ---------------------------------------------------------------------------------------------- dgrad

// The loop is over rows of grad_output. Row a meets the rows a * kStride + r of the padded input: after it, those with
// r < kStride are complete. Strips begin kPhase columns behind one of the padded input that is a multiple of the
// stride; which that is is known for vectors of pixels, whose padding is half of the filter.
template <class T, Vectors kVectors, int kWidth, int kColumns, int kFilter, int kStride>
FASTCONV_KERNEL(kStripThreads, strip_resident(Pass::kDgrad, kVectors, kFilter, kStride))
dgrad_strips(const DepthwiseConv2dParams p) {
  using A = Compute<T>;
  constexpr int kLive = (kFilter + kStride - 1) / kStride;
  constexpr int kPhase = kVectors == Vectors::kPixels ? kFilter / 2 % kStride : 0;
  constexpr int kBefore = (kFilter - 1 - kPhase) / kStride, kPixels = kBefore + (kColumns - 1 + kPhase) / kStride + 1;
  constexpr int kLeft = kBefore - kFilter / 2 / kStride, kVector = kColumns / kStride;
  using GradRow = std::conditional_t<kVectors == Vectors::kPixels, Row<T, kWidth, kPixels, kLeft, kVector, 1>,
                                     Row<T, kWidth, kPixels>>;
  const BlockFilters<T> filters(p, kWidth);
  const int lane = static_cast<int>(threadIdx.x) * kWidth;
  const int64_t c = filters.first + lane;
  if (c >= p.channels) return;
  Taps<A, kWidth, kFilter> taps(filters.data + lane, filters.count);

  // No overflow: a step is at most as many strips as there are, and a block.
  const unsigned strips = p.tiles;
  for (unsigned strip = blockIdx.x * blockDim.y + threadIdx.y; strip < strips; strip += gridDim.x * blockDim.y) {
    const StripPosition at(strip, p);
    const int w0 = at.column * kColumns - p.row_shift, q0 = (w0 + p.padding_width - kPhase) / kStride - kBefore;
    const unsigned columns = columns_in<kPixels>(q0, p.out_width), in_columns = columns_in<kColumns>(w0, p.width);
    int row = at.begin - (kLive - 1), h = row * kStride - p.padding_height;
    int64_t offset = at.n * p.out.n + c * p.out.c + row * p.out.h + q0 * p.out.w;
    T* in_row = static_cast<T*>(p.grad_input) + at.n * p.in.n + c * p.in.c + h * p.in.h + w0 * p.in.w;
    MaskedRow<T, kWidth, kPixels, GradRow> next;
    next.load(p, offset, is_inside(row, p.out_height) ? columns : 0);
    A sums[kLive][kStride][kColumns][kWidth] = {};
    while (row < at.end) {
      taps.keep(p);
      A grads[kPixels][kWidth];
      next.unpack(p, grads);
      offset += p.out.h;
      next.load(p, offset, is_inside(row + 1, p.out_height) ? columns : 0);
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
              if ((i + kPhase - s) % kStride != 0) continue;
              const int j = (i + kPhase - s) / kStride + kBefore;
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
        if (row >= at.begin && is_inside(h + b, p.height)) {
          store_row<kVectors == Vectors::kPixels>(in_row + b * p.in.h, p.in.w, in_columns, sums[0][b]);
        }
      }
      ++row;
      h += kStride;
      in_row += kStride * p.in.h;
    }
  }
}

// ---------------------------------------------------------------------------------------------- wgrad

template <class T, Vectors kVectors, int kWidth, int kColumns, int kFilter, int kStride>
FASTCONV_KERNEL(kStripThreads, strip_resident(Pass::kWgrad, kVectors, kFilter, kStride))
wgrad_strips(const DepthwiseConv2dParams p) {
  using A = Compute<T>;
  constexpr int kPixels = (kColumns - 1) * kStride + kFilter;
  using GradRow = std::conditional_t<kVectors == Vectors::kPixels, Row<T, kWidth, kColumns, 0, kColumns, 1>,
                                     Row<T, kWidth, kColumns>>;
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
      InputRow<T, kVectors, kWidth, kColumns, kFilter, kStride> rows[kFilter];  // one for each of the filter
      const auto load_next = [&](int r) {
        rows[r].load(row, p.in.w, is_inside(h, p.height) ? columns : 0);
        ++h;
        row += p.in.h;
      };
#pragma unroll
      for (int r = 0; r < kFilter; ++r) load_next(r);
      MaskedRow<T, kWidth, kColumns, GradRow> next;
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
          rows[r].unpack(pixels);
          if (r + kStride < kFilter) {
            rows[r] = rows[r + kStride];
          } else {
            load_next(r);
          }
#pragma unroll
          for (int q = 0; q < kColumns; ++q) {
            // A gradient of 0 beyond the row's end would not do: the pixel may be Inf.
            if (kVectors != Vectors::kPixels && q > 0 && q >= rest) break;
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
