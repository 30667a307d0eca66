// The product of two tiles in shared memory, added to what a warp's threads hold in registers: on the tensor cores for
// 16-bit types and TF32, by fused multiply-adds for float32 as it is.
//
// A kind of math has `Fragments`, what a lane holds of the operands for one step of the depth, `load`, which brings
// them from shared memory, and `multiply`. So the kernel loads those of the next step before it multiplies.
#pragma once

#include <type_traits>

#include "cuda/conv2d/sm80/tiles.cuh"
#include "cuda/runtime/instructions.h"

namespace fastconv::cuda::inline sm80 {

// What a thread holds of a warp's part of C: with g = lane / 4 and t = lane % 4, element e of the 16x8 block (i, j) is
// row 16 i + g + 8 (e / 2), column 8 j + 2 t + e % 2.
template <int kBlocksA, int kBlocksB>
struct Accumulator {
  float v[kBlocksA][kBlocksB][4];
};

FASTCONV_DEVICE int lane_of_warp() { return static_cast<int>(threadIdx.x) % 32; }

// The address that a lane gives to ldmatrix for the first 16 rows of A, or columns of B, of a warp: four matrices of
// 8x8 in the order in which the fragments of mma want them. A has the second one below the first, B beside it.
template <class Tile, bool kIsA>
FASTCONV_DEVICE int matrix_of_lane(int first) {
  const int low = lane_of_warp() & 7, second = lane_of_warp() >> 3 & 1, third = lane_of_warp() >> 4;
  const int extent = first + 8 * (kIsA ? second : third), depth = Tile::kChunk * (kIsA ? third : second);
  return Tile::kDepthContiguous ? Tile::offset(extent + low, depth) : Tile::offset(extent, depth + low);
}

// Where a lane's fragments begin in the tiles of a stage
struct LaneOffsets {
  uint32_t a, b;
};

// 16-bit types on the tensor cores
template <class T>
struct HalfMath {
  static constexpr int kStep = 16;
  static constexpr Instructions kUses =
      uses::kSmemAddress | uses::kLdmatrix | (std::is_same_v<T, Half> ? uses::kMmaHalf : uses::kMmaBFloat16);
  template <int kA, int kB>
  struct Fragments {
    uint32_t a[kA][4], b[kB / 2][4];
  };

  template <class TileA, class TileB>
  FASTCONV_DEVICE static LaneOffsets lane_offsets(int first_a, int first_b) {
    return {static_cast<uint32_t>(matrix_of_lane<TileA, true>(first_a)),
            static_cast<uint32_t>(TileA::kBytes + matrix_of_lane<TileB, false>(first_b))};
  }
  template <class TileA, class TileB, int kA, int kB>
  FASTCONV_DEVICE static void load(Fragments<kA, kB>& f, const unsigned char* shared, LaneOffsets at, int depth) {
    const uint32_t window = ptx::smem_address(shared);
#pragma unroll
    for (int i = 0; i < kA; ++i) matrices<TileA>(f.a[i], window + TileA::moved(at.a, 16 * i, depth));
#pragma unroll
    for (int j = 0; j < kB / 2; ++j) matrices<TileB>(f.b[j], window + TileB::moved(at.b, 16 * j, depth));
  }
  template <int kA, int kB>
  FASTCONV_DEVICE static void multiply(Accumulator<kA, kB>& c, const Fragments<kA, kB>& f) {
#pragma unroll
    for (int i = 0; i < kA; ++i) {
#pragma unroll
      for (int j = 0; j < kB; ++j) {
        const uint32_t b[2] = {f.b[j / 2][j % 2 * 2], f.b[j / 2][j % 2 * 2 + 1]};
        ptx::mma_m16n8k16<T>(c.v[i][j], f.a[i], b);
      }
    }
  }

 private:
  template <class Tile>
  FASTCONV_DEVICE static void matrices(uint32_t (&fragments)[4], uint32_t address) {
    if constexpr (Tile::kDepthContiguous) {
      ptx::ldmatrix_x4(fragments, address);
    } else {
      ptx::ldmatrix_x4_trans(fragments, address);
    }
  }
};

FASTCONV_DEVICE float float_at(const unsigned char* tile, uint32_t offset) {
  return *reinterpret_cast<const float*>(tile + offset);
}

// float32 on the tensor cores. ldmatrix moves four floats as it would eight halves; transposing, it would tear them
// apart, so where the extent is contiguous each lane loads its own.
struct Tf32Math {
  static constexpr int kStep = 8;
  static constexpr Instructions kUses = uses::kToTf32 | uses::kMmaTf32;
  template <int kA, int kB>
  struct Fragments {
    float a[kA][4], b[kB / 2][4];
  };

