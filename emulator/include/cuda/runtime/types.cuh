// The twin of csrc/cuda/runtime/types.cuh for a host compiler, with what the CUDA headers declare besides.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "common/activation.h"
#include "device_api.h"

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define FASTCONV_DEVICE inline
#define FASTCONV_HOST_DEVICE inline
#define FASTCONV_KERNEL(threads, min_blocks) void

#define threadIdx (::fastconv::emulator::thread_index())
#define blockIdx (::fastconv::emulator::block_index())
#define blockDim (::fastconv::emulator::block_size())
#define gridDim (::fastconv::emulator::grid_size())
constexpr int warpSize = 32;

#define FASTCONV_VECTOR(type, name)                                \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };         \
  struct alignas(4 * sizeof(type)) name##4 { type x, y, z, w; };   \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; } \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
FASTCONV_VECTOR(unsigned, uint)
FASTCONV_VECTOR(int, int)
FASTCONV_VECTOR(float, float)
#undef FASTCONV_VECTOR

inline void __syncthreads(fastconv::emulator::Where where = fastconv::emulator::Where::current()) {
  fastconv::emulator::sync_block(where);
}
inline void __syncwarp(uint32_t mask = 0xffffffff,
                       fastconv::emulator::Where where = fastconv::emulator::Where::current()) {
  fastconv::emulator::sync_warp(mask, where);
}

#define FASTCONV_SHUFFLE(name, kind, Operand)                                                                      \
  template <class T>                                                                                               \
  inline T name(uint32_t mask, T value, Operand operand, int width = 32,                                           \
                fastconv::emulator::Where where = fastconv::emulator::Where::current()) {                          \
    static_assert(sizeof(T) == 4, "the emulator shuffles 32-bit values");                                          \
    return std::bit_cast<T>(fastconv::emulator::shuffle(fastconv::emulator::Shuffle::kind, mask,                   \
                                                        std::bit_cast<uint32_t>(value), static_cast<int>(operand), \
                                                        width, where));                                            \
  }
FASTCONV_SHUFFLE(__shfl_sync, kIndex, int)
FASTCONV_SHUFFLE(__shfl_xor_sync, kXor, int)
FASTCONV_SHUFFLE(__shfl_up_sync, kUp, unsigned)
FASTCONV_SHUFFLE(__shfl_down_sync, kDown, unsigned)
#undef FASTCONV_SHUFFLE

inline uint32_t __ballot_sync(uint32_t mask, bool predicate,
                              fastconv::emulator::Where where = fastconv::emulator::Where::current()) {
  return fastconv::emulator::ballot(mask, predicate, where);
}
inline int __any_sync(uint32_t mask, bool predicate,
                      fastconv::emulator::Where where = fastconv::emulator::Where::current()) {
  return fastconv::emulator::ballot(mask, predicate, where) != 0;
}
inline int __all_sync(uint32_t mask, bool predicate,
                      fastconv::emulator::Where where = fastconv::emulator::Where::current()) {
  return fastconv::emulator::ballot(mask, predicate, where) == mask;
}

inline uint32_t __float_as_uint(float v) { return std::bit_cast<uint32_t>(v); }
inline int __float_as_int(float v) { return std::bit_cast<int>(v); }
inline float __uint_as_float(uint32_t v) { return std::bit_cast<float>(v); }
inline float __int_as_float(int v) { return std::bit_cast<float>(v); }
inline int __popc(unsigned v) { return std::popcount(v); }
inline int __clz(int v) { return std::countl_zero(static_cast<unsigned>(v)); }
inline int __ffs(int v) { return v ? std::countr_zero(static_cast<unsigned>(v)) + 1 : 0; }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }
inline float __expf(float v) { return std::exp(v); }
inline float __logf(float v) { return std::log(v); }
inline float __log2f(float v) { return std::log2(v); }
inline float __powf(float v, float w) { return std::exp2(w * std::log2(v)); }
inline float __fdividef(float v, float w) { return v / w; }
inline float __frcp_rn(float v) { return 1.0f / v; }
inline float __saturatef(float v) { return v > 0.0f ? (v < 1.0f ? v : 1.0f) : 0.0f; }

#define FASTCONV_MIN_MAX(type)                                 \
  constexpr type min(type a, type b) { return b < a ? b : a; } \
  constexpr type max(type a, type b) { return a < b ? b : a; }
