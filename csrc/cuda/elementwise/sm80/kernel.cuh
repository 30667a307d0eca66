// Sums, activations and their masks, elementwise:
//
//   add       y = activation(a + b), rounded once
//   mask      dx = dy where activation let y through, else 0
//   activate  y = activation(x)
//
//   flat     the tensors lie in memory alike. A thread owns kElementwiseUnroll vectors of 16 bytes, a block's apart,
//            so that a warp's accesses are whole lines. vec1 does without alignment.
//   strided  the output is dense, the others have strides. A thread owns one element; where the innermost dimensions
//            differ, the caches make up for what the strides waste.
//
// Bound by memory: two reads and a write of each element.
#pragma once

#include "cuda/elementwise/params.h"
#include "cuda/runtime/scalar.cuh"

namespace fastconv::cuda::inline sm80 {

template <Elementwise kOperation, class T>
FASTCONV_DEVICE T apply(T a, T b, Activation activation) {
  if constexpr (kOperation == Elementwise::kAdd) {
    return narrow<T>(activate(widen(a) + widen(b), activation));
  } else if constexpr (kOperation == Elementwise::kMask) {
    return passes_gradient(widen(b), activation) ? a : narrow<T>(Compute<T>(0));
  } else {
    return narrow<T>(activate(widen(a), activation));
  }
}

template <Elementwise kOperation, class T, int kWidth>
FASTCONV_KERNEL(kElementwiseThreads, 4)
elementwise_flat(const ElementwiseParams p) {
  const T* input = static_cast<const T*>(p.input);
  const T* other = static_cast<const T*>(p.other);
  T* output = static_cast<T*>(p.output);
#pragma unroll
  for (int u = 0; u < kElementwiseUnroll; ++u) {
    const int64_t i = ((int64_t{blockIdx.x} * kElementwiseUnroll + u) * kElementwiseThreads + threadIdx.x) * kWidth;
    if (i + kWidth <= p.numel) {
      const Vec<T, kWidth> a = load<kWidth>(input + i);
      Vec<T, kWidth> b = a;
      if constexpr (kOperation != Elementwise::kActivate) b = load<kWidth>(other + i);
      Vec<T, kWidth> y;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) y.v[j] = apply<kOperation>(a.v[j], b.v[j], p.activation);
      store(output + i, y);
    } else {
      for (int64_t j = i; j < p.numel; ++j) {
        const T b = kOperation == Elementwise::kActivate ? input[j] : other[j];
        output[j] = apply<kOperation>(input[j], b, p.activation);
      }
    }
  }
}

// Index: uint32_t where that counts the elements, as 64-bit divisions would take longer than the memory
template <Elementwise kOperation, class T, class Index>
FASTCONV_KERNEL(kElementwiseThreads, 4)
elementwise_strided(const ElementwiseParams p) {
  const int64_t i = int64_t{blockIdx.x} * kElementwiseThreads + threadIdx.x;
  if (i >= p.numel) return;
  Index rest = static_cast<Index>(i);
  int64_t a = 0, b = 0;
#pragma unroll
  for (int d = kMaxElementwiseDims - 1; d >= 0; --d) {
    if (d >= p.dims) continue;
    const Index size = static_cast<Index>(p.sizes[d]);
    const Index quotient = rest / size;
    const int64_t at = rest - quotient * size;
    a += at * p.input_strides[d];
    b += at * p.other_strides[d];
    rest = quotient;
  }
  const T* input = static_cast<const T*>(p.input);
  const T* other = static_cast<const T*>(p.other);
  static_cast<T*>(p.output)[i] = apply<kOperation>(input[a], other[b], p.activation);
}

}  // namespace fastconv::cuda::inline sm80
