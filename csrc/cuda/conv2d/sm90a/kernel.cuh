// The kernel of implicit GEMMs for Hopper (sm_90a): the same GEMMs as sm80/kernel.cuh has, at the rate of wgmma.
//
//   ../boxes.h     the GEMM in boxes, the maps of its tensors
//   tile.cuh       configuration, shared memory, tiles, the ring of stages
//   loads.cuh      the boxes of a tile's operands
//   results.cuh    bias, residual and activation; the boxes of results
//
// A block stays on its multiprocessor and does one tile after the other. Its first warpgroup gives its registers away;
// one thread of it has the TMA bring boxes into a ring of stages, as far ahead as the ring allows, across tiles, too.
// The other two multiply what has come, straight from shared memory, and have the TMA store the results.
// Needs 227 KiB of shared memory; bound by the tensor cores, or by memory where channels are few.
#pragma once

#include <type_traits>

#include "cuda/conv2d/sm90a/loads.cuh"
#include "cuda/conv2d/sm90a/results.cuh"

namespace fastconv::cuda::inline sm90a {

template <class C>
FASTCONV_DEVICE void sync_cluster() {
  if constexpr (C::kCluster == 1) {
    __syncthreads();
  } else {
    ptx::cluster_sync();
  }
}

template <Pass kPass, class C>
FASTCONV_DEVICE void produce(const BoxParams& p, const Shared<C>& shared) {
  Turn<C::kStages> turn;
  for (int work = static_cast<int>(blockIdx.x) / C::kCluster; work < p.work;
       work += static_cast<int>(gridDim.x) / C::kCluster) {
    const Place at = place<C>(p, work);
    Loads<kPass, C> loads(p, at);
    for (int box = at.first; box < at.last; ++box) {
      ptx::mbarrier_wait(shared.empty(turn.stage), turn.parity ^ 1);
      ptx::mbarrier_arrive_expect(shared.full(turn.stage), C::kStageBytes);
      loads.next(shared.stage(turn.stage), shared.full(turn.stage));
      turn.advance();
    }
  }
}

// The products of one tile; the ring is then behind its boxes. `order`: the parity of the phase in which the tile
// before it was, see Shared::order.
template <Pass kPass, class C>
FASTCONV_DEVICE void multiply(const Place& at, const Shared<C>& shared, int consumer, uint32_t order,
                              Turn<C::kStages>& turn, typename Results<kPass, C>::Sums& sums) {
  using T = typename C::T;
  constexpr ptx::Major kMajorA = Loads<kPass, C>::kMajorA, kMajorB = Loads<kPass, C>::kMajorB;
  constexpr int kSteps = kBox / 16;
  // 16 places of the depth, in bytes; 64 rows
  constexpr int kStepA = kMajorA == ptx::Major::kDepth ? 32 : 2048, kStepB = kMajorB == ptx::Major::kDepth ? 32 : 2048;
  const uint32_t rows = C::kTogether ? consumer * C::kRows * kBoxRowBytes : 0;
  const uint64_t first_a = ptx::wgmma_operand<kMajorA>(shared.stage(0) + rows, kBoxBytes);
  const uint64_t first_b = ptx::wgmma_operand<kMajorB>(shared.stage(0) + C::kBytesA, kBoxBytes);
  const auto release = [&](int stage) {
    if constexpr (C::kCluster == 1) {
      arrive_of_warp(shared.empty(stage));
    } else {
      // Of all blocks that bring boxes here
      const int lane = lane_of_warp();
      if (lane < C::kCluster) ptx::mbarrier_arrive_at(shared.empty(stage), lane);
    }
  };
  // Those of the stage that the ring is at, which go on when this returns
  const auto products = [&](auto adds) {
    ptx::mbarrier_wait(shared.full(turn.stage), turn.parity);
    const uint64_t a = first_a + turn.stage * (C::kStageBytes / 16), b = first_b + turn.stage * (C::kStageBytes / 16);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int block = 0; block < C::kBlocks; ++block) {
        ptx::wgmma<T, kMajorA, kMajorB>(sums[block], a + (block * kBoxBytes + step * kStepA) / 16,
                                        b + step * kStepB / 16, decltype(adds)::value || step > 0);
      }
    }
    ptx::wgmma_commit();
  };
  // A stage's barrier tells two phases apart, so nobody waits for a phase before the one in front of it has ended; and
  // the tensor cores finish one tile before they begin the next.
  if (!C::kTogether) ptx::mbarrier_wait(shared.order(consumer), order);
  products(std::false_type{});
  int before = turn.stage;
  turn.advance();
