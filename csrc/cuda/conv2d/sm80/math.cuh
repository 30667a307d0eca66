// The product of two tiles in shared memory, added to what a warp's threads hold in registers: on the tensor cores for
// 16-bit types and TF32, by fused multiply-adds for float32 as it is.
#pragma once

#include <type_traits>

#include "cuda/ptx/sm80.cuh"
#include "cuda/runtime/instructions.h"

namespace fastconv::cuda::inline sm80 {

// What a thread holds of a warp's part of C: with g = lane / 4 and t = lane % 4, element e of the 16x8 block (i, j) is
// row 16 i + g + 8 (e / 2), column 8 j + 2 t + e % 2.
template <int kBlocksA, int kBlocksB>
struct Accumulator {
  float v[kBlocksA][kBlocksB][4];
};

// 16-bit types on the tensor cores
template <class T>
struct HalfMath {
  static constexpr int kStep = 16;
  static constexpr Instructions kUses =
      uses::kSmemAddress | uses::kLdmatrix | (std::is_same_v<T, Half> ? uses::kMmaHalf : uses::kMmaBFloat16);
  template <class TileA, class TileB, int kA, int kB>
  FASTCONV_DEVICE static void step(Accumulator<kA, kB>& c, const unsigned char* a, const unsigned char* b, int first_a,
                                   int first_b, int depth) {
    static_assert(kB % 2 == 0);
    const int lane = threadIdx.x % 32;
    // ldmatrix takes the addresses of rows in memory: of the extent, or, transposed, of the depth.
    const int low = lane & 7, second = (lane >> 3 & 1) * 8, third = (lane >> 4) * 8;
    uint32_t fragments_b[kB][2];
#pragma unroll
    for (int j = 0; j < kB; j += 2) {
      uint32_t both[4];
      if constexpr (TileB::kDepthContiguous) {
        ptx::ldmatrix_x4(both, ptx::smem_address(b + TileB::offset(first_b + j * 8 + third + low, depth + second)));
      } else {
        ptx::ldmatrix_x4_trans(both,
                               ptx::smem_address(b + TileB::offset(first_b + j * 8 + third, depth + second + low)));
      }
      fragments_b[j][0] = both[0], fragments_b[j][1] = both[1];
      fragments_b[j + 1][0] = both[2], fragments_b[j + 1][1] = both[3];
    }
#pragma unroll
    for (int i = 0; i < kA; ++i) {
      uint32_t fragments_a[4];
      if constexpr (TileA::kDepthContiguous) {
        ptx::ldmatrix_x4(fragments_a,
                         ptx::smem_address(a + TileA::offset(first_a + i * 16 + second + low, depth + third)));
      } else {
        ptx::ldmatrix_x4_trans(fragments_a,
                               ptx::smem_address(a + TileA::offset(first_a + i * 16 + second, depth + third + low)));
      }
#pragma unroll
      for (int j = 0; j < kB; ++j) ptx::mma_m16n8k16<T>(c.v[i][j], fragments_a, fragments_b[j]);
    }
  }
};

FASTCONV_DEVICE float float_at(const unsigned char* tile, int offset) {
  return *reinterpret_cast<const float*>(tile + offset);
}

// float32 on the tensor cores
struct Tf32Math {
  static constexpr int kStep = 8;
  static constexpr Instructions kUses = uses::kToTf32 | uses::kMmaTf32;
  template <class TileA, class TileB, int kA, int kB>
  FASTCONV_DEVICE static void step(Accumulator<kA, kB>& c, const unsigned char* a, const unsigned char* b, int first_a,
                                   int first_b, int depth) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    uint32_t fragments_b[kB][2];
#pragma unroll
    for (int j = 0; j < kB; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        fragments_b[j][i] = ptx::to_tf32(float_at(b, TileB::offset(first_b + j * 8 + g, depth + t + 4 * i)));
      }
    }
#pragma unroll
    for (int i = 0; i < kA; ++i) {
      uint32_t fragments_a[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = first_a + i * 16 + g + e % 2 * 8;
        fragments_a[e] = ptx::to_tf32(float_at(a, TileA::offset(row, depth + t + e / 2 * 4)));
      }
#pragma unroll
      for (int j = 0; j < kB; ++j) ptx::mma_m16n8k8_tf32(c.v[i][j], fragments_a, fragments_b[j]);
    }
  }
};

// float32 as it is
struct FloatMath {
  static constexpr int kStep = 1;
  static constexpr Instructions kUses = uses::kNothing;
  template <class TileA, class TileB, int kA, int kB>
  FASTCONV_DEVICE static void step(Accumulator<kA, kB>& c, const unsigned char* a, const unsigned char* b, int first_a,
                                   int first_b, int depth) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    float rows[kA][2], columns[kB][2];
#pragma unroll
    for (int i = 0; i < kA; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) rows[i][e] = float_at(a, TileA::offset(first_a + i * 16 + g + e * 8, depth));
    }
#pragma unroll
    for (int j = 0; j < kB; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) columns[j][e] = float_at(b, TileB::offset(first_b + j * 8 + 2 * t + e, depth));
    }
#pragma unroll
    for (int i = 0; i < kA; ++i) {
#pragma unroll
      for (int j = 0; j < kB; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) c.v[i][j][e] = fmaf(rows[i][e / 2], columns[j][e % 2], c.v[i][j][e]);
      }
    }
  }
};

}  // namespace fastconv::cuda::inline sm80
