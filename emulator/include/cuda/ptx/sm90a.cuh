// The twin of csrc/cuda/ptx/sm90a.cuh for a host compiler: same signatures, the emulator instead of instructions.
#pragma once

#include "cuda/ptx/sm80.cuh"
#include "cuda/runtime/tensor_map.h"

namespace fastconv::cuda::ptx {

inline void mbarrier_init(uint32_t barrier, int arrivals, Where where = Where::current()) {
  emulator::mbarrier_init(barrier, arrivals, where);
}
inline void mbarrier_init_fence(Where where = Where::current()) { emulator::mbarrier_init_fence(where); }
inline void mbarrier_arrive(uint32_t barrier, Where where = Where::current()) {
  emulator::mbarrier_arrive(barrier, 0, where);
}
inline void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes, Where where = Where::current()) {
  emulator::mbarrier_arrive(barrier, bytes, where);
}
inline void mbarrier_wait(uint32_t barrier, uint32_t parity, Where where = Where::current()) {
  emulator::mbarrier_wait(barrier, parity, where);
}

inline void named_barrier_sync(int number, int threads, Where where = Where::current()) {
  emulator::named_barrier_sync(number, threads, where);
}

inline uint32_t cluster_rank() { return emulator::cluster_rank(); }
inline void cluster_sync(Where where = Where::current()) { emulator::cluster_sync(where); }
inline void mbarrier_arrive_at(uint32_t barrier, uint32_t rank, Where where = Where::current()) {
  emulator::mbarrier_arrive_at(barrier, rank, where);
}

inline void fence_proxy_async(Where where = Where::current()) { emulator::fence_proxy_async(where); }

inline void tma_prefetch(const TensorMap& map, Where where = Where::current()) {
  emulator::tma_prefetch(map.bytes, where);
}
inline void tma_load_2d(uint32_t destination, const TensorMap& map, uint32_t barrier, int c0, int c1,
                        Where where = Where::current()) {
  emulator::tma_load(destination, map.bytes, barrier, 2, false, {{c0, c1}, {}}, where);
}
inline void tma_load_3d(uint32_t destination, const TensorMap& map, uint32_t barrier, int c0, int c1, int c2,
                        Where where = Where::current()) {
  emulator::tma_load(destination, map.bytes, barrier, 3, false, {{c0, c1, c2}, {}}, where);
}
inline void tma_load_im2col(uint32_t destination, const TensorMap& map, uint32_t barrier, int c, int w, int h, int n,
                            int offset_w, int offset_h, Where where = Where::current()) {
  emulator::tma_load(destination, map.bytes, barrier, 4, true, {{c, w, h, n}, {offset_w, offset_h}}, where);
}

inline void tma_multicast_2d(uint32_t destination, const TensorMap& map, uint32_t barrier, uint16_t blocks, int c0,
                             int c1, Where where = Where::current()) {
  emulator::tma_multicast(destination, map.bytes, barrier, blocks, 2, false, {{c0, c1}, {}}, where);
}
inline void tma_multicast_3d(uint32_t destination, const TensorMap& map, uint32_t barrier, uint16_t blocks, int c0,
                             int c1, int c2, Where where = Where::current()) {
  emulator::tma_multicast(destination, map.bytes, barrier, blocks, 3, false, {{c0, c1, c2}, {}}, where);
}
inline void tma_multicast_im2col(uint32_t destination, const TensorMap& map, uint32_t barrier, uint16_t blocks, int c,
                                 int w, int h, int n, int offset_w, int offset_h, Where where = Where::current()) {
  emulator::tma_multicast(destination, map.bytes, barrier, blocks, 4, true, {{c, w, h, n}, {offset_w, offset_h}},
                          where);
}

inline void tma_store_2d(const TensorMap& map, uint32_t source, int c0, int c1, Where where = Where::current()) {
  emulator::tma_store(map.bytes, source, 2, {{c0, c1}, {}}, where);
}
inline void tma_store_3d(const TensorMap& map, uint32_t source, int c0, int c1, int c2,
                         Where where = Where::current()) {
  emulator::tma_store(map.bytes, source, 3, {{c0, c1, c2}, {}}, where);
}
inline void tma_store_commit() { emulator::tma_store_commit(); }
// The emulator writes what it has read at once.
template <int kPending>
inline void tma_store_wait_read() {
  emulator::tma_store_wait(kPending);
}
template <int kPending>
inline void tma_store_wait() {
  emulator::tma_store_wait(kPending);
}

inline void stmatrix_x4(uint32_t address, const uint32_t (&fragments)[4], Where where = Where::current()) {
  emulator::stmatrix_x4(address, false, {{fragments[0], fragments[1], fragments[2], fragments[3]}}, where);
}
inline void stmatrix_x4_trans(uint32_t address, const uint32_t (&fragments)[4], Where where = Where::current()) {
  emulator::stmatrix_x4(address, true, {{fragments[0], fragments[1], fragments[2], fragments[3]}}, where);
}

template <int kCount>
inline void registers_decrease(Where where = Where::current()) {
  emulator::set_registers(kCount, false, where);
}
template <int kCount>
inline void registers_increase(Where where = Where::current()) {
  emulator::set_registers(kCount, true, where);
}

enum class Major { kDepth, kExtent };

template <Major kMajor>
inline uint64_t wgmma_operand(uint32_t address, uint32_t next = 16) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kEightRows = uint64_t{1024 / 16} << 32;
  const uint64_t leading = kMajor == Major::kDepth ? 1 : next / 16;
  return kSwizzle128 | kEightRows | leading << 16 | (address & 0x3ffff) / 16;
}

inline void wgmma_fence(Where where = Where::current()) { emulator::wgmma_fence(where); }
inline void wgmma_commit(Where where = Where::current()) { emulator::wgmma_commit(where); }
template <int kPending>
inline void wgmma_wait(Where where = Where::current()) {
  emulator::wgmma_wait(kPending, where);
}

template <int kCount>
inline void wgmma_sums(float (&)[kCount]) {}

template <class T, Major kMajorA, Major kMajorB, int kCount>
inline void wgmma(float (&d)[kCount], uint64_t a, uint64_t b, bool accumulate, Where where = Where::current()) {
  emulator::wgmma(
      {detail::MmaOf<T>::kKind, kMajorA == Major::kExtent, kMajorB == Major::kExtent, accumulate, 2 * kCount, d, a, b},
      where);
}

}  // namespace fastconv::cuda::ptx
