// What the kernels of conv2d take: an implicit GEMM for the forward (fprop) and the gradients of its input (dgrad) and
// its weight (wgrad), of several convolutions of one input at once (branches), which must then be 1x1.
#pragma once

#include "cuda/runtime/launcher.h"

namespace fastconv::cuda {

constexpr int kMaxBranches = 8;

struct ConvBranch {
  int k = 0;                       // filters, a multiple of the groups
  const void* weight = nullptr;    // [k, r, s, c / groups], dense; in fprop and dgrad
  const void* bias = nullptr;      // [k] or null; in fprop
  const void* residual = nullptr;  // with the strides y, or null; in fprop
  // The result, with the strides y. In dgrad and wgrad it is read for the activation's mask, and may be null without.
  void* output = nullptr;
  const void* grad_output = nullptr;  // with the strides y; in dgrad and wgrad
  void* grad_weight = nullptr;        // like the weight; in wgrad
  void* grad_bias = nullptr;          // [k] or null; in wgrad
  Strides y{};
};

struct ConvArguments {
  DType dtype = DType::kFloat32;
  bool tf32 = false;  // float32 on the tensor cores, 10 bits of mantissa
  Activation activation = Activation::kNone;
  int n = 0, c = 0, h = 0, w = 0;  // input
  int p = 0, q = 0;                // pixels of the output
  int r = 1, s = 1;                // filter
  int stride_h = 1, stride_w = 1, pad_h = 0, pad_w = 0, dilation_h = 1, dilation_w = 1;
  int groups = 1;
  const void* input = nullptr;  // in fprop and wgrad
  void* grad_input = nullptr;   // in dgrad
  Strides x{};                  // of input and grad_input
  int branches = 1;
  ConvBranch branch[kMaxBranches];
};

// Divides by a constant without a division (`quotient` and `divide` in sm80/sources.cuh).
// Source: Granlund and Montgomery 1994, "Division by Invariant Integers using Multiplication".
struct Divider {
  uint32_t divisor = 1, factor = 1, shift = 0;
  Divider() = default;
  explicit Divider(uint32_t d) : divisor(d) {
    while ((uint64_t{1} << shift) < d) ++shift;
    factor = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d)) / d + 1);
  }
};

// One phase of dgrad along one axis: with a stride, only every stride-th input pixel meets the same filter positions. A
// GEMM for each phase has no zeros to multiply with. Without a stride there is one phase, which is everything.
struct Phase {
  int first_pixel, step_pixel, pixels;           // of the input
  int first_position, step_position, positions;  // in the filter
};

// The one parameter of the kernels: the arguments and, made from them by plan.cpp, the GEMM's extents and the constants
// of its index arithmetic.
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
