// A kernel of clusters with one bug each, planted by a template parameter, as bugs.cu has them;
// test_emulator_clusters.py runs them.
#include "cuda/conv2d/sm90a/turn.cuh"
#include "cuda/ptx/sm90a.cuh"
#include "cuda/runtime/launch.cuh"
#include "planted.h"

namespace fastconv::cuda {
namespace {

enum Bug {
  kNone,
  // ---- are right, too
  kDrainsTheRing,  // blocks wait for the last arrivals at their barriers instead of for each other
  kExpectsLate,    // bytes that may have come
  // ---- are not
  kEmptyCountsOwnReaders,
  kReleasesOwnStage,
  kCountsAndReleasesOwn,
  kReleasesOthersStage,
  kRankOutside,
  kBlockBarrierAfterInit,
  kOneBlockSkipsTheBarrier,
  kOneBlockWaitsAgain,
  kNotInitialisedInOneBlock,
  kNoBarrierAtTheEnd,
  kOneBlockEndsAtOnce,
  kBarrierInHalfAWarp,
  kExpectsOwnPart,
  kExpectsTooMany,
  kMaskWithoutOthers,
  kMaskOutside,
  kMaskOfNobody,
  kAllBringOnePart,
  kNeverWaitsForEmpty,
  kMulticastsBeforeWaiting,
  kReleasesEarly,
  kWaitsForOwnReaders,
  kBugs,
};

// ---- c[m, n] = sum of a[m, k] b[n, k] over k: tiles of 64 x 64, those of a cluster below each other. Each block
// brings its rows of A, and its part of B for all of them. A warpgroup loads, one multiplies.

struct GemmParams {
  TensorMap a, b;
  Half* c;
  int m, n, steps;
  int tiles_n, tiles;  // of a cluster
};

constexpr int kTile = 64, kStages = 3, kWarpgroup = 128, kThreads = 2 * kWarpgroup;
constexpr uint32_t kOperandBytes = kTile * 128, kStageBytes = 2 * kOperandBytes;
constexpr uint32_t kBarriers = kStages * kStageBytes;
constexpr int kSharedBytes = 1024 + kBarriers + 8 * 2 * kStages;

using Turn = sm90a::Turn<kStages>;

struct Shared {
  uint32_t base;
  FASTCONV_DEVICE Shared() : base((ptx::smem_address(dynamic_smem<unsigned char>()) + 1023) & ~1023u) {}
  uint32_t stage(int stage) const { return base + stage * kStageBytes; }
  uint32_t full(int stage) const { return base + kBarriers + 8 * stage; }
  uint32_t empty(int stage) const { return full(kStages + stage); }
};

template <int kBug, int kCluster>
FASTCONV_DEVICE void produce(const GemmParams& p, const Shared& shared, int rank) {
  constexpr int kPart = kTile / kCluster;
  constexpr uint32_t kExpected =
      (kBug == kExpectsOwnPart ? kOperandBytes + kPart * 128 : kStageBytes) + (kBug == kExpectsTooMany ? 128 : 0);
  const auto mask = static_cast<uint16_t>(kBug == kMaskWithoutOthers ? 1 << rank
                                          : kBug == kMaskOutside     ? (1 << kCluster) | 1
                                          : kBug == kMaskOfNobody    ? 0
                                                                     : (1 << kCluster) - 1);
  const int part = kBug == kAllBringOnePart ? 0 : rank;
  Turn turn;
  for (int tile = blockIdx.x / kCluster; tile < p.tiles; tile += gridDim.x / kCluster) {
    const int m0 = (tile / p.tiles_n * kCluster + rank) * kTile, n0 = tile % p.tiles_n * kTile;
    for (int step = 0; step < p.steps; ++step) {
      const uint32_t stage = shared.stage(turn.stage), full = shared.full(turn.stage);
      const auto multicast = [&] {
        ptx::tma_multicast_2d(stage + kOperandBytes + part * kPart * 128, p.b, full, mask, step * kTile,
                              n0 + part * kPart);
      };
      if (kBug == kMulticastsBeforeWaiting) multicast();
      if (kBug != kNeverWaitsForEmpty) ptx::mbarrier_wait(shared.empty(turn.stage), turn.parity ^ 1);
      if (kBug == kExpectsLate) multicast();
      ptx::mbarrier_arrive_expect(full, kExpected);
      ptx::tma_load_2d(stage, p.a, full, step * kTile, m0);
      if (kBug != kMulticastsBeforeWaiting && kBug != kExpectsLate) multicast();
      turn.advance();
    }
  }
  for (int stage = 0; kBug == kDrainsTheRing && stage < kStages; ++stage) {
    ptx::mbarrier_wait(shared.empty(turn.stage), turn.parity ^ 1);
    turn.advance();
  }
}

template <int kBug, int kCluster>
FASTCONV_DEVICE void multiply(const GemmParams& p, const Shared& shared, int rank) {
  const int thread = threadIdx.x % kWarpgroup, lane = thread % 32;
  const auto release = [&](int stage) {
    if (lane >= kCluster) return;
    const int to = kBug == kRankOutside           ? lane + 1
                   : kBug == kReleasesOthersStage ? (lane == rank ? (rank + 1) % kCluster : lane)
                                                  : lane;
    const bool own = kBug == kReleasesOwnStage || kBug == kCountsAndReleasesOwn || kBug == kWaitsForOwnReaders;
    if (own && to != rank) return;
    for (int times = 0; times < (kBug == kWaitsForOwnReaders ? kCluster : 1); ++times) {
      ptx::mbarrier_arrive_at(shared.empty(stage), to);
    }
  };
  Turn turn;
  for (int tile = blockIdx.x / kCluster; tile < p.tiles; tile += gridDim.x / kCluster) {
    float sums[kTile / 2];
    for (int step = 0; step < p.steps; ++step) {
      ptx::mbarrier_wait(shared.full(turn.stage), turn.parity);
      const uint64_t a = ptx::wgmma_operand<ptx::Major::kDepth>(shared.stage(turn.stage));
      ptx::wgmma_fence();
      for (int i = 0; i < kTile / 16; ++i) {
        ptx::wgmma<Half, ptx::Major::kDepth, ptx::Major::kDepth>(sums, a + i * 2, a + kOperandBytes / 16 + i * 2,
                                                                 step > 0 || i > 0);
      }
      ptx::wgmma_commit();
      if (kBug == kReleasesEarly) release(turn.stage);
      ptx::wgmma_wait<0>();
      if (kBug != kReleasesEarly) release(turn.stage);
      turn.advance();
    }
    ptx::wgmma_sums(sums);
    const int row = (tile / p.tiles_n * kCluster + rank) * kTile + 16 * (thread / 32) + lane / 4;
    const int column = tile % p.tiles_n * kTile + lane % 4 * 2;
    for (int i = 0; i < kTile / 2; ++i) {
      const int m = row + 8 * (i / 2 % 2), n = column + 8 * (i / 4) + i % 2;
      if (m < p.m && n < p.n) p.c[m * p.n + n] = from_float<Half>(sums[i]);
    }
  }
}

template <int kBug, int kCluster>
FASTCONV_KERNEL(kThreads, 1)
gemm(const __grid_constant__ GemmParams p) {
  const Shared shared;
  const int thread = threadIdx.x, rank = static_cast<int>(ptx::cluster_rank());
  if (thread == 0 && (kBug != kNotInitialisedInOneBlock || rank == 0)) {
    constexpr bool kOwn = kBug == kEmptyCountsOwnReaders || kBug == kCountsAndReleasesOwn;
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(shared.full(stage), 1);
      ptx::mbarrier_init(shared.empty(stage), kWarpgroup / 32 * (kOwn ? 1 : kCluster));
    }
    ptx::mbarrier_init_fence();
  }
  if (kBug == kBlockBarrierAfterInit || (kBug == kOneBlockSkipsTheBarrier && rank == 0)) {
    __syncthreads();
  } else {
    ptx::cluster_sync();
  }
  if (kBug == kOneBlockWaitsAgain && rank == 0) ptx::cluster_sync();
  if (kBug == kOneBlockEndsAtOnce && rank == 0) return;
  if (thread < kWarpgroup) {
    if (thread == 0) produce<kBug, kCluster>(p, shared, rank);
    return;
  }
  multiply<kBug, kCluster>(p, shared, rank);
  if (kBug == kBarrierInHalfAWarp && thread % 32 < 16) return;
  if (kBug != kNoBarrierAtTheEnd && kBug != kDrainsTheRing) ptx::cluster_sync();
}

// ---- running it

TensorMap matrix(const void* data, int64_t inner, int64_t outer, int box) {
  TiledMap map;
  map.data = data;
  map.size[0] = inner;
  map.size[1] = outer;
  map.stride[0] = inner;
  map.box[0] = box;
  return tiled_map(map);
}

template <int kBug, int kCluster>
void run(unsigned grid, const GemmParams& p) {
  static const KernelInfo info{"gemm_cluster", "bugs_cluster", {90, true}, {kTile, kTile, kTile}, kStages,
                               kThreads,       kSharedBytes,   "",         uses::kNothing};
  launch(info, &gemm<kBug, kCluster>, {{grid}, {kThreads}, kSharedBytes, kCluster}, nullptr, p);
}

template <int... kBug>
void dispatch(int bug, unsigned grid, const GemmParams& p, std::integer_sequence<int, kBug...>) {
  ((bug == kBug ? run<kBug, 2>(grid, p) : void()), ...);
}

}  // namespace
}  // namespace fastconv::cuda

using namespace fastconv::cuda;

// What the emulator says; "" when it has nothing to say. Clusters of other than 2 blocks have no bugs.
API const char* run_gemm(int bug, int cluster, unsigned grid, const void* a, const void* b, void* c, int m, int n,
                         int k) {
  return attempt([&] {
    GemmParams p{};
    p.a = matrix(a, k, m, kTile);
    p.b = matrix(b, k, n, kTile / cluster);
    p.c = static_cast<Half*>(c);
    p.m = m, p.n = n, p.steps = static_cast<int>(ceil_div(k, kTile));
    p.tiles_n = static_cast<int>(ceil_div(n, kTile));
    p.tiles = static_cast<int>(ceil_div(m, kTile * cluster)) * p.tiles_n;
    name("a", a, int64_t{m} * k * 2, false);
    name("b", b, int64_t{n} * k * 2, false);
    name("c", c, int64_t{m} * n * 2, true);
    if (cluster == 1) run<kNone, 1>(grid, p);
    if (cluster == 2) dispatch(bug, grid, p, std::make_integer_sequence<int, kBugs>());
    if (cluster == 4) run<kNone, 4>(grid, p);
    if (cluster == 8) run<kNone, 8>(grid, p);
  });
}
