// conv2d as an implicit GEMM: forward (fprop) and the gradients of its input (dgrad) and its weight (wgrad), for
// several convolutions of one input at once (branches), which must then be 1x1.
#pragma once

#include "cuda/launcher.h"

namespace fastconv::cuda {

constexpr int kMaxBranches = 8;

enum class Pass { kFprop, kDgrad, kWgrad };

// Elements between neighbours along each dimension of an image.
struct Strides {
  int64_t n, c, h, w;
};

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

// Which kernel, and over how many blocks the depth of each tile is split. The parts are added in a fixed order by a
// second kernel, so the result does not depend on timing.
struct ConvPlan {
  const KernelInfo* kernel = nullptr;
  int splits = 1;
  int64_t workspace = 0;  // float32 elements
};

// Extents are below 2^31, those of the GEMM included; the glue checks that. Throws when the kernel that was forced
// upon "conv2d_fprop", "conv2d_dgrad" or "conv2d_wgrad" does not take these tensors.
ConvPlan plan_conv2d(Pass pass, const ConvArguments& arguments, int multiprocessors);
void launch_conv2d(Pass pass, const ConvArguments& arguments, const ConvPlan& plan, float* workspace, Stream stream);

const std::vector<KernelInfo>& conv2d_kernels();

}  // namespace fastconv::cuda
