// Which kernel of an elementwise operation runs, and in what grid.
#pragma once

#include "cuda/elementwise/params.h"
#include "cuda/runtime/choice.h"

namespace fastconv::cuda {

enum class ElementwiseAccess {
  kVectors,   // tensors that lie in memory alike, 16 bytes at once
  kElements,  // the same, element by element
  kStrided,   // strides of their own
};

struct ElementwiseCandidate {
  Cost cost;
};

struct ElementwiseVariant {
  static constexpr const char* kOps[] = {"add_relu_fprop", "activation_dgrad", "activation_fprop"};
  using Candidate = ElementwiseCandidate;
  using Run = void (*)(const KernelInfo&, const LaunchShape&, const ElementwiseParams&, Stream);

  KernelInfo info;
  ElementwiseAccess access;
  double rate;  // see Cost
  Run run;

  const char* refusal(const ElementwiseParams& params, const DeviceInfo& device) const;
  Candidate candidate(const ElementwiseParams& params, const DeviceInfo& device) const;
};

// Throws when the kernel that was forced upon the operation cannot run it.
void launch_elementwise(Elementwise operation, const ElementwiseParams& params, const DeviceInfo& device,
                        Stream stream);

}  // namespace fastconv::cuda
