// Whether the fused kernel of a depthwise-separable convolution runs, which one, and in what grid.
#pragma once

#include "cuda/depthwise_separable_conv2d/params.h"
#include "cuda/runtime/choice.h"

namespace fastconv::cuda {

struct SeparableCandidate {
  Cost cost;
  DepthwiseSeparableConv2dParams params;
};

struct SeparableVariant {
  static constexpr const char* kOps[] = {"depthwise_separable_conv2d_fprop"};
  using Candidate = SeparableCandidate;
  using Run = void (*)(const KernelInfo&, const LaunchShape&, const DepthwiseSeparableConv2dParams&, Stream);

  KernelInfo info;
  bool tf32;    // for float32 in TF32, else for 16-bit types
  int pixels;   // of a block
  int filter;   // width of the filters whose rows stay in registers, 0 for any
  double rate;  // see Cost
  Run run;

  const char* refusal(const DepthwiseSeparableConv2dParams& params, const DeviceInfo& device) const;
  Candidate candidate(const DepthwiseSeparableConv2dParams& params, const DeviceInfo& device) const;
};

struct SeparablePlan {
  const SeparableVariant* variant = nullptr;  // null where two kernels are better
  DepthwiseSeparableConv2dParams params;
  LaunchShape shape;
};

// Needs the sizes, the input and the pointwise weight. Throws when a kernel was forced that cannot run the call.
SeparablePlan plan_depthwise_separable_conv2d(const DepthwiseSeparableConv2dParams& params, const DeviceInfo& device);
// Needs the other pointers, and the output's strides, in the plan's parameters.
void launch_depthwise_separable_conv2d(SeparablePlan& plan, Stream stream);

}  // namespace fastconv::cuda
