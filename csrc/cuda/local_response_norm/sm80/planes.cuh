// LRN of channels that are some stride apart (NCHW), for size 5: a thread owns a vector of pixels and slides along the
// channels with the window in registers, the next channels on their way. A grid of few pixels is cut along the
// channels, too.
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

// Channels come in twos: sums of squares (or of t) then share the sums of pairs, and of fours.
constexpr int kStep = 2;

// A vector of each of the channels from `channel` on, of which `source` is the first; zeros where there is none.
template <int kWidth, class T>
FASTCONV_DEVICE void load_step(const T* source, int channel, const LocalResponseNormParams& p,
                               Packed<T, kWidth> (&rows)[kStep]) {
#pragma unroll
  for (int h = 0; h < kStep; ++h) {
    const bool exists = static_cast<unsigned>(channel + h) < static_cast<unsigned>(p.channels);
    rows[h] = load_packed_if<kWidth>(exists, source + h * p.inner);
  }
}

// Values of kStep channels are kept one channel behind the other.
template <bool kActivated, class T, int kWidth, class A>
FASTCONV_DEVICE void widen_step(const Packed<T, kWidth> (&rows)[kStep], const LocalResponseNormParams& p,
                                A (&values)[kStep * kWidth]) {
#pragma unroll
  for (int h = 0; h < kStep; ++h) unpack<T, kWidth>(rows[h], values + h * kWidth);
  if constexpr (kActivated) {
#pragma unroll
    for (int i = 0; i < kStep * kWidth; ++i) values[i] = activate(values[i], p.activation);
  }
}

// What the sums over windows remember of the channels before: the sums of the last two, and of the last four
template <class A, int kWidth>
struct PlaneSums {
  A pair[kWidth], four[kWidth];
};

// The sums of the windows whose last channels come now, of the squares or the values themselves; `oldest` is the first
// channel of the second window.
template <bool kSquares, class A, int kWidth>
FASTCONV_DEVICE void sum_step(PlaneSums<A, kWidth>& state, const A* oldest, const A (&next)[kStep * kWidth],
                              A (&sums)[kStep * kWidth]) {
  const auto plus = [](A sum, A v) { return kSquares ? fused_multiply_add(v, v, sum) : sum + v; };
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const A first = kSquares ? next[i] * next[i] : next[i], pair = plus(first, next[kWidth + i]);
    sums[i] = state.four[i] + first;
    state.four[i] = state.pair[i] + pair;
    state.pair[i] = pair;
    sums[kWidth + i] = plus(state.four[i], oldest[i]);
  }
}

template <int kWidth, class T, class A>
FASTCONV_DEVICE void store_step(T* destination, int channel, const PlanePosition<T, kWidth>& at,
                                const LocalResponseNormParams& p, const A (&values)[kStep * kWidth]) {
#pragma unroll
  for (int h = 0; h < kStep; ++h) {
    A row[kWidth];
    copy(values + h * kWidth, row);
    if (h == 0 || channel + h < at.last) store_narrow(destination + h * p.inner, row);
  }
}

template <class T, int kWidth, bool kActivated>
FASTCONV_KERNEL(kThreads, 2)
fprop_planes(const LocalResponseNormParams p) {
  using A = Compute<T>;
  const PlanePosition<T, kWidth> at(p);
  if (!at.inside) return;
  const int64_t start = at.offset + at.first * p.inner, step = kStep * p.inner;
  const T* x = static_cast<const T*>(p.input) + start - step;  // of the channels that are loaded next
  T* y = static_cast<T*>(p.output) + start;
  Packed<T, kWidth> rows[kStep];
  A last[kStep * kWidth], now[kStep * kWidth], next[kStep * kWidth], sums[kStep * kWidth];
  PlaneSums<A, kWidth> squares{};
  load_step<kWidth>(x, at.first - kStep, p, rows);
  widen_step<kActivated, T, kWidth>(rows, p, last);
  sum_step<true>(squares, last, last, sums);
  load_step<kWidth>(x += step, at.first, p, rows);
  widen_step<kActivated, T, kWidth>(rows, p, now);
  sum_step<true>(squares, last, now, sums);
  load_step<kWidth>(x += step, at.first + kStep, p, rows);
  for (int c = at.first; c < at.last; c += kStep, y += step) {
    widen_step<kActivated, T, kWidth>(rows, p, next);
    load_step<kWidth>(x += step, c + 2 * kStep, p, rows);
    sum_step<true>(squares, last + kWidth, next, sums);
    copy(now, last);
    normalize<T>(now, sums, p);
    store_step(y, c, at, p, now);
    copy(next, now);
  }
}

