// Instructions of sm_80 that C++ has no word for, as typed functions; this folder has the library's only inline
// assembly. emulator/include/cuda/ptx/sm80.cuh is the twin for a host compiler; the cases of cuda/conformance compare
// the two.
//
// Shared memory is addressed by 32-bit addresses of the shared window (smem_address). ldmatrix and mma are collectives
// of a full warp.
#pragma once

#include "cuda/runtime/types.cuh"

namespace fastconv::cuda::ptx {

FASTCONV_DEVICE uint32_t smem_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies kBytes from global to shared memory, asynchronously; both addresses are multiples of kBytes. Where `predicate`
// is false `source` is not read, and may be any multiple of kBytes; the destination becomes 0.
template <int kBytes>
FASTCONV_DEVICE void cp_async(uint32_t destination, const void* source, bool predicate) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  const int bytes = predicate ? kBytes : 0;
  if constexpr (kBytes == 16) {
    // .cg: past L1, where a tile that is used once would only take room.
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(destination), "l"(source), "n"(kBytes),
                 "r"(bytes)
                 : "memory");
  }
}

// Closes the group of the copies that this thread has issued since the last one; it may be empty.
FASTCONV_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Returns when at most kPending of this thread's groups are under way. Other threads see the data after a barrier.
template <int kPending>
FASTCONV_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// 8x8 matrices of 16-bit elements. Lanes 8i ... 8i+7 give the addresses of the rows of matrix i, 16 bytes each.
// Afterwards fragments[i] of lane l holds elements 2(l % 4) and 2(l % 4) + 1 of row l / 4; with _trans, of column l
// / 4.
FASTCONV_DEVICE void ldmatrix_x4(uint32_t (&fragments)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragments[0]), "=r"(fragments[1]), "=r"(fragments[2]), "=r"(fragments[3])
               : "r"(address)
               : "memory");
}
FASTCONV_DEVICE void ldmatrix_x4_trans(uint32_t (&fragments)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragments[0]), "=r"(fragments[1]), "=r"(fragments[2]), "=r"(fragments[3])
               : "r"(address)
               : "memory");
}
// Lanes 16 ... 31 give no addresses here.
FASTCONV_DEVICE void ldmatrix_x2(uint32_t (&fragments)[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(fragments[0]), "=r"(fragments[1])
               : "r"(address)
               : "memory");
}
FASTCONV_DEVICE void ldmatrix_x2_trans(uint32_t (&fragments)[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(fragments[0]), "=r"(fragments[1])
               : "r"(address)
               : "memory");
}

// d += a * b for a 16x16 row-major a, a 16x8 column-major b and a 16x8 d in float32. With g = lane / 4 and t = lane %
// 4:
//   a[i]: row g + 8 (i % 2), columns 2t + 8 (i / 2) and the next
//   b[i]: column g, rows 2t + 8i and the next
//   d[i]: row g + 8 (i / 2), column 2t + i % 2
template <class T>
FASTCONV_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) = delete;
template <>
FASTCONV_DEVICE void mma_m16n8k16<Half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
FASTCONV_DEVICE void mma_m16n8k16<BFloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same for a 16x8 a and an 8x8 b in TF32, which is float32 whose 13 low bits do not count (convert with to_tf32):
//   a[i]: row g + 8 (i % 2), column t + 4 (i / 2)
//   b[i]: column g, row t + 4i
FASTCONV_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Good to about 22 bits. Of v that is neither subnormal nor negative; infinity and NaN as the exact functions have
// them.
FASTCONV_DEVICE float rsqrt_approx(float v) {
  float result;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
}
FASTCONV_DEVICE float sqrt_approx(float v) {
  float result;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
}
FASTCONV_DEVICE float log2_approx(float v) {
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
}
// Of any v; results may be subnormal.
FASTCONV_DEVICE float exp2_approx(float v) {
  float result;
  asm("ex2.approx.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
}

// Rounds to nearest, ties away from zero.
FASTCONV_DEVICE uint32_t to_tf32(float v) {
  uint32_t result;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(v));
  return result;
}

}  // namespace fastconv::cuda::ptx
