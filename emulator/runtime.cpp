// The functions of device_api.h, but for launches.
#include <algorithm>
#include <bit>
#include <cstring>

#include "block.h"
#include "hopper.h"
#include "numbers.h"

namespace fastconv::emulator {
namespace {

Block& block() { return *current_block(); }

}  // namespace

void note(cuda::Instructions instructions) {
  if (Block* b = current_block()) b->statistics.instructions |= instructions;
}

uint3 thread_index() { return block().self().index; }
uint3 block_index() { return block().index(); }
dim3 block_size() { return block().block; }
dim3 grid_size() { return block().grid; }
void* shared_memory() { return block().own_shared(); }

uint32_t shared_address(const void* pointer, Where where) {
  Block& b = block();
  note(cuda::uses::kSmemAddress);
  const auto offset = static_cast<const unsigned char*>(pointer) - b.own_shared();
  if (!b.is_shared(reinterpret_cast<uintptr_t>(pointer))) {
    b.give_up("out of bounds", where, "the address of something that is not in shared memory is asked for");
  }
  return static_cast<uint32_t>(offset) + kSharedBase;
}

// ---- synchronisation

void sync_block(Where where) { block().sync_block(where); }

void sync_warp(uint32_t mask, Where where) {
  block().collective("__syncwarp", mask, {}, where, [](Block& b, const Collective& all) { b.sync_lanes(all.mask); });
}

uint32_t shuffle(Shuffle kind, uint32_t mask, uint32_t value, int operand, int width, Where where) {
  Block& b = block();
  note(cuda::uses::kShuffle);
  if (width < 1 || width > 32 || (width & (width - 1))) b.give_up("misuse", where, "a shuffle of an odd width");
  const int lane = b.self().lane;
  const int first = lane & ~(width - 1);
  int from = lane;
  if (kind == Shuffle::kIndex) from = first + (operand & (width - 1));
  if (kind == Shuffle::kXor) from = lane ^ operand;
  if (kind == Shuffle::kUp) from = lane - operand;
  if (kind == Shuffle::kDown) from = lane + operand;
  // Outside of its segment a lane gets its own value back.
  if (from < first || (from >= first + width)) from = lane;
  Contribution mine{};
  mine.d.v[0] = value;
  mine.d.v[1] = static_cast<uint32_t>(from);
  constexpr const char* kNames[] = {"__shfl_sync", "__shfl_xor_sync", "__shfl_up_sync", "__shfl_down_sync"};
  return b
      .collective(kNames[static_cast<int>(kind)], mask, mine, where,
                  [](Block& b, const Collective& all) {
                    for (int lane = 0; lane < 32; ++lane) {
                      if (!(all.mask >> lane & 1)) continue;
                      const uint32_t from = all.from[lane].d.v[1];
                      if (!(all.mask >> from & 1)) {
                        b.give_up(
                            "misuse", all.place,
                            std::string(all.op) + " reads lane " + std::to_string(from) + ", which takes no part");
                      }
                      b.fiber_of_lane(lane).result = all.from[from].d;
                    }
                  })
      .v[0];
}

uint32_t ballot(uint32_t mask, bool predicate, Where where) {
  note(cuda::uses::kShuffle);
  Contribution mine{};
  mine.d.v[0] = predicate;
  return block()
      .collective("a vote", mask, mine, where,
                  [](Block& b, const Collective& all) {
                    uint32_t votes = 0;
                    for (int lane = 0; lane < 32; ++lane) {
                      if (all.mask >> lane & 1) votes |= all.from[lane].d.v[0] << lane;
                    }
                    for (int lane = 0; lane < 32; ++lane) {
                      if (all.mask >> lane & 1) b.fiber_of_lane(lane).result = {{votes}};
                    }
                  })
      .v[0];
}

// ---- loads, stores, copies

Quad load(const void* source, int bytes, Where where) {
  note(cuda::uses::kLoadStore);
  if (Block* b = current_block()) b->access(source, static_cast<size_t>(bytes), false, true, where);
  Quad value{};
  std::memcpy(&value, source, static_cast<size_t>(bytes));
  return value;
}

void store(void* destination, Quad value, int bytes, Where where) {
  note(cuda::uses::kLoadStore);
  if (Block* b = current_block()) b->access(destination, static_cast<size_t>(bytes), true, true, where);
  std::memcpy(destination, &value, static_cast<size_t>(bytes));
}

void cp_async(int bytes, uint32_t destination, const void* source, bool predicate, Where where) {
  note(cuda::uses::kCpAsync);
  block().cp_async({source, destination, static_cast<uint8_t>(bytes), predicate, where});
}

void cp_async_commit() { block().cp_async_commit(); }
void cp_async_wait(int pending) { block().cp_async_wait(static_cast<size_t>(pending)); }

// ---- tensor cores

namespace {

// Eight rows take one pass when they lie in different groups of four banks; how many more these take.
uint64_t conflicts(const uint32_t (&address)[8]) {
  int passes = 1;
  for (int i = 0; i < 8; ++i) {
    int same_banks = 1;
    for (int j = 0; j < i; ++j) same_banks += address[j] / 16 % 8 == address[i] / 16 % 8 && address[j] != address[i];
    passes = std::max(passes, same_banks);
  }
  return static_cast<uint64_t>(passes - 1);
}

template <int kMatrices, bool kTransposed>
void run_ldmatrix(Block& b, const Collective& all) {
  ++b.statistics.ldmatrix;
  for (int m = 0; m < kMatrices; ++m) {
    const unsigned char* rows[8];
    uint32_t address[8];
    for (int i = 0; i < 8; ++i) {
      address[i] = all.from[m * 8 + i].d.v[0];
      const uint32_t offset = b.shared_offset(address[i], 16, "ldmatrix", all.place);
      b.shared_read_by_warp(offset, 16, all.place);
      rows[i] = b.shared + offset;
    }
    b.statistics.ldmatrix_conflicts += conflicts(address);
    for (int lane = 0; lane < 32; ++lane) {
      uint32_t& fragment = b.fiber_of_lane(lane).result.v[m];
      if constexpr (!kTransposed) {
        std::memcpy(&fragment, rows[lane / 4] + lane % 4 * 4, 4);
      } else {
        uint16_t low, high;
        std::memcpy(&low, rows[lane % 4 * 2] + lane / 4 * 2, 2);
        std::memcpy(&high, rows[lane % 4 * 2 + 1] + lane / 4 * 2, 2);
        fragment = low | static_cast<uint32_t>(high) << 16;
      }
    }
  }
}

template <Mma kKind>
float element(uint32_t pair, int which) {
  const uint16_t bits = static_cast<uint16_t>(pair >> 16 * which);
  return kKind == Mma::kHalf ? half_value(bits) : bfloat16_value(bits);
}

template <Mma kKind>
void run_mma(Block& b, const Collective& all) {
  constexpr int kDepth = kKind == Mma::kTf32 ? 8 : 16;
  ++b.statistics.mma;
  float left[16][kDepth], right[kDepth][8], sum[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Contribution& from = all.from[lane];
    const int g = lane / 4, t = lane % 4;
    if constexpr (kKind == Mma::kTf32) {
      // The 13 low bits do not count.
      for (int i = 0; i < 4; ++i) left[g + 8 * (i % 2)][t + 4 * (i / 2)] = std::bit_cast<float>(from.a.v[i] & ~0x1fffu);
      for (int i = 0; i < 2; ++i) right[t + 4 * i][g] = std::bit_cast<float>(from.b.v[i] & ~0x1fffu);
    } else {
      for (int e = 0; e < 2; ++e) {
        for (int i = 0; i < 4; ++i) left[g + 8 * (i % 2)][2 * t + e + 8 * (i / 2)] = element<kKind>(from.a.v[i], e);
        for (int i = 0; i < 2; ++i) right[2 * t + e + 8 * i][g] = element<kKind>(from.b.v[i], e);
      }
    }
    for (int i = 0; i < 4; ++i) sum[g + 8 * (i / 2)][2 * t + i % 2] = std::bit_cast<float>(from.d.v[i]);
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < kDepth; ++k) {
      for (int column = 0; column < 8; ++column) sum[row][column] += left[row][k] * right[k][column];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    Quad& result = b.fiber_of_lane(lane).result;
    for (int i = 0; i < 4; ++i) {
      result.v[i] = std::bit_cast<uint32_t>(sum[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2]);
    }
  }
}

template <bool kTransposed>
void run_stmatrix(Block& b, const Collective& all) {
  ++b.statistics.stmatrix;
  for (int m = 0; m < 4; ++m) {
    uint32_t address[8], offset[8];
    for (int i = 0; i < 8; ++i) {
      address[i] = all.from[m * 8 + i].d.v[0];
      offset[i] = b.shared_offset(address[i], 16, "stmatrix", all.place);
    }
    b.statistics.stmatrix_conflicts += conflicts(address);
    for (int lane = 0; lane < 32; ++lane) {
      for (int half = 0; half < 2; ++half) {
        const int row = kTransposed ? lane % 4 * 2 + half : lane / 4,
                  column = kTransposed ? lane / 4 : lane % 4 * 2 + half;
        const uint32_t at = offset[row] + static_cast<uint32_t>(column) * 2;
        const auto element = static_cast<uint16_t>(all.from[lane].a.v[m] >> 16 * half);
        b.hopper().write(b.fiber_of_lane(lane), at, 2, false, all.place);
        std::memcpy(b.shared + at, &element, 2);
      }
    }
  }
}

}  // namespace

Quad ldmatrix(int matrices, bool transposed, uint32_t address, Where where) {
  note(cuda::uses::kLdmatrix);
  Contribution mine{};
  mine.d.v[0] = address;
  if (matrices == 4) {
    return transposed ? block().collective("ldmatrix.x4.trans", ~0u, mine, where, &run_ldmatrix<4, true>)
                      : block().collective("ldmatrix.x4", ~0u, mine, where, &run_ldmatrix<4, false>);
  }
  return transposed ? block().collective("ldmatrix.x2.trans", ~0u, mine, where, &run_ldmatrix<2, true>)
                    : block().collective("ldmatrix.x2", ~0u, mine, where, &run_ldmatrix<2, false>);
}

Quad mma(Mma kind, Quad d, Quad a, Pair b, Where where) {
  constexpr cuda::Instructions kInstructions[] = {cuda::uses::kMmaHalf, cuda::uses::kMmaBFloat16, cuda::uses::kMmaTf32};
  note(kInstructions[static_cast<int>(kind)]);
  const Contribution mine{d, a, b};
  switch (kind) {
    case Mma::kHalf:
      return block().collective("mma.m16n8k16.f16", ~0u, mine, where, &run_mma<Mma::kHalf>);
    case Mma::kBFloat16:
      return block().collective("mma.m16n8k16.bf16", ~0u, mine, where, &run_mma<Mma::kBFloat16>);
    default:
      return block().collective("mma.m16n8k8.tf32", ~0u, mine, where, &run_mma<Mma::kTf32>);
  }
}

// ---- sm_90a

void mbarrier_init(uint32_t barrier, int arrivals, Where where) {
  note(cuda::uses::kMbarrier);
  block().hopper().mbarrier_init(barrier, arrivals, where);
}
void mbarrier_init_fence(Where) {
  note(cuda::uses::kMbarrier);
  block().hopper().mbarrier_init_fence();
}
void mbarrier_arrive(uint32_t barrier, uint32_t expected_bytes, Where where) {
  note(cuda::uses::kMbarrier);
  block().hopper().mbarrier_arrive(barrier, expected_bytes, where);
}
void mbarrier_wait(uint32_t barrier, uint32_t parity, Where where) {
  note(cuda::uses::kMbarrier);
  block().hopper().mbarrier_wait(barrier, parity, where);
}
void named_barrier_sync(int number, int threads, Where where) {
  note(cuda::uses::kNamedBarrier);
  block().hopper().named_barrier_sync(number, threads, where);
}
uint32_t cluster_rank() {
  note(cuda::uses::kCluster);
  return block().self().rank;
}
void cluster_sync(Where where) {
  note(cuda::uses::kCluster);
  block().hopper().cluster_sync(where);
}
void mbarrier_arrive_at(uint32_t barrier, uint32_t rank, Where where) {
  note(cuda::uses::kCluster);
  block().hopper().mbarrier_arrive_at(barrier, rank, where);
}
void fence_proxy_async(Where) {
  note(cuda::uses::kProxyFence);
  block().hopper().fence_proxy_async();
}

void tma_prefetch(const unsigned char* map, Where where) { block().hopper().tma_prefetch(map, where); }
void tma_load(uint32_t destination, const unsigned char* map, uint32_t barrier, int rank, bool im2col,
              BoxPosition position, Where where) {
  note(im2col ? cuda::uses::kTmaIm2col : cuda::uses::kTmaTiled);
  Block& b = block();
  b.hopper().tma_load(destination, map, barrier, 1u << b.self().rank, rank, im2col, position, where);
}
void tma_multicast(uint32_t destination, const unsigned char* map, uint32_t barrier, uint16_t blocks, int rank,
                   bool im2col, BoxPosition position, Where where) {
  note(cuda::uses::kTmaMulticast | (im2col ? cuda::uses::kTmaIm2col : cuda::uses::kTmaTiled));
  if (blocks == 0) block().give_up("misuse", where, "a multicast to no block");
  block().hopper().tma_load(destination, map, barrier, blocks, rank, im2col, position, where);
}
void tma_store(const unsigned char* map, uint32_t source, int rank, BoxPosition position, Where where) {
  note(cuda::uses::kTmaStore);
  block().hopper().tma_store(map, source, rank, position, where);
}
void tma_store_commit() { block().hopper().tma_store_commit(); }
void tma_store_wait(int pending) { block().hopper().tma_store_wait(static_cast<size_t>(pending)); }

void stmatrix_x4(uint32_t address, bool transposed, Quad fragments, Where where) {
  note(cuda::uses::kStmatrix);
  Contribution mine{};
  mine.d.v[0] = address;
  mine.a = fragments;
  if (transposed) {
    block().collective("stmatrix.x4.trans", ~0u, mine, where, &run_stmatrix<true>);
  } else {
    block().collective("stmatrix.x4", ~0u, mine, where, &run_stmatrix<false>);
  }
}
void set_registers(int count, bool more, Where where) {
  note(cuda::uses::kSetmaxnreg);
  block().hopper().set_registers(count, more, where);
}

void wgmma_fence(Where where) { block().hopper().wgmma_fence(where); }
void wgmma(WarpgroupProduct product, Where where) {
  note(product.kind == Mma::kHalf ? cuda::uses::kWgmmaHalf : cuda::uses::kWgmmaBFloat16);
  if (first_row(product.a) || first_row(product.b)) note(cuda::uses::kWgmmaRows);
  block().hopper().wgmma(product, where);
}
void wgmma_commit(Where where) { block().hopper().wgmma_commit(where); }
void wgmma_wait(int pending, Where where) { block().hopper().wgmma_wait(static_cast<size_t>(pending), where); }

}  // namespace fastconv::emulator