template <class T, int kWidth, bool kActivated>
FASTCONV_KERNEL(kThreads, sizeof(T) > 4 ? 1 : 2)
dgrad_planes(const LocalResponseNormParams p) {
  using A = Compute<T>;
  constexpr int kPair = kStep * kWidth;
  const PlanePosition<T, kWidth> at(p);
  if (!at.inside) return;
  // t runs kStep channels ahead of dx, and x as many ahead of t: two steps come before the first dx.
  const int begin = at.first - 2 * kStep;
  const int64_t start = at.offset + begin * p.inner, step = kStep * p.inner;
  const T* x = static_cast<const T*>(p.input) + start;
  const T* g = static_cast<const T*>(p.grad_output) + start + step;
  T* dx = static_cast<T*>(p.output) + start;
  Packed<T, kWidth> rows[kStep], grads[kStep];
  A x_dx[kPair], x_t[kPair], x_next[kPair];  // of the channels of dx, of t, and of those behind
  A scaled[kPair] = {}, last[kPair] = {};    // g / d^beta of the channels of dx; t of those before
  A terms_before[kPair] = {};
  PlaneSums<A, kWidth> squares{}, terms{};
  A sums[kPair];
  load_step<kWidth>(x, begin, p, rows);
  widen_step<kActivated, T, kWidth>(rows, p, x_dx);
  sum_step<true>(squares, x_dx, x_dx, sums);
  load_step<kWidth>(x += step, begin + kStep, p, rows);
  widen_step<kActivated, T, kWidth>(rows, p, x_t);
  sum_step<true>(squares, x_dx, x_t, sums);
  load_step<kWidth>(x += step, begin + 2 * kStep, p, rows);
  load_step<kWidth>(g, begin + kStep, p, grads);
  for (int c = begin; c < at.last; c += kStep, dx += step) {
    A next_scaled[kPair], next_terms[kPair];
    widen_step<kActivated, T, kWidth>(rows, p, x_next);
    widen_step<false, T, kWidth>(grads, p, next_scaled);
    load_step<kWidth>(x += step, c + 3 * kStep, p, rows);
    load_step<kWidth>(g += step, c + 2 * kStep, p, grads);
    sum_step<true>(squares, x_dx + kWidth, x_next, next_terms);
    make_terms<T>(next_scaled, x_t, next_terms, p);
#pragma unroll
    for (int h = 0; h < kStep; ++h) {
      const bool exists = static_cast<unsigned>(c + kStep + h) < static_cast<unsigned>(p.channels);
#pragma unroll
      for (int i = h * kWidth; i < (h + 1) * kWidth; ++i) next_terms[i] = exists ? next_terms[i] : A(0);
    }
    sum_step<false>(terms, last + kWidth, next_terms, sums);
    if (c >= at.first) {
      make_gradients<kActivated>(scaled, x_dx, sums, p);
      store_step(dx, c, at, p, scaled);
    }
    copy(next_scaled, scaled);
    copy(terms_before, last);
    copy(next_terms, terms_before);
    copy(x_t, x_dx);
    copy(x_next, x_t);
  }
}

}  // namespace fastconv::cuda::inline sm80::lrn
