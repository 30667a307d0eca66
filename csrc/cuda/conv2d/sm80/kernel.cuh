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
//   sources.cuh      where an element of A or B lies in the tensors, or that it is padding
//   tiles.cuh        tiles of A and B in shared memory, and their loaders
//   math.cuh         ldmatrix and mma.sync (16-bit types, TF32) or fused multiply-adds (float32)
//   epilogue.cuh     bias, residual and activation; the result's place
//
// Here they become the kernel: tiles pass through a ring of stages in shared memory, are multiplied, and the sums leave
// through shared memory so that a pixel's channels are written side by side. Instantiated in instances.cu, chosen among
// in ../plan.cpp.
#pragma once

#include "cuda/conv2d/sm80/epilogue.cuh"
#include "cuda/conv2d/sm80/math.cuh"
#include "cuda/conv2d/sm80/sources.cuh"
#include "cuda/conv2d/sm80/tiles.cuh"
#include "cuda/runtime/launch.cuh"

namespace fastconv::cuda::inline sm80 {

// Which tile of which GEMM a block computes
struct Place {
  int group, split, branch;
  int a, b;            // first row and column within the branch
  int end_a, end_b;    // of the branch
  int base_a, base_b;  // of the branch among all
};

template <class T_, class Math_, int kTileA_, int kTileB_, int kWarpsA_, int kWarpsB_, int kStages_, int kVector_>
struct ConvConfig {
  using T = T_;
  using Math = Math_;
  static constexpr int kTileA = kTileA_, kTileB = kTileB_, kWarpsA = kWarpsA_, kWarpsB = kWarpsB_, kStages = kStages_;
  static constexpr int kVector = kVector_;
  static constexpr int kTileDepth = 64 / sizeof(T);
  static constexpr int kThreads = kWarpsA * kWarpsB * 32;
  static constexpr int kWarpA = kTileA / kWarpsA, kWarpB = kTileB / kWarpsB;
  static constexpr int kStageBytes = (kTileA + kTileB) * 64;
  static constexpr int kSlabRow = kWarpB + 4;  // floats; not a multiple of 32, for the banks
  static constexpr int kSlabBytes = kThreads / 32 * 16 * kSlabRow * 4;
  static constexpr int kSharedBytes = kStages * kStageBytes > kSlabBytes ? kStages * kStageBytes : kSlabBytes;
};

// The sources of a pass, and which dimension of their tiles is contiguous
template <Pass kPass, class T>
struct Operands;
template <class T>
struct Operands<Pass::kFprop, T> {
  using A = PixelsByTaps<T>;
  using B = FiltersByTaps<T>;
  static constexpr bool kDepthContiguousA = true, kDepthContiguousB = true;
  FASTCONV_DEVICE static A a(const ConvParams& p, const Place& at) { return A(p, at.group); }
  FASTCONV_DEVICE static B b(const ConvParams& p, const Place& at) { return B(p, at.group, at.branch); }
};
template <class T>
struct Operands<Pass::kDgrad, T> {
  using A = InputPixelsByFilters<T>;
  using B = ChannelsByFilters<T>;
  static constexpr bool kDepthContiguousA = true, kDepthContiguousB = false;
  FASTCONV_DEVICE static A a(const ConvParams& p, const Place& at) { return A(p, at.group); }
  FASTCONV_DEVICE static B b(const ConvParams& p, const Place& at) { return B(p, at.group); }
};
template <class T>
struct Operands<Pass::kWgrad, T> {
  using A = FiltersByPixels<T>;
  using B = TapsByPixels<T>;
  static constexpr bool kDepthContiguousA = false, kDepthContiguousB = false;
  FASTCONV_DEVICE static A a(const ConvParams& p, const Place& at) { return A(p, at.group, at.branch); }
  FASTCONV_DEVICE static B b(const ConvParams& p, const Place& at) { return B(p, at.group); }
};

// Tiles along b are neighbours in the grid: they share A, which is the larger operand, in the L2 cache.
template <Pass kPass, class C>
FASTCONV_DEVICE Place place(const ConvParams& p) {
  Place at{};
  int tile_b;
  int tile_a = divide(p.by_tiles_b, static_cast<int>(blockIdx.x), tile_b);
  at.group = divide(p.by_splits, static_cast<int>(blockIdx.z), at.split);
  at.end_a = p.extent_a, at.end_b = p.extent_b;
  if constexpr (kPass != Pass::kDgrad) {
    int& tile = kPass == Pass::kFprop ? tile_b : tile_a;
    while (tile >= p.tile_begin[at.branch + 1]) ++at.branch;
    tile -= p.tile_begin[at.branch];
    (kPass == Pass::kFprop ? at.base_b : at.base_a) = p.begin[at.branch];
    (kPass == Pass::kFprop ? at.end_b : at.end_a) = p.k_group[at.branch];
  }
  at.a = tile_a * C::kTileA, at.b = tile_b * C::kTileB;
  return at;
}

// --------------------------------------------------------------------------------------------------- kernels

// Whether its tiles come by asynchronous copies, which take no less than 4 bytes
template <class C>
constexpr bool conv2d_copies = C::kVector * sizeof(typename C::T) >= 4;

template <Pass kPass, class C, bool kMasked>
FASTCONV_KERNEL(C::kThreads, 1)
conv2d_kernel(const __grid_constant__ ConvParams p) {
  using T = typename C::T;
  using Ops = Operands<kPass, T>;
  using TileA = Tile<T, C::kTileA, C::kTileDepth, Ops::kDepthContiguousA>;
  using TileB = Tile<T, C::kTileB, C::kTileDepth, Ops::kDepthContiguousB>;
  constexpr bool kAsync = conv2d_copies<C>;
  using LoaderA = Loader<T, typename Ops::A, TileA, C::kVector, C::kThreads, kMasked || !kAsync, kMasked>;
  using LoaderB = Loader<T, typename Ops::B, TileB, C::kVector, C::kThreads, !kAsync, false>;
  constexpr int kBlocksA = C::kWarpA / 16, kBlocksB = C::kWarpB / 8;

  unsigned char* const shared = dynamic_smem<unsigned char>();
  const Place at = place<kPass, C>(p);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_a = warp / C::kWarpsB * C::kWarpA, warp_b = warp % C::kWarpsB * C::kWarpB;
  const bool has_mask = p.arg.activation != Activation::kNone;
  LoaderA a(Ops::a(p, at), at.a, p.arg.activation, has_mask);
  LoaderB b(Ops::b(p, at), at.b, p.arg.activation, false);

  const int first_depth = at.split * p.split_depth;
  const int depth = min(p.depth - first_depth, p.split_depth);
  const int tiles = (depth + C::kTileDepth - 1) / C::kTileDepth;
  const auto stage = [&](int tile) { return shared + tile % C::kStages * C::kStageBytes; };
  const auto fetch = [&](int tile) {
    a.fetch(stage(tile), first_depth + tile * C::kTileDepth);
    b.fetch(stage(tile) + TileA::kBytes, first_depth + tile * C::kTileDepth);
  };
  const auto put = [&](int tile) {
    a.put(stage(tile));
    b.put(stage(tile) + TileA::kBytes);
  };

#pragma unroll
  for (int tile = 0; tile < C::kStages - 1; ++tile) {
    if (tile < tiles) {
      fetch(tile);
      put(tile);
    }
    ptx::cp_async_commit();
  }
  Accumulator<kBlocksA, kBlocksB> c{};
  [[maybe_unused]] float bias_sum = 0.0f, bias_lost = 0.0f;
  for (int tile = 0; tile < tiles; ++tile) {
    ptx::cp_async_wait<C::kStages - 2>();
    __syncthreads();  // this tile is complete, and everyone is done with the one whose stage comes next
    const int next = tile + C::kStages - 1;
    if (next < tiles) fetch(next);
    ptx::cp_async_commit();
    const unsigned char* const tile_a = stage(tile);
#pragma unroll
    for (int d = 0; d < C::kTileDepth; d += C::Math::kStep) {
      C::Math::template step<TileA, TileB>(c, tile_a, tile_a + TileA::kBytes, warp_a, warp_b, d);
    }
    if constexpr (kPass == Pass::kWgrad) {
      // The tile holds the masked gradient, whose sum is that of the bias; one column of blocks adds it up, with
      // Kahan's compensation, since there may be a million pixels.
      if (at.b == 0 && threadIdx.x < C::kTileA && p.arg.branch[at.branch].grad_bias) {
        float sum = 0.0f;
#pragma unroll
        for (int d = 0; d < C::kTileDepth; ++d) {
          sum += to_float(*reinterpret_cast<const T*>(tile_a + TileA::offset(threadIdx.x, d)));
        }
        const float corrected = sum - bias_lost, total = bias_sum + corrected;
        bias_lost = (total - bias_sum) - corrected;
        bias_sum = total;
      }
    }
    if (next < tiles) put(next);
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // the stages become slabs

  if constexpr (kPass == Pass::kWgrad) {
    const int filter = at.a + static_cast<int>(threadIdx.x);
    T* grad_bias = static_cast<T*>(p.arg.branch[at.branch].grad_bias);
    if (at.b == 0 && threadIdx.x < C::kTileA && grad_bias && filter < at.end_a) {
      if (p.splits > 1) {
        *bias_part(p, at.split, at.group, at.base_a + filter) = bias_sum;
      } else {
        grad_bias[at.group * p.k_group[at.branch] + filter] = from_float<T>(bias_sum);
      }
    }
  }

  // Each warp turns its part, 16 rows at a time, such that a lane gets neighbours of one row.
  constexpr int kRun = 16 / sizeof(T), kRuns = C::kWarpB / kRun;
  float* const slab = reinterpret_cast<float*>(shared) + warp * 16 * C::kSlabRow;
#pragma unroll
  for (int i = 0; i < kBlocksA; ++i) {
#pragma unroll
    for (int j = 0; j < kBlocksB; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        slab[(lane / 4 + e / 2 * 8) * C::kSlabRow + j * 8 + lane % 4 * 2 + e % 2] = c.v[i][j][e];
      }
    }
    __syncwarp();
    for (int run = lane; run < 16 * kRuns; run += 32) {
      const int row = run / kRuns, column = run % kRuns * kRun;
      const int index_a = at.a + warp_a + i * 16 + row, index_b = at.b + warp_b + column;
      if (index_a >= at.end_a || index_b >= at.end_b) continue;
      float sums[kRun];
#pragma unroll
      for (int v = 0; v < kRun; ++v) sums[v] = slab[row * C::kSlabRow + column + v];
      if (p.splits > 1) {
        float* const parts = part(p, at.split, at.group, at.base_a + index_a, at.base_b + index_b);
#pragma unroll
        for (int v = 0; v < kRun; ++v) {
          if (index_b + v < at.end_b) parts[v] = sums[v];
        }
      } else {
        const int64_t offset = row_offset<kPass>(p, p.arg.branch[at.branch], at.group, at.branch, index_a);
        finish<kPass, T>(p, at.group, at.branch, offset, index_b, at.end_b, sums);
      }
    }
    __syncwarp();
  }
}

// Adds the parts of a split depth in their order, a thread for each element of the results, then for each bias.
constexpr int kReduceThreads = 256;
template <Pass kPass, class T>
FASTCONV_KERNEL(kReduceThreads, 1)
conv2d_reduce_kernel(const __grid_constant__ ConvParams p) {
  const int64_t rows = int64_t{p.arg.groups} * p.extent_a, elements = rows * p.extent_b;
  const int64_t index = int64_t{blockIdx.x} * kReduceThreads + threadIdx.x;
  const bool is_bias = index >= elements;
  const int64_t row = is_bias ? index - elements : index / p.extent_b;
  if (row >= rows || (is_bias && kPass != Pass::kWgrad)) return;
  const int group = static_cast<int>(row / p.extent_a);
  int a = static_cast<int>(row % p.extent_a), b = is_bias ? 0 : static_cast<int>(index % p.extent_b);
  int branch = 0, end_b = p.extent_b;
  if constexpr (kPass != Pass::kDgrad) {
    const int shared = kPass == Pass::kFprop ? b : a;
    while (shared >= p.begin[branch + 1]) ++branch;
  }
  if (is_bias && p.arg.branch[branch].grad_bias == nullptr) return;
  float sum[1] = {0.0f};
  for (int split = 0; split < p.splits; ++split) {
    sum[0] += is_bias ? *bias_part(p, split, group, a) : *part(p, split, group, a, b);
  }
  if constexpr (kPass == Pass::kWgrad) a -= p.begin[branch];
  if constexpr (kPass == Pass::kFprop) b -= p.begin[branch], end_b = p.k_group[branch];
  if (is_bias) {
    T* grad_bias = static_cast<T*>(p.arg.branch[branch].grad_bias);
    grad_bias[group * p.k_group[branch] + a] = from_float<T>(sum[0]);
  } else {
    finish<kPass, T>(p, group, branch, row_offset<kPass>(p, p.arg.branch[branch], group, branch, a), b, end_b, sum);
  }
}

}  // namespace fastconv::cuda::inline sm80
