// The kernel of implicit GEMMs for sm_80. One GEMM, C[extent a, extent b] = sum over depth of A * B, serves the three
// passes:
//
//            extent a                 extent b                depth
//   fprop    output pixels            filters                 filter positions x channels
//   dgrad    input pixels of a phase  channels                filter positions of the phase x filters
//   wgrad    filters                  positions x channels    output pixels
//
// No matrix is ever built. The parts, in the order in which an element meets them:
//
//   ../params.h      the GEMM's extents and the constants of its index arithmetic
//   tiles.cuh        tiles of A and B in shared memory
//   sources.cuh      where an element of A or B lies in the tensors, or that it is padding; the loaders of tiles
//   math.cuh         ldmatrix and mma.sync (16-bit types, TF32) or fused multiply-adds (float32)
//   epilogue.cuh     bias, residual and activation; the result's place
//
// Here they become the kernel: tiles pass through a ring of stages in shared memory, are multiplied, and the sums leave
// through shared memory so that a pixel's channels are written side by side. The loop has no branch: copies beyond the
// depth are of zeros, to stages that nobody reads, so that a warp's loads, copies and products are one schedule.
// Instantiated in instances.cu, chosen among in ../plan.cpp.
#pragma once

#include <algorithm>
#include <bit>

#include "cuda/conv2d/sm80/epilogue.cuh"
#include "cuda/conv2d/sm80/math.cuh"
#include "cuda/conv2d/sm80/sources.cuh"
#include "cuda/conv2d/sm80/tiles.cuh"
#include "cuda/runtime/launch.cuh"

namespace fastconv::cuda::inline sm80 {

// Which tile of which GEMM a block computes
struct Place {
  int group, split;
  int a, b;  // first row and column
};

template <class T_, class Math_, int kTileA_, int kTileB_, int kWarpsA_, int kWarpsB_, int kStages_, int kVector_,
          int kBlocks_>
struct ConvConfig {
  using T = T_;
  using Math = Math_;
  static constexpr int kTileA = kTileA_, kTileB = kTileB_, kWarpsA = kWarpsA_, kWarpsB = kWarpsB_, kStages = kStages_;
  static constexpr int kVector = kVector_;
  static constexpr int kBlocks = kBlocks_;  // on a multiprocessor, that the registers allow
  static constexpr int kTileDepth = 64 / sizeof(T);
  static constexpr int kThreads = kWarpsA * kWarpsB * 32;
  static constexpr int kWarpA = kTileA / kWarpsA, kWarpB = kTileB / kWarpsB;
  // A lane for each 16 bytes of a row of results, and as many idle ones as a power of two asks for
  static constexpr int kLanesOfRow = std::bit_ceil(kWarpB * sizeof(T) / 16);
  static constexpr int kSlabRow = kWarpB + 8;  // floats; for the banks, see `Slab`
  static constexpr int kSlabBytes = kThreads / 32 * 16 * kSlabRow * 4;
};

// The operands of a pass; the tiles of those whose rows lie along the depth are contiguous there.
template <Pass kPass, class C>
struct Operands {
  using T = typename C::T;
  using TileA = Tile<T, C::kTileA, C::kTileDepth, kPass != Pass::kWgrad>;
  using TileB = Tile<T, C::kTileB, C::kTileDepth, kPass == Pass::kFprop>;
  template <template <class, class, int, int> class Source, class Tile>
  using Loader = Source<T, Tile, C::kVector, C::kThreads>;
  using A = std::conditional_t<kPass == Pass::kWgrad, Loader<GradientRows, TileA>, Loader<Pixels, TileA>>;
  using B = std::conditional_t<
      kPass == Pass::kFprop, Loader<Filters, TileB>,
      std::conditional_t<kPass == Pass::kDgrad, Loader<FilterRows, TileB>, Loader<PixelRows, TileB>>>;
  static constexpr int kStageBytes = TileA::kBytes + TileB::kBytes;
  static constexpr int kSharedBytes = std::max(C::kStages * kStageBytes, C::kSlabBytes);
};

// Tiles along b are neighbours in the grid: they share A, which is the larger operand, in the L2 cache.
template <class C>
FASTCONV_DEVICE Place place(const ConvParams& p) {
  Place at;
  int tile_b;
  const int tile_a = divide(p.by_tiles_b, static_cast<int>(blockIdx.x), tile_b);
  at.group = divide(p.by_splits, static_cast<int>(blockIdx.z), at.split);
  at.a = tile_a * C::kTileA, at.b = tile_b * C::kTileB;
  return at;
}

// --------------------------------------------------------------------------------------------------- kernels

// Where a warp turns 16 rows of its sums, such that a lane gets neighbours of one row. The row's padding keeps the
// banks of writes apart; those of reads, that pairs of chunks of 16 bytes are flipped, in every other eight and every
// other row.
template <class C>
struct Slab {
  float* const floats;

