// LRN of any layout and size, an element to a thread; the caches see to it that memory is read about once. The gradient
// takes two kernels, with t in a workspace between them.
#pragma once

#include "cuda/local_response_norm/sm80/arithmetic.cuh"

namespace fastconv::cuda::inline sm80::lrn {

// Where an element lies and which channel's it is
struct WidePosition {
  FASTCONV_DEVICE explicit WidePosition(const LocalResponseNormParams& p) {
    index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
    inside = index < p.outer * p.channels * p.inner;
    channel = static_cast<int>(index / p.inner % p.channels);
  }
  int64_t index;
  int channel;
  bool inside;
};

// x of the element `offset` further
template <class T>
FASTCONV_DEVICE Compute<T> wide_x(const LocalResponseNormParams& p, const WidePosition& at, int64_t offset = 0) {
  return activate(widen(static_cast<const T*>(p.input)[at.index + offset]), p.activation);
}

// The sum of the squares that the element at has in its window
template <class T>
FASTCONV_DEVICE Compute<T> wide_squares(const LocalResponseNormParams& p, const WidePosition& at) {
  const int first = at.channel < p.before ? -at.channel : -p.before;
  const int last = at.channel + p.after < p.channels ? p.after : p.channels - 1 - at.channel;
  Compute<T> sum = 0;
  for (int c = first; c <= last; ++c) {
    const Compute<T> v = wide_x<T>(p, at, c * p.inner);
    sum = fused_multiply_add(v, v, sum);
  }
  return sum;
}

template <class T>
FASTCONV_KERNEL(kThreads, 4)
fprop_wide(const LocalResponseNormParams p) {
  const WidePosition at(p);
  if (!at.inside) return;
  const Compute<T> squares[1] = {wide_squares<T>(p, at)};
  Compute<T> value[1] = {wide_x<T>(p, at)};
  normalize<T>(value, squares, p);
  static_cast<T*>(p.output)[at.index] = narrow<T>(value[0]);
}

// t into the workspace
template <class T>
FASTCONV_KERNEL(kThreads, 4)
dgrad_wide_terms(const LocalResponseNormParams p) {
  const WidePosition at(p);
  if (!at.inside) return;
  Compute<T> term[1] = {wide_squares<T>(p, at)};
  Compute<T> grad[1] = {widen(static_cast<const T*>(p.grad_output)[at.index])};
  const Compute<T> x[1] = {wide_x<T>(p, at)};
  make_terms<T>(grad, x, term, p);
  static_cast<Compute<T>*>(p.workspace)[at.index] = term[0];
}

template <class T>
FASTCONV_KERNEL(kThreads, 4)
dgrad_wide_sums(const LocalResponseNormParams p) {
  using A = Compute<T>;
  const WidePosition at(p);
  if (!at.inside) return;
  const A squares[1] = {wide_squares<T>(p, at)};
  A scaled[1] = {widen(static_cast<const T*>(p.grad_output)[at.index])};
  normalize<T>(scaled, squares, p);
  const A* t = static_cast<const A*>(p.workspace) + at.index;
  const int first = at.channel < p.after ? -at.channel : -p.after;
  const int last = at.channel + p.before < p.channels ? p.before : p.channels - 1 - at.channel;
  A sum[1] = {0};
  for (int c = first; c <= last; ++c) sum[0] += t[c * p.inner];
  const A x[1] = {wide_x<T>(p, at)};
  make_gradients<true>(scaled, x, sum, p);
  static_cast<T*>(p.output)[at.index] = narrow<T>(scaled[0]);
}

}  // namespace fastconv::cuda::inline sm80::lrn