FASTCONV_MIN_MAX(int)
FASTCONV_MIN_MAX(unsigned)
FASTCONV_MIN_MAX(long)
FASTCONV_MIN_MAX(unsigned long)
#undef FASTCONV_MIN_MAX
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }

namespace fastconv::cuda {

// Trivial, like every type that shared memory and parameters are made of.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline float to_float(float v) { return v; }
inline float to_float(Half v) {
  emulator::note(uses::kConvertHalf);
#ifdef __F16C__
  return _cvtsh_ss(v.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000) << 16;
  const uint32_t rest = static_cast<uint32_t>(v.bits & 0x7fff) << 13;
  if (rest >= 0x0f800000) return std::bit_cast<float>(sign | 0x70000000 | rest);  // Inf, NaN
  // The exponents differ by 112; the product is exact, subnormal halves included.
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(std::bit_cast<float>(rest) * 0x1p112f));
#endif
}
inline float to_float(BFloat16 v) {
  emulator::note(uses::kConvertBFloat16);
  return std::bit_cast<float>(static_cast<uint32_t>(v.bits) << 16);
}

namespace detail {

inline uint16_t half_bits(float v) {
  emulator::note(uses::kConvertHalf);
  if (v != v) return 0x7fff;
#ifdef __F16C__
  return static_cast<uint16_t>(_cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT));
#else
  const uint32_t bits = std::bit_cast<uint32_t>(v);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const float magnitude = std::fabs(v);
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  if (magnitude < 0x1p-14f) {
    // Adding 0.5 leaves the last bit at 2^-24, a half's smallest number: the addition does the rounding.
    return sign | static_cast<uint16_t>(std::bit_cast<uint32_t>(magnitude + 0.5f) - std::bit_cast<uint32_t>(0.5f));
  }
  const uint32_t rest = std::bit_cast<uint32_t>(magnitude) - (112u << 23);
  return sign | static_cast<uint16_t>((rest + 0xfff + (rest >> 13 & 1)) >> 13);
#endif
}

inline uint16_t bfloat16_bits(float v) {
  emulator::note(uses::kConvertBFloat16);
  if (v != v) return 0x7fff;
  const uint32_t bits = std::bit_cast<uint32_t>(v);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace detail

template <class T>
inline T from_float(float v) = delete;
template <>
inline float from_float<float>(float v) {
  return v;
}
template <>
inline Half from_float<Half>(float v) {
  return {detail::half_bits(v)};
}
template <>
inline BFloat16 from_float<BFloat16>(float v) {
  return {detail::bfloat16_bits(v)};
}

template <class T>
inline uint32_t pack2(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}
template <class T>
inline float2 unpack2(uint32_t pair) {
  return {to_float(T{static_cast<uint16_t>(pair)}), to_float(T{static_cast<uint16_t>(pair >> 16)})};
}

template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  static_assert(sizeof(T) * N <= 16 && (N & (N - 1)) == 0);
  T v[N];
};

template <int N, class T>
inline Vec<T, N> load(const T* source, emulator::Where where = emulator::Where::current()) {
  Vec<T, N> vec;
  const emulator::Quad bits = emulator::load(source, sizeof(vec), where);
  std::memcpy(&vec, &bits, sizeof(vec));
  return vec;
}

template <class T, int N>
inline void store(T* destination, const Vec<T, N>& vec, emulator::Where where = emulator::Where::current()) {
  emulator::Quad bits{};
  std::memcpy(&bits, &vec, sizeof(vec));
  emulator::store(destination, bits, sizeof(vec), where);
}

// Found before that of the global namespace
inline float powf(float v, float w) {
  emulator::note(uses::kPower);
  return std::pow(v, w);
}

inline float activate(float v, Activation activation) {
  emulator::note(uses::kActivate);
  if (activation == Activation::kNone) return v;
  v = v < 0.0f ? 0.0f : v;
  return activation == Activation::kRelu6 && v > 6.0f ? 6.0f : v;
}

inline bool passes_gradient(float output, Activation activation) {
  emulator::note(uses::kPassesGradient);
  if (activation == Activation::kNone) return true;
  return !(output <= 0.0f) && !(activation == Activation::kRelu6 && output >= 6.0f);
}

}  // namespace fastconv::cuda

template <class T>
inline T __ldg(const T* source, fastconv::emulator::Where where = fastconv::emulator::Where::current()) {
  return [&] {
    T value;
    const fastconv::emulator::Quad bits = fastconv::emulator::load(source, sizeof(T), where);
    std::memcpy(&value, &bits, sizeof(T));
    return value;
  }();
}