#pragma unroll 1
  for (int box = at.first + 1; box < at.last; ++box) {
    products(std::true_type{});
    ptx::wgmma_wait<1>();
    release(before);
    before = turn.stage;
    turn.advance();
  }
  if (!C::kTogether) arrive_of_warp(shared.order(1 - consumer));
  ptx::wgmma_wait<0>();
#pragma unroll
  for (int block = 0; block < C::kBlocks; ++block) ptx::wgmma_sums(sums[block]);
  release(before);
}

template <Pass kPass, class C>
FASTCONV_KERNEL(C::kThreads, 1)
conv2d_box_kernel(const __grid_constant__ BoxParams p) {
  const Shared<C> shared{SharedMemory::of_block()};
  // The same in all lanes, as the compiler then knows
  const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  if (threadIdx.x == 0) {
    // A stage is read by all warps that share its tile, in every block that it is filled for.
    constexpr int kReaders = (C::kTogether ? C::kConsumers : 1) * kWarpgroup / 32 * C::kCluster;
    for (int stage = 0; stage < C::kStages; ++stage) {
      ptx::mbarrier_init(shared.full(stage), 1);
      ptx::mbarrier_init(shared.empty(stage), kReaders);
    }
    for (int i = 0; i < 2 * C::kConsumers; ++i) ptx::mbarrier_init(shared.residual(i / 2, i % 2), 1);
    for (int i = 0; i < C::kConsumers; ++i) ptx::mbarrier_init(shared.order(i), kWarpgroup / 32);
    ptx::mbarrier_init_fence();
    ptx::tma_prefetch(p.image);
    ptx::tma_prefetch(kPass == Pass::kWgrad ? p.gradient : p.weight[0]);
    if (p.plain_result) ptx::tma_prefetch(p.result[0]);
  }
  sync_cluster<C>();
  if (warpgroup == 0) {
    ptx::registers_decrease<C::kProducerRegisters>();
    if (threadIdx.x == 0) produce<kPass, C>(p, shared);
    return;
  }
  ptx::registers_increase<C::kConsumerRegisters>();
  const int consumer = warpgroup - 1;
  Results<kPass, C> results(p, shared, consumer);
  Turn<C::kStages> turn;
  for (int work = static_cast<int>(blockIdx.x) / C::kCluster, index = 0; work < p.work;
       work += static_cast<int>(gridDim.x) / C::kCluster, ++index) {
    const Place at = place<C>(p, work);
    if (!C::kTogether && index % C::kConsumers != consumer) {
      turn.advance(at.last - at.first);  // another's tile
      continue;
    }
    typename Results<kPass, C>::Sums sums;
    results.begin(at);
    // The first warpgroup begins: nothing is before its first tile, and what ended before the first phase is odd.
    const uint32_t order = (index / C::kConsumers + 1 + consumer) % 2;
    multiply<kPass, C>(at, shared, consumer, order, turn, sums);
    results.finish(at, sums);
  }
  results.end();
  // Others bring boxes here, and tell this block's barriers, until they are done.
  if constexpr (C::kCluster > 1) ptx::cluster_sync();
}

}  // namespace fastconv::cuda::inline sm90a
