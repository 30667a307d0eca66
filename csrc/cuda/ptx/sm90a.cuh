// Instructions of sm_90a that C++ has no word for: barriers in shared memory, copies of boxes of a tensor (TMA),
// products of a warpgroup, registers that warpgroups hand each other. emulator/include/cuda/ptx/sm90a.cuh is the twin
// for a host compiler; the cases of cuda/conformance/sm90a compare the two.
//
// Boxes and products go through the async proxy: what threads wrote to shared memory they see after
// fence_proxy_async, which the writing threads call before they tell anybody, and their own writes threads see once a
// barrier or a wait has told them. A warpgroup is four warps, the first of which has a number that 4 divides.
#pragma once

#include "cuda/ptx/sm80.cuh"
#include "cuda/runtime/tensor_map.h"

namespace fastconv::cuda::ptx {

// ---- barriers: 8 bytes of shared memory. One is passed in phases of so many arrivals and so many bytes as were
// expected; a waiting thread names the parity of the phase that is to end, 0 for the first.

FASTCONV_DEVICE void mbarrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After the inits, by the thread that did them; other threads see them after the next barrier of the block.
FASTCONV_DEVICE void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}
FASTCONV_DEVICE void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and has the phase wait for so many bytes of boxes, too.
FASTCONV_DEVICE void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Returns when the phase of that parity has ended.
FASTCONV_DEVICE void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// A barrier of some of the block's warps: `threads` of them, all in whole warps. Number 0 is that of __syncthreads.
FASTCONV_DEVICE void named_barrier_sync(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// ---- clusters: blocks that run at the same time and reach each other's shared memory

// Of this block in its cluster
FASTCONV_DEVICE uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// A barrier of all threads of the cluster that have not ended.
FASTCONV_DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Arrives at the barrier at the same place of another block, or of this one.
FASTCONV_DEVICE void mbarrier_arrive_at(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// What this thread wrote to shared memory is seen by boxes that are stored, and by products.
FASTCONV_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- boxes of tensors. `map` lies in a kernel's parameters; coordinates are elements, the innermost first. Boxes of
// 128-byte rows are swizzled: 16-byte chunk c of row r lies at chunk c ^ r % 8; they begin at multiples of 1024 bytes.
// What lies outside of the tensor arrives as 0, and counts as bytes; and is not stored.

FASTCONV_DEVICE void tma_prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
FASTCONV_DEVICE void tma_load_2d(uint32_t destination, const TensorMap& map, uint32_t barrier, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
          "r"(destination),
      "l"(&map), "r"(barrier), "r"(c0), "r"(c1)
      : "memory");
}
FASTCONV_DEVICE void tma_load_3d(uint32_t destination, const TensorMap& map, uint32_t barrier, int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
      "[%2];" ::"r"(destination),
      "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}
// So many pixels as the map says, from this one on in the order of the map's walk, of each the one that lies offset_h
// and offset_w further. The first pixel lies in the map's bounds.
FASTCONV_DEVICE void tma_load_im2col(uint32_t destination, const TensorMap& map, uint32_t barrier, int c, int w, int h,
                                     int n, int offset_w, int offset_h) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
      "%6}], [%2], {%7, %8};" ::"r"(destination),
      "l"(&map), "r"(barrier), "r"(c), "r"(w), "r"(h), "r"(n), "h"(static_cast<uint16_t>(offset_w)),
      "h"(static_cast<uint16_t>(offset_h))
      : "memory");
}

// The same boxes into the shared memory of several blocks of a cluster, bit i of `blocks` being that of rank i: to the
// same place of each, with its bytes told to the barrier at the same place of each.
FASTCONV_DEVICE void tma_multicast_2d(uint32_t destination, const TensorMap& map, uint32_t barrier, uint16_t blocks,
                                      int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, "
      "{%4, %5}], [%2], %3;" ::"r"(destination),
      "l"(&map), "r"(barrier), "h"(blocks), "r"(c0), "r"(c1)
      : "memory");
}
FASTCONV_DEVICE void tma_multicast_3d(uint32_t destination, const TensorMap& map, uint32_t barrier, uint16_t blocks,
                                      int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, "
      "{%4, %5, %6}], [%2], %3;" ::"r"(destination),
      "l"(&map), "r"(barrier), "h"(blocks), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}
