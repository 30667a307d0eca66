// What the kernels of conv2d take: an implicit GEMM for the forward (fprop) and the gradients of its input (dgrad) and
// its weight (wgrad), of several convolutions of one input at once (branches), which must then be 1x1.
#pragma once

#include "cuda/runtime/divider.h"
#include "cuda/runtime/launcher.h"

namespace fastconv::cuda {

constexpr int kMaxBranches = 8;

struct ConvBranch {
  int k = 0;                       // filters, a multiple of the groups
  const void* weight = nullptr;    // [k, r, s, c / groups], dense; in fprop and dgrad
  const void* bias = nullptr;      // [k] or null; in fprop
  const void* residual = nullptr;  // with the strides y, or null; in fprop
  void* output = nullptr;          // with the strides y; in fprop
  void* grad_weight = nullptr;     // like the weight; in wgrad
  Strides y{};
};

// An image of few channels and its weight as the caller has them, for kernels that need no packed ones: where those are
// chosen, what else points to the two is null.
struct Photograph {
  const void* input = nullptr;  // null where it is none
  Strides x{};
  int c = 0;
  const void* weight = nullptr;  // [k, c, r, s]
  Strides weight_strides{};
};

struct ConvArguments {
  DType dtype = DType::kFloat32;
  bool tf32 = false;                          // float32 on the tensor cores, 10 bits of mantissa
  Activation activation = Activation::kNone;  // in fprop
  int n = 0, c = 0, h = 0, w = 0;             // input
  int p = 0, q = 0;                           // pixels of the output
  int r = 1, s = 1;                           // filter
  int stride_h = 1, stride_w = 1, pad_h = 0, pad_w = 0, dilation_h = 1, dilation_w = 1;
  int groups = 1;
  const void* input = nullptr;  // in fprop and wgrad
  Photograph photograph;        // in fprop and wgrad, of one branch without a residual
  void* grad_input = nullptr;   // in dgrad
  Strides x{};                  // of input and grad_input
  // The gradient of all branches' results before the activation, side by side, in dgrad and wgrad; it may have more
  // channels, which are 0. In dgrad one branch stands for all.
  const void* grad_output = nullptr;
  int grad_channels = 0;
  Strides y{};  // of grad_output, whose channels lie side by side
  int branches = 1;
  ConvBranch branch[kMaxBranches];
};

// In fprop branches lie side by side from multiples of so many filters: what is written at once belongs to one of them.
constexpr int kBranchStep = 8;
constexpr int branch_width(int filters) { return static_cast<int>(ceil_div(filters, kBranchStep)) * kBranchStep; }

// How pixels of one side of a convolution and positions in the filter meet pixels of an image: pixel (i, j) and
// position (r, s) meet row i * step_h + r * tap_h + first_h, and likewise for columns.
struct Walk {
  const void* data;   // the first image's row first_h, column first_w, which may be padding
  int64_t n, h, w;    // strides in what a kernel reads at once, its vectors
  int64_t c, group;   // strides between channels and between groups, in elements
  int height, width;  // of the image
  int first_h, first_w, step_h, step_w, tap_h, tap_w;
  int64_t tap_row, tap_column;    // tap_h * h, tap_w * w
  Divider by_pixels, by_columns;  // of one image, of one row, on the other side
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
  const void* weights;                 // the one that lies first in memory; in fprop
  Walk walk;                           // over the input, in dgrad over the gradient of the output
  Strides gradient;                    // of grad_output, like the walk's; in wgrad
  Phase rows, columns;                 // of the pixels that are computed and the filter's positions; whole but in dgrad
  int c_group;                         // channels of a group
  int k_group;                         // filters of a group, gaps between branches and channels of 0 included
  int filters[kMaxBranches];           // of a group of each branch
  int first_filter[kMaxBranches + 1];  // of each branch among all of a group
  int extent_a, extent_b, depth;       // of the GEMM of a group
  int pitch_b;                         // of the workspace's rows
  int splits, split_depth;             // split_depth: a multiple of the tile's depth
  bool wide[kMaxBranches];             // whether the branch's results can be written by 16 bytes
  float* workspace;                    // [splits, groups, extent_a, pitch_b]
  Divider by_tiles_b, by_splits;
  Divider by_channels, by_s;     // of a position along the depth, along extent b of wgrad; positions of a row
  Divider by_runs, by_extent_a;  // of the reduction: 16 bytes of results in a row, rows of a group
  int reduce_slices;             // of the parts, each of which a thread of its own adds up
};

// Of the kernel that adds up the parts
constexpr int kReduceThreads = 128, kReduceSlices = 8;

// Kernels count by tiles and look ahead by stages: extents keep this far from the largest int.
constexpr int kSpareExtent = 1024;

}  // namespace fastconv::cuda
