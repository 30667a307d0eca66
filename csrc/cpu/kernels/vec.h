// SIMD vectors of the capability that this file is compiled for: Vec<float> or Vec<double>, with +,
// -, *, /, comparisons and `mask ? a : b` from the compiler's vector extension, and loads and
// stores that convert from and to the four element types. Arithmetic is fp32 (fp64 for double),
// whatever the element type.
//
// The compiler contracts a * b + c into one FMA where the capability has it.
#pragma once

#include <new>

#include "cpu/kernels/kernel.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns about its own AVX-512 intrinsics:
// https://gcc.gnu.org/bugzilla/show_bug.cgi?id=105593
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define FASTCONV_JOIN_(a, b) a##b
#define FASTCONV_JOIN(a, b) FASTCONV_JOIN_(a, b)
#define FASTCONV_KERNEL_NAMESPACE FASTCONV_JOIN(cpu_, FASTCONV_CPU_CAPABILITY)
#define FASTCONV_INLINE inline __attribute__((always_inline))

namespace fastconv::FASTCONV_KERNEL_NAMESPACE {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;  // SSE2, NEON
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

typedef float VecF32 __attribute__((vector_size(kVectorBytes)));
typedef double VecF64 __attribute__((vector_size(kVectorBytes)));
typedef int32_t VecI32 __attribute__((vector_size(kVectorBytes)));
typedef int64_t VecI64 __attribute__((vector_size(kVectorBytes)));
typedef uint32_t VecU32 __attribute__((vector_size(kVectorBytes)));
typedef uint16_t VecU16 __attribute__((vector_size(kVectorBytes / 2)));

template <class T>
struct ElementTraits {
  using Compute = float;
};
template <>
struct ElementTraits<double> {
  using Compute = double;
};
// The type that elements of type T are computed in
template <class T>
using Compute = typename ElementTraits<T>::Compute;

template <class A>
struct VecTraits {
  using Type = VecF32;
  using Lanes = VecI32;
};
template <>
struct VecTraits<double> {
  using Type = VecF64;
  using Lanes = VecI64;
};
template <class A>
using Vec = typename VecTraits<A>::Type;

template <class A>
constexpr int kLanes = kVectorBytes / sizeof(A);

// A vector's worth of elements, or the `count` (fewer) that are left at the end of a row. The lanes
// beyond `count` load as 0 and are not stored.
struct Whole {};
struct Tail {
  int count;
};

template <class A>
FASTCONV_INLINE Vec<A> broadcast(A value) {
  return value - Vec<A>{};  // not +, which loses the sign of -0.0
}

// Lane i of the result is lane lane[i] of a and b, one behind the other.
template <class A, int... lane>
FASTCONV_INLINE Vec<A> shuffle(Vec<A> a, Vec<A> b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, lane...);
#else
  return __builtin_shuffle(a, b, typename VecTraits<A>::Lanes{lane...});
#endif
}

FASTCONV_INLINE VecU32 bits(VecF32 v) { return reinterpret_cast<VecU32>(v); }
FASTCONV_INLINE VecF32 from_bits(VecU32 v) { return reinterpret_cast<VecF32>(v); }

// GCC 12 makes several instructions of a __builtin_convertvector where one would do.
FASTCONV_INLINE VecU32 widen(VecU16 v) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecU32>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(v)));
#elif defined(__AVX2__)
  return reinterpret_cast<VecU32>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(v)));
#else
  return __builtin_convertvector(v, VecU32);
#endif
}

FASTCONV_INLINE VecU16 narrow(VecU32 v) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecU16>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(v)));
#elif defined(__AVX2__)
  const __m256i wide = reinterpret_cast<__m256i>(v);
  return reinterpret_cast<VecU16>(_mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1)));
#else
  return __builtin_convertvector(v, VecU16);
#endif
}

FASTCONV_INLINE VecF32 from_bfloat16(VecU16 h) { return from_bits(widen(h) << 16); }

// To nearest, ties to even. A NaN stays one: it is made quiet instead of rounded, which might carry
// it into Inf.
FASTCONV_INLINE VecU16 to_bfloat16(VecF32 v) {
  const VecU32 u = bits(v);
  const VecU32 rounded = u + 0x7fff + ((u >> 16) & 1);
  return narrow(v == v ? rounded >> 16 : (u >> 16) | 0x40);
}

FASTCONV_INLINE VecF32 from_float16(VecU16 h) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(reinterpret_cast<__m256i>(h));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(reinterpret_cast<__m128i>(h));
#else
  const VecU32 u = widen(h);
  const VecU32 magnitude = (u & 0x7fff) << 13;
  // 2^112 is the distance of the two exponent biases; as a product it also normalises subnormal
  // numbers.
  const VecF32 finite = from_bits(magnitude) * 0x1p112f;
  const VecU32 infinite_or_nan = magnitude | 0x7f800000;
  return from_bits((magnitude >= 0x0f800000 ? infinite_or_nan : bits(finite)) | (u & 0x8000) << 16);
#endif
}

