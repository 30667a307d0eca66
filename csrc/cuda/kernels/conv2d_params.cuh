// The one parameter of the kernels in conv2d.cuh: the convolution's arguments and, made from them on the host, the
// GEMM's extents and the constants of its index arithmetic.
#pragma once

#include "cuda/kernels/conv2d.h"
#include "cuda/types.cuh"

namespace fastconv::cuda {

// n / divisor for 0 <= n < 2^31, without a division.
// Source: Granlund and Montgomery 1994, "Division by Invariant Integers using Multiplication".
struct Divider {
  uint32_t divisor = 1, factor = 1, shift = 0;
  Divider() = default;
  explicit Divider(uint32_t d) : divisor(d) {
    while ((uint64_t{1} << shift) < d) ++shift;
    factor = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d)) / d + 1);
  }
  FASTCONV_DEVICE int quotient(int n) const {
    const auto high = static_cast<uint32_t>(static_cast<uint64_t>(n) * factor >> 32);
    return static_cast<int>((high + static_cast<uint32_t>(n)) >> shift);
  }
  FASTCONV_DEVICE int divide(int n, int& remainder) const {
    const int q = quotient(n);
    remainder = n - q * static_cast<int>(divisor);
    return q;
  }
};

// One phase of dgrad along one axis: with a stride, only every stride-th input pixel meets the same filter positions. A
// GEMM for each phase has no zeros to multiply with. Without a stride there is one phase, which is everything.
struct Phase {
  int first_pixel, step_pixel, pixels;           // of the input
  int first_position, step_position, positions;  // in the filter
};

struct ConvParams {
  ConvArguments arg;
  Phase rows, columns;                  // in dgrad
  int c_group;                          // channels of a group
  int k_group[kMaxBranches];            // filters of a group, in each branch
  int begin[kMaxBranches + 1];          // of each branch along the dimension that the branches share: filters of a
                                        // group in fprop and wgrad, depth in dgrad
  int tile_begin[kMaxBranches + 1];     // of each branch among the tiles along that dimension
  int extent_a, extent_b, depth;        // of the GEMM of a group, all branches together
  int tiles_b, splits, split_depth;     // split_depth: a multiple of the tile's depth
  bool wide[kMaxBranches];              // whether the branch's results can be written by 16 bytes
  float* workspace;                     // [splits, groups, extent_a, extent_b], then [splits, groups * extent_a]
  Divider by_tiles_b, by_q, by_pixels;  // of the output; by_pixels: p * q
  Divider by_columns, by_phase;         // of the input, in a phase
  Divider by_s, by_c, by_stride_h, by_stride_w;
  Divider by_k[kMaxBranches], by_splits;
};

}  // namespace fastconv::cuda
