// What the twins of csrc/cuda/{runtime,ptx} ask of the emulator. Values travel in registers, never by address: a local
// variable whose address escapes would have each of its accesses instrumented.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>

#include "cuda/runtime/instructions.h"

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace fastconv::cuda {
struct KernelInfo;
}

namespace fastconv::emulator {

using Where = std::source_location;

struct Pair {
  uint32_t v[2];
};
struct Quad {
  uint32_t v[4];
};

// Counts that the kernel that runs uses them; load, mma and their like do so themselves.
void note(cuda::Instructions instructions);

// The same for one thread from its begin to its end, whatever other threads do in between.
[[gnu::const]] uint3 thread_index();
[[gnu::const]] uint3 block_index();
[[gnu::const]] dim3 block_size();
[[gnu::const]] dim3 grid_size();
[[gnu::const]] void* shared_memory();
uint32_t shared_address(const void* pointer, Where where);

void sync_block(Where where);
void sync_warp(uint32_t mask, Where where);
enum class Shuffle { kIndex, kXor, kUp, kDown };
uint32_t shuffle(Shuffle kind, uint32_t mask, uint32_t value, int operand, int width, Where where);
uint32_t ballot(uint32_t mask, bool predicate, Where where);

// `bytes` is 1, 2, 4, 8 or 16; the rest of the Quad is 0.
Quad load(const void* source, int bytes, Where where);
void store(void* destination, Quad value, int bytes, Where where);

void cp_async(int bytes, uint32_t destination, const void* source, bool predicate, Where where);
void cp_async_commit();
void cp_async_wait(int pending);
Quad ldmatrix(int matrices, bool transposed, uint32_t address, Where where);
enum class Mma { kHalf, kBFloat16, kTf32 };
Quad mma(Mma kind, Quad d, Quad a, Pair b, Where where);

// ---- sm_90a, as csrc/cuda/ptx/sm90a.cuh has it

void mbarrier_init(uint32_t barrier, int arrivals, Where where);
void mbarrier_init_fence(Where where);
void mbarrier_arrive(uint32_t barrier, uint32_t expected_bytes, Where where);
void mbarrier_wait(uint32_t barrier, uint32_t parity, Where where);
void named_barrier_sync(int number, int threads, Where where);
uint32_t cluster_rank();
void cluster_sync(Where where);
void mbarrier_arrive_at(uint32_t barrier, uint32_t rank, Where where);
void fence_proxy_async(Where where);

// The innermost coordinate first; offsets of columns and of rows
struct BoxPosition {
  int at[4], offset[2];
};
void tma_prefetch(const unsigned char* map, Where where);
void tma_load(uint32_t destination, const unsigned char* map, uint32_t barrier, int rank, bool im2col,
              BoxPosition position, Where where);
void tma_multicast(uint32_t destination, const unsigned char* map, uint32_t barrier, uint16_t blocks, int rank,
                   bool im2col, BoxPosition position, Where where);
void tma_store(const unsigned char* map, uint32_t source, int rank, BoxPosition position, Where where);
void tma_store_commit();
void tma_store_wait(int pending);

void stmatrix_x4(uint32_t address, bool transposed, Quad fragments, Where where);
void set_registers(int count, bool more, Where where);

// A thread's part of a product: `d` are its registers, columns / 2 of them.
// Of the eight rows of a swizzle the one in which an operand begins
constexpr int first_row(uint64_t descriptor) { return static_cast<int>(descriptor >> 3 & 7); }

struct WarpgroupProduct {
  Mma kind;
  bool extent_a, extent_b, accumulate;  // extent: Major::kExtent
  int columns;
  float* d;
  uint64_t a, b;
};
void wgmma_fence(Where where);
void wgmma(WarpgroupProduct product, Where where);
void wgmma_commit(Where where);
void wgmma_wait(int pending, Where where);

// Runs call(kernel, params) once for each thread; throws std::runtime_error that lists what was found.
void launch(const cuda::KernelInfo& info, void (*call)(void* kernel, const void* params), void* kernel,
            const void* params, dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster, Where where);

}  // namespace fastconv::emulator
