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

// d of the element at
template <class T>
FASTCONV_DEVICE Compute<T> wide_denominator(const LocalResponseNormParams& p, const WidePosition& at,
                                            const Coefficients<Compute<T>>& of) {
  const int first = at.channel < p.before ? -at.channel : -p.before;
  const int last = at.channel + p.after < p.channels ? p.after : p.channels - 1 - at.channel;
  Compute<T> sum = 0;
  for (int c = first; c <= last; ++c) {
    const Compute<T> v = wide_x<T>(p, at, c * p.inner);
    sum = fused_multiply_add(v, v, sum);
  }
  return fused_multiply_add(of.scale, sum, of.k);
}

template <class T>
FASTCONV_KERNEL(kThreads, 4)
fprop_wide(const LocalResponseNormParams p) {
  const WidePosition at(p);
  if (!at.inside) return;
  const Coefficients<Compute<T>> of(p);
  const Compute<T> d = wide_denominator<T>(p, at, of);
  static_cast<T*>(p.output)[at.index] = narrow<T>(over_power<T>(wide_x<T>(p, at), d, of));
}

// t into the workspace
template <class T>
FASTCONV_KERNEL(kThreads, 4)
dgrad_wide_terms(const LocalResponseNormParams p) {
  const WidePosition at(p);
  if (!at.inside) return;
  const Coefficients<Compute<T>> of(p);
  const Compute<T> d = wide_denominator<T>(p, at, of);
  const Compute<T> q = over_power<T>(widen(static_cast<const T*>(p.grad_output)[at.index]), d, of);
  static_cast<Compute<T>*>(p.workspace)[at.index] = q * wide_x<T>(p, at) / d;
}

template <class T>
FASTCONV_KERNEL(kThreads, 4)
dgrad_wide_sums(const LocalResponseNormParams p) {
  using A = Compute<T>;
  const WidePosition at(p);
  if (!at.inside) return;
  const Coefficients<A> of(p);
  const A d = wide_denominator<T>(p, at, of);
  const A q = over_power<T>(widen(static_cast<const T*>(p.grad_output)[at.index]), d, of);
  const A* t = static_cast<const A*>(p.workspace) + at.index;
  const int first = at.channel < p.after ? -at.channel : -p.after;
  const int last = at.channel + p.before < p.channels ? p.before : p.channels - 1 - at.channel;
  A sum = 0;
  for (int c = first; c <= last; ++c) sum += t[c * p.inner];
  static_cast<T*>(p.output)[at.index] = narrow<T>(gradient(q, wide_x<T>(p, at), sum, of));
}

}  // namespace fastconv::cuda::inline sm80::lrn
