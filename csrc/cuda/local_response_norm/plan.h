// Which kernel of local response normalisation runs, and in what grid.
#pragma once

#include "cuda/local_response_norm/params.h"
#include "cuda/runtime/choice.h"

namespace fastconv::cuda {

enum class LrnWalk {
  kLanes,   // channels side by side, size 5
  kRows,    // channels side by side
  kPlanes,  // channels that are some stride apart, size 5
  kWide,    // anything, an element to a thread
};

struct LrnCandidate {
  Cost cost;
  LocalResponseNormParams params;
};

struct LrnVariant {
  static constexpr const char* kOps[] = {"local_response_norm_fprop", "local_response_norm_dgrad"};
  using Candidate = LrnCandidate;
  using Run = void (*)(const KernelInfo&, const LaunchShape&, const LocalResponseNormParams&, Stream);

  KernelInfo info;
  bool backward;
  LrnWalk walk;
  int vector_bytes;  // of the neighbours that a thread reads at once, 0 for single elements
  double rate;       // see Cost
  Run run;

  const char* refusal(const LocalResponseNormParams& params, const DeviceInfo& device) const;
  Candidate candidate(const LocalResponseNormParams& params, const DeviceInfo& device) const;
};

struct LrnPlan {
  const LrnVariant* variant = nullptr;
  LocalResponseNormParams params;
  LaunchShape shape;
  int64_t workspace = 0;  // elements of float32, or float64 for float64
};

// Needs all parameters but the workspace. Throws when the kernel that was forced cannot run them.
LrnPlan plan_local_response_norm(bool backward, const LocalResponseNormParams& params, const DeviceInfo& device);
void launch_local_response_norm(LrnPlan& plan, void* workspace, Stream stream);

}  // namespace fastconv::cuda