FASTCONV_DEVICE void tma_multicast_im2col(uint32_t destination, const TensorMap& map, uint32_t barrier, uint16_t blocks,
                                          int c, int w, int h, int n, int offset_w, int offset_h) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%4, %5, %6, %7}], [%2], {%8, %9}, %3;" ::"r"(destination),
      "l"(&map), "r"(barrier), "h"(blocks), "r"(c), "r"(w), "r"(h), "r"(n), "h"(static_cast<uint16_t>(offset_w)),
      "h"(static_cast<uint16_t>(offset_h))
      : "memory");
}

FASTCONV_DEVICE void tma_store_2d(const TensorMap& map, uint32_t source, int c0, int c1) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
               "r"(source), "r"(c0), "r"(c1)
               : "memory");
}
FASTCONV_DEVICE void tma_store_3d(const TensorMap& map, uint32_t source, int c0, int c1, int c2) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
               "r"(source), "r"(c0), "r"(c1), "r"(c2)
               : "memory");
}
// Closes the group of the stores that this thread has issued since the last one.
FASTCONV_DEVICE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Returns when all but the last kPending of this thread's groups have read their shared memory ...
template <int kPending>
FASTCONV_DEVICE void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// ... and have written it.
template <int kPending>
FASTCONV_DEVICE void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- 8x8 matrices of 16-bit elements to shared memory: the inverse of ldmatrix_x4, and of ldmatrix_x4_trans

FASTCONV_DEVICE void stmatrix_x4(uint32_t address, const uint32_t (&fragments)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(fragments[0]),
               "r"(fragments[1]), "r"(fragments[2]), "r"(fragments[3])
               : "memory");
}

FASTCONV_DEVICE void stmatrix_x4_trans(uint32_t address, const uint32_t (&fragments)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(fragments[0]), "r"(fragments[1]), "r"(fragments[2]), "r"(fragments[3])
               : "memory");
}

// ---- registers: a warpgroup gives up what it has beyond kCount of each thread, or waits until it has so many

template <int kCount>
FASTCONV_DEVICE void registers_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
FASTCONV_DEVICE void registers_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// ---- products of a warpgroup, which read shared memory while the program goes on

// Operands: 64 rows of A, kN columns of B, in boxes of 128-byte rows with their swizzle. kDepth: a row holds 64 places
// of the depth, rows follow each other. kExtent: a row holds 64 rows (of A) or columns (of B) of one place of the
// depth; where an operand has more of them, the next 64 begin `next` bytes on.
enum class Major { kDepth, kExtent };

// What wgmma takes for the operand that begins at this address, which may be in any row of a box: the swizzle's pattern
// still begins at a multiple of 1024, so that its offset in the descriptor is 0. 16 places of the depth further are 32
// bytes (kDepth) or 2048 (kExtent), to be added to the descriptor as so many / 16.
template <Major kMajor>
FASTCONV_DEVICE uint64_t wgmma_operand(uint32_t address, uint32_t next = 16) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kEightRows = uint64_t{1024 / 16} << 32;
  const uint64_t leading = kMajor == Major::kDepth ? 1 : next / 16;
  return kSwizzle128 | kEightRows | leading << 16 | (address & 0x3ffff) / 16;
}