  template <class TileA, class TileB>
  FASTCONV_DEVICE static LaneOffsets lane_offsets(int first_a, int first_b) {
    return {static_cast<uint32_t>(lane_offset<TileA, true>(first_a)),
            static_cast<uint32_t>(TileA::kBytes + lane_offset<TileB, false>(first_b))};
  }
  template <class TileA, class TileB, int kA, int kB>
  FASTCONV_DEVICE static void load(Fragments<kA, kB>& f, const unsigned char* shared, LaneOffsets at, int depth) {
#pragma unroll
    for (int i = 0; i < kA; ++i) floats<TileA, true>(f.a[i], shared, at.a, 16 * i, depth);
#pragma unroll
    for (int j = 0; j < kB / 2; ++j) floats<TileB, false>(f.b[j], shared, at.b, 16 * j, depth);
  }
  template <int kA, int kB>
  FASTCONV_DEVICE static void multiply(Accumulator<kA, kB>& c, const Fragments<kA, kB>& f) {
    uint32_t b[kB][2];
#pragma unroll
    for (int j = 0; j < kB; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) b[j][e] = ptx::to_tf32(f.b[j / 2][j % 2 * 2 + e]);
    }
#pragma unroll
    for (int i = 0; i < kA; ++i) {
      uint32_t a[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) a[e] = ptx::to_tf32(f.a[i][e]);
#pragma unroll
      for (int j = 0; j < kB; ++j) ptx::mma_m16n8k8_tf32(c.v[i][j], a, b[j]);
    }
  }

 private:
  template <class Tile, bool kIsA>
  FASTCONV_DEVICE static int lane_offset(int first) {
    if constexpr (Tile::kDepthContiguous) return matrix_of_lane<Tile, kIsA>(first);
    return Tile::offset(first + lane_of_warp() / 4, lane_of_warp() % 4);
  }
  template <class Tile, bool kIsA>
  FASTCONV_DEVICE static void floats(float (&values)[4], const unsigned char* shared, uint32_t lane, int blocks,
                                     int depth) {
    if constexpr (Tile::kDepthContiguous) {
      uint32_t words[4];
      ptx::ldmatrix_x4(words, ptx::smem_address(shared) + Tile::moved(lane, blocks, depth));
#pragma unroll
      for (int e = 0; e < 4; ++e) values[e] = __uint_as_float(words[e]);
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int below = kIsA ? e % 2 : e / 2, deeper = kIsA ? e / 2 : e % 2;
        values[e] = float_at(shared, Tile::moved(lane, blocks + 8 * below, depth + 4 * deeper));
      }
    }
  }
};

// float32 as it is
struct FloatMath {
  static constexpr int kStep = 1;
  static constexpr Instructions kUses = uses::kNothing;
  template <int kA, int kB>
  struct Fragments {
    float rows[kA][2], columns[kB][2];
  };

  template <class TileA, class TileB>
  FASTCONV_DEVICE static LaneOffsets lane_offsets(int first_a, int first_b) {
    const int g = lane_of_warp() / 4, t = lane_of_warp() % 4;
    return {static_cast<uint32_t>(TileA::offset(first_a + g, 0)),
            static_cast<uint32_t>(TileA::kBytes + TileB::offset(first_b + 2 * t, 0))};
  }
  template <class TileA, class TileB, int kA, int kB>
  FASTCONV_DEVICE static void load(Fragments<kA, kB>& f, const unsigned char* shared, LaneOffsets at, int depth) {
    constexpr int kNeighbour = TileB::kDepthContiguous ? TileB::kRowBytes : 4;
#pragma unroll
    for (int i = 0; i < kA; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) f.rows[i][e] = float_at(shared, TileA::moved(at.a, 16 * i + 8 * e, depth));
    }
#pragma unroll
    for (int j = 0; j < kB; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) f.columns[j][e] = float_at(shared, TileB::moved(at.b, 8 * j, depth) + e * kNeighbour);
    }
  }
  template <int kA, int kB>
  FASTCONV_DEVICE static void multiply(Accumulator<kA, kB>& c, const Fragments<kA, kB>& f) {
#pragma unroll
    for (int i = 0; i < kA; ++i) {
#pragma unroll
      for (int j = 0; j < kB; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) c.v[i][j][e] = fmaf(f.rows[i][e / 2], f.columns[j][e % 2], c.v[i][j][e]);
      }
    }
  }
};

}  // namespace fastconv::cuda::inline sm80