  FASTCONV_DEVICE explicit Slab(unsigned char* shared)
      : floats(reinterpret_cast<float*>(shared) + threadIdx.x / 32 * 16 * C::kSlabRow) {}
  FASTCONV_DEVICE float* at(int row, int column) const {
    return floats + row * C::kSlabRow + (column ^ ((column >> 5 ^ row) & 1) * 4);
  }
  template <int kRun>
  FASTCONV_DEVICE void load_run(int row, int column, float (&run)[kRun]) const {
#pragma unroll
    for (int v = 0; v < kRun; v += 4) {
      const Vec<float, 4> four = load<4>(at(row, column + v));
#pragma unroll
      for (int e = 0; e < 4; ++e) run[v + e] = four.v[e];
    }
  }
};

template <int kRun>
FASTCONV_DEVICE void store_run(float* to, const float (&run)[kRun]) {
#pragma unroll
  for (int v = 0; v < kRun; v += 4) store(to + v, Vec<float, 4>{run[v], run[v + 1], run[v + 2], run[v + 3]});
}

template <Pass kPass, class C>
FASTCONV_KERNEL(C::kThreads, C::kBlocks)
conv2d_kernel(const __grid_constant__ ConvParams p) {
  using T = typename C::T;
  using Math = typename C::Math;
  using Ops = Operands<kPass, C>;
  using TileA = typename Ops::TileA;
  using TileB = typename Ops::TileB;
  constexpr int kBlocksA = C::kWarpA / 16, kBlocksB = C::kWarpB / 8;
  constexpr int kSteps = C::kTileDepth / Math::kStep;
  static_assert(kSteps % 2 == 0);

  unsigned char* const shared = dynamic_smem<unsigned char>();
  const Place at = place<C>(p);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = lane_of_warp();
  const int warp_a = warp / C::kWarpsB * C::kWarpA, warp_b = warp % C::kWarpsB * C::kWarpB;

  int depth = at.split * p.split_depth;  // of the tile that is fetched next
  const int end = min(p.depth, depth + p.split_depth);
  // Where that is when all tiles are done, as it runs ahead by all stages but one
  const int last = depth + ((end - depth + C::kTileDepth - 1) / C::kTileDepth + C::kStages - 1) * C::kTileDepth;
  const typename Ops::A a(p, at.group, at.a, end);
  const typename Ops::B b(p, at.group, at.b, end);

  uint32_t filled = 0, read = 0;  // stages, in bytes
  const auto following = [](uint32_t stage) {
    return stage == (C::kStages - 1) * Ops::kStageBytes ? 0 : stage + Ops::kStageBytes;
  };
  const auto fetch = [&] {
    a.fetch(shared + filled, depth);
    b.fetch(shared + filled + TileA::kBytes, depth);
    ptx::cp_async_commit();
    filled = following(filled);
    depth += C::kTileDepth;
  };
  const LaneOffsets lanes = Math::template lane_offsets<TileA, TileB>(warp_a, warp_b);
  typename Math::template Fragments<kBlocksA, kBlocksB> fragments[2];
  const auto load_fragments = [&](int step) {
    Math::template load<TileA, TileB>(fragments[step % 2], shared, {lanes.a + read, lanes.b + read},
                                      step % kSteps * Math::kStep);
  };

#pragma unroll
  for (int tile = 0; tile < C::kStages - 1; ++tile) fetch();
  ptx::cp_async_wait<C::kStages - 2>();
  __syncthreads();
  load_fragments(0);
  Accumulator<kBlocksA, kBlocksB> c{};
#pragma unroll 1
  while (depth < last) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step == kSteps - 1) {
        ptx::cp_async_wait<C::kStages - 2>();
        __syncthreads();  // the next tile is complete, and everyone has loaded what there was to load of this one
        read = depth < last ? following(read) : read;
      }
      if (step == 0) fetch();
      load_fragments(step + 1);
      Math::multiply(c, fragments[step % 2]);
    }
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // the stages become slabs

  constexpr int kRun = Results<kPass, T>::kRun, kRowsAtOnce = 32 / C::kLanesOfRow, kTurns = 16 / kRowsAtOnce;
  const int run = lane % C::kLanesOfRow * kRun, first_row = lane / C::kLanesOfRow;
  const Results<kPass, T> results(p, at.group, run < C::kWarpB ? at.b + warp_b + run : p.extent_b);
  const auto row_of = [&](int block, int turn) { return at.a + warp_a + block * 16 + first_row + turn * kRowsAtOnce; };
  const bool is_part = p.splits > 1;
  typename Results<kPass, T>::Vector others[2][kTurns];
  const auto load_others = [&](int block) {
    if (is_part) return;
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) results.load_residual(row_of(block, turn), others[block % 2][turn]);
  };
  const Slab<C> slab(shared);
  load_others(0);