// Before the first product, and whenever the threads have touched the accumulators since
FASTCONV_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Closes the group of the products since the last one.
FASTCONV_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Returns when all but the last kPending groups are done: their operands have been read, their sums are there.
template <int kPending>
FASTCONV_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// After the wait that must have them: the compiler, which does not know that products go on, leaves what uses these
// sums behind this.
template <int kCount>
FASTCONV_DEVICE void wgmma_sums(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// d = a * b, or d += a * b, over 16 places of the depth, in float32. With w the warp in its warpgroup, g = lane / 4 and
// t = lane % 4, d[i] is row 16w + g + 8 (i / 2 % 2), column 8 (i / 4) + 2t + i % 2.
template <class T, Major kMajorA, Major kMajorB, int kN>
struct Wgmma;
template <class T, Major kMajorA, Major kMajorB, int kCount>
FASTCONV_DEVICE void wgmma(float (&d)[kCount], uint64_t a, uint64_t b, bool accumulate) {
  Wgmma<T, kMajorA, kMajorB, 2 * kCount>::run(d, a, b, accumulate);
}

// The instruction for kN columns, with that many registers / 2, of which the asm's operands have the first numbers
#define FASTCONV_R8(n0, n1, n2, n3, n4, n5, n6, n7) \
  "%" #n0 ", %" #n1 ", %" #n2 ", %" #n3 ", %" #n4 ", %" #n5 ", %" #n6 ", %" #n7
#define FASTCONV_R32_0                                                                                              \
  FASTCONV_R8(0, 1, 2, 3, 4, 5, 6, 7)                                                                               \
  ", " FASTCONV_R8(8, 9, 10, 11, 12, 13, 14, 15) ", " FASTCONV_R8(16, 17, 18, 19, 20, 21, 22, 23) ", " FASTCONV_R8( \
      24, 25, 26, 27, 28, 29, 30, 31)
#define FASTCONV_R32_32                                                                                               \
  FASTCONV_R8(32, 33, 34, 35, 36, 37, 38, 39)                                                                         \
  ", " FASTCONV_R8(40, 41, 42, 43, 44, 45, 46, 47) ", " FASTCONV_R8(48, 49, 50, 51, 52, 53, 54, 55) ", " FASTCONV_R8( \
      56, 57, 58, 59, 60, 61, 62, 63)
#define FASTCONV_R32_64                                                                                               \
  FASTCONV_R8(64, 65, 66, 67, 68, 69, 70, 71)                                                                         \
  ", " FASTCONV_R8(72, 73, 74, 75, 76, 77, 78, 79) ", " FASTCONV_R8(80, 81, 82, 83, 84, 85, 86, 87) ", " FASTCONV_R8( \
      88, 89, 90, 91, 92, 93, 94, 95)
#define FASTCONV_R32_96                                                      \
  FASTCONV_R8(96, 97, 98, 99, 100, 101, 102, 103)                            \
  ", " FASTCONV_R8(104, 105, 106, 107, 108, 109, 110, 111) ", " FASTCONV_R8( \
      112, 113, 114, 115, 116, 117, 118, 119) ", " FASTCONV_R8(120, 121, 122, 123, 124, 125, 126, 127)
#define FASTCONV_D8(i)                                                                                        \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define FASTCONV_D32(i) FASTCONV_D8(i), FASTCONV_D8(i + 8), FASTCONV_D8(i + 16), FASTCONV_D8(i + 24)
#define FASTCONV_WGMMA(T, type, n, registers, a_, b_, accumulate_, major_a_, major_b_, ...)                            \
  template <Major kMajorA, Major kMajorB>                                                                              \
  struct Wgmma<T, kMajorA, kMajorB, n> {                                                                               \
    FASTCONV_DEVICE static void run(float (&d)[n / 2], uint64_t a, uint64_t b, bool accumulate) {                      \
      asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %" #accumulate_                                 \
                   ", 0;\n"                                                                                            \
                   "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" registers "}, %" #a_ ", %" #b_ \
                   ", accumulate, 1, 1, %" #major_a_ ", %" #major_b_ ";\n}"                                            \
                   : __VA_ARGS__                                                                                       \
                   : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kMajorA == Major::kExtent),                \
                     "n"(kMajorB == Major::kExtent));                                                                  \
    }                                                                                                                  \
  };
#define FASTCONV_WGMMAS(T, type)                                                                                   \
  FASTCONV_WGMMA(T, type, 64, FASTCONV_R32_0, 32, 33, 34, 35, 36, FASTCONV_D32(0))                                 \
  FASTCONV_WGMMA(T, type, 128, FASTCONV_R32_0 ", " FASTCONV_R32_32, 64, 65, 66, 67, 68, FASTCONV_D32(0),           \
                 FASTCONV_D32(32))                                                                                 \
  FASTCONV_WGMMA(T, type, 192, FASTCONV_R32_0 ", " FASTCONV_R32_32 ", " FASTCONV_R32_64, 96, 97, 98, 99, 100,      \
                 FASTCONV_D32(0), FASTCONV_D32(32), FASTCONV_D32(64))                                              \
  FASTCONV_WGMMA(T, type, 256, FASTCONV_R32_0 ", " FASTCONV_R32_32 ", " FASTCONV_R32_64 ", " FASTCONV_R32_96, 128, \
                 129, 130, 131, 132, FASTCONV_D32(0), FASTCONV_D32(32), FASTCONV_D32(64), FASTCONV_D32(96))
FASTCONV_WGMMAS(Half, "f16")
FASTCONV_WGMMAS(BFloat16, "bf16")
#undef FASTCONV_WGMMAS
#undef FASTCONV_WGMMA
#undef FASTCONV_D32
#undef FASTCONV_D8
#undef FASTCONV_R32_0
#undef FASTCONV_R32_32
#undef FASTCONV_R32_64
#undef FASTCONV_R32_96
#undef FASTCONV_R8

}  // namespace fastconv::cuda::ptx
