// What the kernels of strips.cuh are made of: a strip's place, rows of pixels in registers, filters.
#pragma once

#include "cuda/depthwise_conv2d/sm80/tile.cuh"
#include "cuda/runtime/divider.cuh"
#include "cuda/runtime/packed.cuh"

namespace fastconv::cuda::inline sm80::depthwise {

// Where a strip is: image n, the number of the strip from the top, and of its columns from the left
struct StripPosition {
  FASTCONV_DEVICE StripPosition(unsigned strip, const DepthwiseConv2dParams& p) {
    int number;
    n = divide(p.by_strips, divide(p.by_row_tiles, static_cast<int>(strip), column), number);
    const int first = number * p.strip_rows;
    begin = p.first_row + first;
    end = p.first_row + (first + p.strip_rows < p.rows ? first + p.strip_rows : p.rows);
  }
  int n, column;
  int begin, end;  // rows
};

FASTCONV_DEVICE bool is_inside(int i, int extent) { return static_cast<unsigned>(i) < static_cast<unsigned>(extent); }

// Which of the columns left ... left + kCount - 1 a row has, as bits
template <int kCount>
FASTCONV_DEVICE unsigned columns_in(int left, int width) {
  unsigned bits = 0;
#pragma unroll
  for (int j = 0; j < kCount; ++j) bits |= is_inside(left + j, width) ? 1u << j : 0u;
  return bits;
}

// kCount pixels of a row on their way, zeros for those that do not exist: from the pixel kLeft on kVectors vectors of
// kVector pixels, each of which exists or not as a whole, the others one by one (or by vectors of kWidth channels).
template <class T, int kWidth, int kCount, int kLeft = kCount, int kVector = 1, int kVectors = 0>
struct Row {
  static constexpr int kRight = kLeft + kVector * kVectors;

  FASTCONV_DEVICE void load(const T* row, int64_t step, unsigned exist) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      if (j < kLeft || j >= kRight) single[j] = load_packed_if<kWidth>(exist >> j & 1, row + j * step);
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int j = kLeft + v * kVector;
      vectors[v] = load_packed_if<kVector>(exist >> j & 1, row + j);
    }
  }
  FASTCONV_DEVICE void unpack(Compute<T> (&values)[kCount][kWidth]) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      if (j < kLeft || j >= kRight) cuda::unpack<T, kWidth>(single[j], values[j]);
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      Compute<T> pixels[kVector];
      cuda::unpack<T, kVector>(vectors[v], pixels);
#pragma unroll
      for (int i = 0; i < kVector; ++i) values[kLeft + v * kVector + i][0] = pixels[i];
    }
  }

 private:
  Packed<T, kWidth> single[kCount];  // but for those of the vectors
  Packed<T, kVector> vectors[kVectors > 0 ? kVectors : 1];
};

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
  static constexpr bool kHeld = kFilter * kFilter * kWidth * sizeof(A) <= 36 * 4;  // in registers
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
template <class T, int kWidth, int kCount, class Row>
struct MaskedRow {
  FASTCONV_DEVICE void load(const DepthwiseConv2dParams& p, int64_t offset, unsigned exist) {
    grads.load(static_cast<const T*>(p.grad_output) + offset, p.out.w, exist);
    if (p.activated) outputs.load(static_cast<const T*>(p.activated) + offset, p.out.w, exist);
  }
  FASTCONV_DEVICE void unpack(const DepthwiseConv2dParams& p, Compute<T> (&values)[kCount][kWidth]) const {
    using A = Compute<T>;
    grads.unpack(values);
    const auto each = [&](auto passes) {
      A activated[kCount][kWidth];
      outputs.unpack(activated);
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
  Row grads, outputs;
};

// A row of the result, of which those columns exist
template <bool kTogether, class T, int kColumns, int kWidth>
FASTCONV_DEVICE void store_row(T* row, int64_t step, unsigned exist, const Compute<T> (&values)[kColumns][kWidth]) {
  if constexpr (kTogether) {
    Compute<T> pixels[kColumns];
#pragma unroll
    for (int q = 0; q < kColumns; ++q) pixels[q] = values[q][0];
    store_packed(row, pixels);
  } else {
#pragma unroll
    for (int q = 0; q < kColumns; ++q) {
      if (exist >> q & 1) store_packed(row + q * step, values[q]);
    }
  }
}

// The pixels of the input that kColumns columns of the output meet. Vectors of pixels begin with the first that is not
// of the padding, which is half of the filter.
template <class T, Vectors kVectors, int kWidth, int kColumns, int kFilter, int kStride,
          int kCount = (kColumns - 1) * kStride + kFilter>
using InputRow = std::conditional_t<kVectors == Vectors::kPixels,
                                    Row<T, kWidth, kCount, kFilter / 2, kColumns, kStride>, Row<T, kWidth, kCount>>;

}  // namespace fastconv::cuda::inline sm80::depthwise