// To nearest, ties to even
FASTCONV_INLINE VecU16 to_float16(VecF32 v) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecU16>(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  return reinterpret_cast<VecU16>(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  const VecU32 u = bits(v);
  const VecU32 magnitude = u & 0x7fffffff;
  const VecU32 normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  // A sum with 0.5 rounds at 2^-24, the spacing of subnormal numbers.
  const VecU32 subnormal = bits(from_bits(magnitude) + 0.5f) - 0x3f000000;
  VecU32 h = magnitude < 0x38800000 ? subnormal : normal;  // 2^-14
  h = magnitude >= 0x477ff000 ? 0x7c00 + VecU32{} : h;     // 65520, halfway from the largest number to the next
  h = magnitude > 0x7f800000 ? 0x7e00 + VecU32{} : h;      // NaN
  return narrow(h | (u & 0x80000000) >> 16);
#endif
}

FASTCONV_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
FASTCONV_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

template <class V, class T>
FASTCONV_INLINE V load_bits(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

FASTCONV_INLINE VecF32 load(const float* p) { return load_bits<VecF32>(p); }
FASTCONV_INLINE VecF64 load(const double* p) { return load_bits<VecF64>(p); }
FASTCONV_INLINE VecF32 load(const BFloat16* p) { return from_bfloat16(load_bits<VecU16>(p)); }
FASTCONV_INLINE VecF32 load(const Float16* p) { return from_float16(load_bits<VecU16>(p)); }

FASTCONV_INLINE void store(float* p, VecF32 v) { __builtin_memcpy(p, &v, sizeof v); }
FASTCONV_INLINE void store(double* p, VecF64 v) { __builtin_memcpy(p, &v, sizeof v); }
FASTCONV_INLINE void store(BFloat16* p, VecF32 v) {
  const VecU16 h = to_bfloat16(v);
  __builtin_memcpy(p, &h, sizeof h);
}
FASTCONV_INLINE void store(Float16* p, VecF32 v) {
  const VecU16 h = to_float16(v);
  __builtin_memcpy(p, &h, sizeof h);
}

template <class T>
FASTCONV_INLINE auto load(const T* p, Whole) {
  return load(p);
}
template <class T>
FASTCONV_INLINE auto load(const T* p, Tail tail) {
  T row[kLanes<Compute<T>>] = {};
  for (int i = 0; i < tail.count; ++i) row[i] = p[i];
  return load(row);
}
template <class T, class V>
FASTCONV_INLINE void store(T* p, V v, Whole) {
  store(p, v);
}
template <class T, class V>
FASTCONV_INLINE void store(T* p, V v, Tail tail) {
  T row[kLanes<Compute<T>>];
  store(row, v);
  for (int i = 0; i < tail.count; ++i) p[i] = row[i];
}

// f(i, Whole or Tail) for all vectors of a row of n elements
template <class A, class F>
FASTCONV_INLINE void for_each_vector(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) f(i, Whole{});
  if (i < n) f(i, Tail{static_cast<int>(n - i)});
}

FASTCONV_INLINE VecF32 sqrt(VecF32 v) {
#if defined(__AVX512F__)
  return _mm512_sqrt_ps(v);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(v);
#elif defined(__SSE2__)
  return _mm_sqrt_ps(v);
#else
  for (int i = 0; i < kLanes<float>; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

FASTCONV_INLINE VecF64 sqrt(VecF64 v) {
#if defined(__AVX512F__)
  return _mm512_sqrt_pd(v);
#elif defined(__AVX2__)
  return _mm256_sqrt_pd(v);
#elif defined(__SSE2__)
  return _mm_sqrt_pd(v);
#else
  for (int i = 0; i < kLanes<double>; ++i) v[i] = __builtin_sqrt(v[i]);
  return v;
#endif
}

// Memory for the time of one call, not initialised, aligned to a cache line
template <class A>
class Scratch {
 public:
  explicit Scratch(int64_t size) { data_ = static_cast<A*>(::operator new(size * sizeof(A), std::align_val_t{64})); }
  Scratch(const Scratch&) = delete;
  ~Scratch() { ::operator delete(data_, std::align_val_t{64}); }
  A* data() const { return data_; }

 private:
  A* data_;
};

// The bounds of an activation. A bound that it does not have is NaN, as every comparison with that
// is false. So NaN and -0.0 pass through, as they do in torch.
template <class A>
struct Bounds {
  explicit Bounds(Activation activation)
      : lower(activation == Activation::kNone ? __builtin_nan("") : 0),
        upper(activation == Activation::kRelu6 ? 6 : __builtin_nan("")) {}

  template <class V>
  FASTCONV_INLINE V clamp(V v) const {
    v = broadcast(lower) > v ? broadcast(lower) : v;
    return broadcast(upper) < v ? broadcast(upper) : v;
  }

  // `grad` where the output of the activation lies between its bounds, else 0
  template <class V>
  FASTCONV_INLINE V mask(V grad, V output) const {
    grad = output <= broadcast(lower) ? V{} : grad;
    return output >= broadcast(upper) ? V{} : grad;
  }

  A lower, upper;
};

// f(T{}) with the element type of `dtype`
template <class F>
FASTCONV_INLINE void for_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kFloat64:
      return f(double{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Float16{});
  }
}

}  // namespace fastconv::FASTCONV_KERNEL_NAMESPACE
