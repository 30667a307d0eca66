// Which kernel of a depthwise convolution runs, and in what grid.
#pragma once

#include "cuda/depthwise_conv2d/params.h"
#include "cuda/runtime/choice.h"

namespace fastconv::cuda {

struct DepthwiseCandidate {
  Cost cost;
  DepthwiseConv2dParams params;
};

struct DepthwiseVariant {
  static constexpr const char* kOps[] = {"depthwise_conv2d_fprop", "depthwise_conv2d_dgrad", "depthwise_conv2d_wgrad"};
  using Candidate = DepthwiseCandidate;
  // `sums` is how wgrad's second kernel, which adds up the chunks, is launched; empty for the other passes.
  using Run = void (*)(const KernelInfo&, const LaunchShape& shape, const LaunchShape& sums,
                       const DepthwiseConv2dParams&, Stream);

  KernelInfo info;
  Pass pass;
  Vectors vectors;
  int filter;   // height and width of the filters of a kernel for strips, 0 for any filter
  double rate;  // see Cost
  Run run;

  const char* refusal(const DepthwiseConv2dParams& params, const DeviceInfo& device) const;
  Candidate candidate(const DepthwiseConv2dParams& params, const DeviceInfo& device) const;
};

struct DepthwisePlan {
  const DepthwiseVariant* variant = nullptr;
  DepthwiseConv2dParams params;
  LaunchShape shape, sums;
  int64_t workspace = 0;  // elements of float32, or float64 for float64; wgrad
};

// Whether the kernels can run this: filters that fit into shared memory, less than 2^31 tiles of pixels
bool depthwise_conv2d_takes(const DepthwiseConv2dParams& params, const DeviceInfo& device);

// Needs all parameters but the workspace. Throws when the kernel that was forced upon the pass cannot run them.
DepthwisePlan plan_depthwise_conv2d(Pass pass, const DepthwiseConv2dParams& params, const DeviceInfo& device);
void launch_depthwise_conv2d(DepthwisePlan& plan, void* workspace, Stream stream);

}  // namespace fastconv::cuda