#pragma unroll
  for (int i = 0; i < kBlocksA; ++i) {
    if (i + 1 < kBlocksA) load_others(i + 1);
#pragma unroll
    for (int j = 0; j < kBlocksB; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Vec<float, 2> pair{c.v[i][j][2 * half], c.v[i][j][2 * half + 1]};
        store(slab.at(lane / 4 + half * 8, j * 8 + lane % 4 * 2), pair);
      }
    }
    __syncwarp();
    if (is_part && results.exists()) {
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) {
        float sums[kRun];
        slab.load_run(first_row + turn * kRowsAtOnce, run, sums);
        const int row = row_of(i, turn);
        if (row < p.extent_a) store_run(part(p, at.split, at.group, row, at.b + warp_b + run), sums);
      }
    } else if (results.is_whole()) {
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) {
        float sums[kRun];
        slab.load_run(first_row + turn * kRowsAtOnce, run, sums);
        const int row = row_of(i, turn);
        if (row < p.extent_a) results.finish(row, sums, others[i % 2][turn]);
      }
    } else if (results.exists()) {
#pragma unroll 1
      for (int turn = 0; turn < kTurns; ++turn) {
        float sums[kRun];
        slab.load_run(first_row + turn * kRowsAtOnce, run, sums);
        const int row = row_of(i, turn);
        if (row < p.extent_a) results.finish(row, sums);
      }
    }
    __syncwarp();
  }
}

template <int kRun>
FASTCONV_DEVICE void add_run(float (&sums)[kRun], const float* from) {
#pragma unroll
  for (int v = 0; v < kRun; v += 4) {
    const Vec<float, 4> four = load<4>(from + v);
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[v + e] += four.v[e];
  }
}

// Adds the parts of a split depth in their order: a thread for each run of results or, where there are many parts, one
// for each of some slices of them.
template <Pass kPass, class T>
FASTCONV_KERNEL(kReduceThreads, 4)
conv2d_reduce_kernel(const __grid_constant__ ConvParams p) {
  constexpr int kRun = Results<kPass, T>::kRun;
  const int thread = static_cast<int>(threadIdx.x), runs = kReduceThreads / p.reduce_slices, slice = thread / runs;
  int run, row;
  const int all_rows = divide(p.by_runs, static_cast<int>(blockIdx.x) * runs + thread % runs, run);
  const int group = divide(p.by_extent_a, all_rows, row);
  const Results<kPass, T> results(p, min(group, p.arg.groups - 1), run * kRun);
  const bool exists = group < p.arg.groups && results.exists();  // nothing is between two branches
  typename Results<kPass, T>::Vector others;
  if (exists) results.load_residual(row, others);
  float sums[kRun] = {};
  const int share = (p.splits + p.reduce_slices - 1) / p.reduce_slices;
  const int end = exists ? min(p.splits, (slice + 1) * share) : 0;
#pragma unroll 4
  for (int split = slice * share; split < end; ++split) add_run(sums, part(p, split, group, row, run * kRun));
  if (p.reduce_slices > 1) {
    float* const shared = dynamic_smem<float>() + thread % runs * kRun;
    store_run(shared + slice * runs * kRun, sums);
    __syncthreads();
    if (slice > 0) return;
    for (int other = 1; other < p.reduce_slices; ++other) add_run(sums, shared + other * runs * kRun);
  }
  if (!exists) return;
  if (results.is_whole()) {
    results.finish(row, sums, others);
  } else {
    results.finish(row, sums);
  }
}

}  // namespace fastconv::cuda::inline sm80
