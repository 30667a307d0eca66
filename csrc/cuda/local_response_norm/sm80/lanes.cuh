// LRN of size 5 of channels that lie side by side (NHWC): a lane owns a vector of channels, and has those on both sides
// from its neighbours by shuffles. A warp owns 32 vectors in memory's order, across the ends of pixels; where those are
// not whole pixels, its outermost lanes serve as neighbours alone, and the warps overlap.
//
// The gradient shuffles x, and then t. No shared memory; needs whole vectors of 16 bytes.
#pragma once

#include "cuda/local_response_norm/sm80/arithmetic.cuh"
#include "cuda/runtime/divider.cuh"

namespace fastconv::cuda::inline sm80::lrn {

struct LanePosition {
  FASTCONV_DEVICE explicit LanePosition(const LocalResponseNormParams& p) {
    const unsigned lane = threadIdx.x % 32, warp = blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
    const int own = static_cast<int>(lane) - p.first;
    vector = static_cast<int>(warp) * p.vectors_per_warp + own;
    exists = static_cast<unsigned>(vector) < static_cast<unsigned>(p.vectors);
    writes = exists && static_cast<unsigned>(own) < static_cast<unsigned>(p.vectors_per_warp);
    int place;
    divide(p.by_row, vector, place);
    is_first = place == 0;
    is_last = place == static_cast<int>(p.by_row.divisor) - 1;
  }
  int vector;
  bool exists, writes;
  bool is_first, is_last;  // of its pixel
};

template <class T>
FASTCONV_DEVICE Packed<T, kVector<T>> load_lane(const void* tensor, const LanePosition& at) {
  return load_packed_if<kVector<T>>(at.exists, static_cast<const T*>(tensor) + int64_t{at.vector} * kVector<T>);
}

template <class T>
FASTCONV_DEVICE void store_lane(void* tensor, const LanePosition& at, const float (&values)[kVector<T>]) {
  if (at.writes) store_narrow(static_cast<T*>(tensor) + int64_t{at.vector} * kVector<T>, values);
}

// kCount values of the vectors on both sides, zeros beyond the pixel: the last ones of one into `left`, the first ones
// of the other into `right`
template <class V, int kLength, int kCount>
FASTCONV_DEVICE void exchange(const V (&own)[kLength], const LanePosition& at, V (&left)[kCount], V (&right)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const V before = __shfl_up_sync(0xffffffffu, own[kLength - kCount + i], 1);
    const V after = __shfl_down_sync(0xffffffffu, own[i], 1);
    left[i] = at.is_first ? V(0) : before;
    right[i] = at.is_last ? V(0) : after;
  }
}

// x of the vector at and of kReach channels on both sides
template <class T, bool kActivated, int kLength>
FASTCONV_DEVICE void load_row(const LocalResponseNormParams& p, const LanePosition& at, float (&x)[kLength]) {
  const Packed<T, kVector<T>> own = load_lane<T>(p.input, at);
  Packed<T, kReach> left, right;
  exchange(own.v, at, left.v, right.v);
  unpack<T, kReach>(left, x);
  unpack<T, kVector<T>>(own, x + kReach);
  unpack<T, kReach>(right, x + kReach + kVector<T>);
  if constexpr (kActivated) {
#pragma unroll
    for (int i = 0; i < kLength; ++i) x[i] = activate(x[i], p.activation);
  }
}

// kActivated: whether there is an activation
template <class T, bool kActivated>
FASTCONV_KERNEL(kThreads, kLrnLanesResident)
fprop_lanes(const LocalResponseNormParams p) {
  constexpr int kWidth = kVector<T>;
  const LanePosition at(p);
  float x[kWidth + 2 * kReach], squares[kWidth], own[kWidth];
  load_row<T, kActivated>(p, at, x);
  sum_windows<true>(x, squares);
  copy(x + kReach, own);
  normalize<T>(own, squares, p);
  store_lane<T>(p.output, at, own);
}

template <class T, bool kActivated>
FASTCONV_KERNEL(kThreads, kLrnLanesResidentBackward)
dgrad_lanes(const LocalResponseNormParams p) {
  constexpr int kWidth = kVector<T>;
  const LanePosition at(p);
  const Packed<T, kWidth> grads = load_lane<T>(p.grad_output, at);
  float x[kWidth + 2 * kReach], sums[kWidth], own[kWidth], scaled[kWidth];
  load_row<T, kActivated>(p, at, x);
  sum_windows<true>(x, sums);
  copy(x + kReach, own);
  unpack<T, kWidth>(grads, scaled);
  make_terms<T>(scaled, own, sums, p);
  float terms[kWidth + 2 * kReach], left[kReach], right[kReach];
  exchange(sums, at, left, right);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) terms[kReach + i] = sums[i];
#pragma unroll
  for (int i = 0; i < kReach; ++i) terms[i] = left[i], terms[kReach + kWidth + i] = right[i];
  sum_windows<false>(terms, sums);
  make_gradients<kActivated>(scaled, own, sums, p);
  store_lane<T>(p.output, at, scaled);
}

}  // namespace fastconv::cuda::inline sm80::lrn
