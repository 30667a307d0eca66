// LRN of channels that are some stride apart (NCHW), for size 5: a thread owns a vector of pixels and slides along the
// channels with the window in registers. A grid of few pixels is cut along the channels, too.
#pragma once

#include "cuda/local_response_norm/sm80/arithmetic.cuh"

namespace fastconv::cuda::inline sm80::lrn {

template <class T, int kWidth>
struct PlanePosition {
  FASTCONV_DEVICE explicit PlanePosition(const LocalResponseNormParams& p) {
    const int64_t vectors = p.inner / kWidth;
    const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    inside = index < p.outer * vectors;
    offset = index / vectors * p.channels * p.inner + index % vectors * kWidth;
    first = static_cast<int>(blockIdx.y) * p.channels_per_block;
    last = first + p.channels_per_block < p.channels ? first + p.channels_per_block : p.channels;
  }
  bool inside;
  int64_t offset;   // of channel 0
  int first, last;  // channels to compute: first ... last - 1
};

// How many channels are loaded before the first of them is used. The stores between would otherwise keep the loads
// back, and a thread of single elements has too few of them under way.
template <int kWidth>
constexpr int kAhead = kWidth > 1 ? 2 : 4;

// A row of channel `channel`: zeros where there is none.
template <class T, int kWidth>
FASTCONV_DEVICE Vec<T, kWidth> load_row(const T* rows, int channel, const LocalResponseNormParams& p) {
  Vec<T, kWidth> row{};
  if (channel >= 0 && channel < p.channels) row = load<kWidth>(rows + channel * p.inner);
  return row;
}

// The oldest row drops out, the new one comes in, activated.
template <class T, int kWidth>
FASTCONV_DEVICE void slide(Compute<T> (&window)[kWindow][kWidth], const Vec<T, kWidth>& row, Activation activation) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
#pragma unroll
    for (int w = 0; w + 1 < kWindow; ++w) window[w][i] = window[w + 1][i];
    window[kWindow - 1][i] = activate(widen(row.v[i]), activation);
  }
}

template <bool kSquares, class A, int kWidth>
FASTCONV_DEVICE A sum_window(const A (&window)[kWindow][kWidth], int i) {
  A sum = 0;
#pragma unroll
  for (int w = 0; w < kWindow; ++w) {
    sum = kSquares ? fused_multiply_add(window[w][i], window[w][i], sum) : sum + window[w][i];
  }
  return sum;
}

template <class T, int kWidth>
FASTCONV_KERNEL(kThreads, 2)
fprop_planes(const LocalResponseNormParams p) {
  using A = Compute<T>;
  constexpr int kReach = kWindow / 2;
  const PlanePosition<T, kWidth> at(p);
  if (!at.inside) return;
  const Coefficients<A> of(p);
  const T* x = static_cast<const T*>(p.input) + at.offset;
  T* y = static_cast<T*>(p.output) + at.offset;
  A window[kWindow][kWidth];
#pragma unroll
  for (int c = -kReach; c < kReach; ++c) slide(window, load_row<T, kWidth>(x, at.first + c, p), p.activation);
  for (int begin = at.first; begin < at.last; begin += kAhead<kWidth>) {
    Vec<T, kWidth> rows[kAhead<kWidth>];
#pragma unroll
    for (int a = 0; a < kAhead<kWidth>; ++a) rows[a] = load_row<T, kWidth>(x, begin + a + kReach, p);
#pragma unroll
    for (int a = 0; a < kAhead<kWidth>; ++a) {
      const int c = begin + a;
      if (c >= at.last) break;
      slide(window, rows[a], p.activation);
      A out[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const A d = fused_multiply_add(of.scale, sum_window<true>(window, i), of.k);
        out[i] = over_power<T>(window[kReach][i], d, of);
      }
      store_narrow(y + c * p.inner, out);
    }
  }
}

template <class T, int kWidth>
FASTCONV_KERNEL(kThreads, 2)
dgrad_planes(const LocalResponseNormParams p) {
  using A = Compute<T>;
  constexpr int kReach = kWindow / 2;
  const PlanePosition<T, kWidth> at(p);
  if (!at.inside) return;
  const Coefficients<A> of(p);
  const T* x = static_cast<const T*>(p.input) + at.offset;
  const T* g = static_cast<const T*>(p.grad_output) + at.offset;
  T* dx = static_cast<T*>(p.output) + at.offset;
  A window[kWindow][kWidth];     // x of j - 2 ... j + 2
  A terms[kWindow][kWidth];      // t of j - 4 ... j
  A scaled[kReach + 1][kWidth];  // g / d^beta of j - 2 ... j
#pragma unroll
  for (int c = -2 * kReach; c < 0; ++c) slide(window, load_row<T, kWidth>(x, at.first + c, p), p.activation);
  const int end = at.last + kReach;
  for (int begin = at.first - kReach; begin < end; begin += kAhead<kWidth>) {
    Vec<T, kWidth> rows[kAhead<kWidth>], grads[kAhead<kWidth>];
#pragma unroll
    for (int a = 0; a < kAhead<kWidth>; ++a) {
      rows[a] = load_row<T, kWidth>(x, begin + a + kReach, p);
      grads[a] = load_row<T, kWidth>(g, begin + a, p);
    }
#pragma unroll
    for (int a = 0; a < kAhead<kWidth>; ++a) {
      const int j = begin + a;
      if (j >= end) break;
      slide(window, rows[a], p.activation);
      const bool exists = j >= 0 && j < p.channels;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
#pragma unroll
        for (int w = 0; w + 1 < kWindow; ++w) terms[w][i] = terms[w + 1][i];
#pragma unroll
        for (int w = 0; w < kReach; ++w) scaled[w][i] = scaled[w + 1][i];
        A q = 0, t = 0;
        if (exists) {
          const A d = fused_multiply_add(of.scale, sum_window<true>(window, i), of.k);
          q = over_power<T>(widen(grads[a].v[i]), d, of);
          t = q * window[kReach][i] / d;
        }
        terms[kWindow - 1][i] = t;
        scaled[kReach][i] = q;
      }
      // The last t that channel j - 2 needs has just come.
      const int c = j - kReach;
      if (c < at.first) continue;
      A out[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        out[i] = gradient(scaled[0][i], window[0][i], sum_window<false>(terms, i), of);
      }
      store_narrow(dx + c * p.inner, out);
    }
  }
}

}  // namespace fastconv::cuda::inline sm80::lrn
