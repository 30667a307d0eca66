// Numbers on the device. emulator/include/cuda/runtime/types.cuh is the twin for a host compiler: same names,
// same results.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/activation.h"

#define FASTCONV_DEVICE __device__ __forceinline__
#define FASTCONV_HOST_DEVICE __host__ __device__ __forceinline__
// A kernel of at most so many threads, of which at least so many blocks should fit on a multiprocessor.
#define FASTCONV_KERNEL(threads, min_blocks) __global__ void __launch_bounds__(threads, min_blocks)

namespace fastconv::cuda {

using Half = __half;
using BFloat16 = __nv_bfloat16;

FASTCONV_DEVICE float to_float(float v) { return v; }
FASTCONV_DEVICE float to_float(Half v) { return __half2float(v); }
FASTCONV_DEVICE float to_float(BFloat16 v) { return __bfloat162float(v); }

// Rounds to nearest even.
template <class T>
FASTCONV_DEVICE T from_float(float v) = delete;
template <>
FASTCONV_DEVICE float from_float<float>(float v) {
  return v;
}
template <>
FASTCONV_DEVICE Half from_float<Half>(float v) {
  return __float2half_rn(v);
}
template <>
FASTCONV_DEVICE BFloat16 from_float<BFloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// Two 16-bit numbers in a register, `low` in the lower half: what fragments are made of.
template <class T>
FASTCONV_DEVICE uint32_t pack2(float low, float high) = delete;
template <>
FASTCONV_DEVICE uint32_t pack2<Half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
FASTCONV_DEVICE uint32_t pack2<BFloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <class T>
FASTCONV_DEVICE float2 unpack2(uint32_t pair) = delete;
template <>
FASTCONV_DEVICE float2 unpack2<Half>(uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}
template <>
FASTCONV_DEVICE float2 unpack2<BFloat16>(uint32_t pair) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
}

// N neighbours, loaded and stored by one instruction; addresses are multiples of its size.
template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  static_assert(sizeof(T) * N <= 16 && (N & (N - 1)) == 0);
  T v[N];
};

namespace detail {
template <int kBytes>
struct Word;
template <>
struct Word<2> {
  using Type = uint16_t;
};
template <>
struct Word<4> {
  using Type = uint32_t;
};
template <>
struct Word<8> {
  using Type = uint2;
};
template <>
struct Word<16> {
  using Type = uint4;
};
template <class T, int N>
union Punned {
  FASTCONV_DEVICE Punned() {}
  Vec<T, N> vec;
  typename Word<sizeof(T) * N>::Type word;
};
}  // namespace detail

template <int N, class T>
FASTCONV_DEVICE Vec<T, N> load(const T* source) {
  detail::Punned<T, N> value;
  value.word = *reinterpret_cast<const decltype(value.word)*>(source);
  return value.vec;
}

template <class T, int N>
FASTCONV_DEVICE void store(T* destination, const Vec<T, N>& vec) {
  detail::Punned<T, N> value;
  value.vec = vec;
  *reinterpret_cast<decltype(value.word)*>(destination) = value.word;
}

// NaN stays NaN, which fmaxf would lose.
FASTCONV_DEVICE float activate(float v, Activation activation) {
  if (activation == Activation::kNone) return v;
  v = v < 0.0f ? 0.0f : v;
  return activation == Activation::kRelu6 && v > 6.0f ? 6.0f : v;
}

// Whether the gradient passes where the activation's output was `output`; NaN counts as inside, as in eager.
FASTCONV_DEVICE bool passes_gradient(float output, Activation activation) {
  if (activation == Activation::kNone) return true;
  return !(output <= 0.0f) && !(activation == Activation::kRelu6 && output >= 6.0f);
}

}  // namespace fastconv::cuda
