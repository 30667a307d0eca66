// The twin of csrc/cuda/ptx/sm80.cuh for a host compiler: same signatures, the emulator instead of instructions.
#pragma once

#include "cuda/runtime/types.cuh"

namespace fastconv::cuda::ptx {

using emulator::Where;

inline uint32_t smem_address(const void* pointer, Where where = Where::current()) {
  return emulator::shared_address(pointer, where);
}

template <int kBytes>
inline void cp_async(uint32_t destination, const void* source, bool predicate, Where where = Where::current()) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  emulator::cp_async(kBytes, destination, source, predicate, where);
}

inline void cp_async_commit() { emulator::cp_async_commit(); }

template <int kPending>
inline void cp_async_wait() {
  emulator::cp_async_wait(kPending);
}

namespace detail {
template <int kCount>
inline void ldmatrix(uint32_t (&fragments)[kCount], bool transposed, uint32_t address, Where where) {
  const emulator::Quad result = emulator::ldmatrix(kCount, transposed, address, where);
  for (int i = 0; i < kCount; ++i) fragments[i] = result.v[i];
}
inline void mma(emulator::Mma kind, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where) {
  const emulator::Quad accumulator{{std::bit_cast<uint32_t>(d[0]), std::bit_cast<uint32_t>(d[1]),
                                    std::bit_cast<uint32_t>(d[2]), std::bit_cast<uint32_t>(d[3])}};
  const emulator::Quad result = emulator::mma(kind, accumulator, {{a[0], a[1], a[2], a[3]}}, {{b[0], b[1]}}, where);
  for (int i = 0; i < 4; ++i) d[i] = std::bit_cast<float>(result.v[i]);
}
template <class T>
struct MmaOf;
template <>
struct MmaOf<Half> {
  static constexpr emulator::Mma kKind = emulator::Mma::kHalf;
};
template <>
struct MmaOf<BFloat16> {
  static constexpr emulator::Mma kKind = emulator::Mma::kBFloat16;
};
}  // namespace detail

inline void ldmatrix_x4(uint32_t (&fragments)[4], uint32_t address, Where where = Where::current()) {
  detail::ldmatrix(fragments, false, address, where);
}
inline void ldmatrix_x4_trans(uint32_t (&fragments)[4], uint32_t address, Where where = Where::current()) {
  detail::ldmatrix(fragments, true, address, where);
}
inline void ldmatrix_x2(uint32_t (&fragments)[2], uint32_t address, Where where = Where::current()) {
  detail::ldmatrix(fragments, false, address, where);
}
inline void ldmatrix_x2_trans(uint32_t (&fragments)[2], uint32_t address, Where where = Where::current()) {
  detail::ldmatrix(fragments, true, address, where);
}

template <class T>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         Where where = Where::current()) {
  detail::mma(detail::MmaOf<T>::kKind, d, a, b, where);
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             Where where = Where::current()) {
  detail::mma(emulator::Mma::kTf32, d, a, b, where);
}

inline float rsqrt_approx(float v) {
  emulator::note(uses::kRsqrt);
  return 1.0f / std::sqrt(v);
}
inline float sqrt_approx(float v) {
  emulator::note(uses::kSqrt);
  return std::sqrt(v);
}
inline float log2_approx(float v) {
  emulator::note(uses::kLog2);
  return std::log2(v);
}
inline float exp2_approx(float v) {
  emulator::note(uses::kExp2);
  return std::exp2(v);
}

inline uint32_t to_tf32(float v) {
  emulator::note(uses::kToTf32);
  const uint32_t bits = std::bit_cast<uint32_t>(v);
  if ((bits & 0x7f800000) == 0x7f800000) return v != v ? 0x7fffffff : bits;
  return (bits + 0x1000) & ~uint32_t{0x1fff};
}

}  // namespace fastconv::cuda::ptx
