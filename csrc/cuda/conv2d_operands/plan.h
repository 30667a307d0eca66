// Which kernel packs an image or prepares a gradient, and in what grid.
#pragma once

#include "cuda/conv2d_operands/params.h"
#include "cuda/runtime/choice.h"

namespace fastconv::cuda {

struct OperandCandidate {
  Cost cost;
};

struct PackVariant {
  static constexpr const char* kOps[] = {"conv2d_pack"};
  using Candidate = OperandCandidate;
  using Run = void (*)(const KernelInfo&, const LaunchShape&, const PackParams&, Stream);

  KernelInfo info;
  Run run;

  const char* refusal(const PackParams&, const DeviceInfo&) const { return nullptr; }
  Candidate candidate(const PackParams& params, const DeviceInfo& device) const;
};

struct GradientVariant {
  static constexpr const char* kOps[] = {"conv2d_gradient"};
  using Candidate = OperandCandidate;
  using Run = void (*)(const KernelInfo&, const LaunchShape&, const GradientParams&, Stream);

  KernelInfo info;
  bool vectors;  // of 16 bytes, else single elements
  double rate;   // see Cost
  Run run;
  const KernelInfo* sum_info;  // of the kernel that adds up the chunks
  Run sum;

  const char* refusal(const GradientParams& params, const DeviceInfo& device) const;
  Candidate candidate(const GradientParams& params, const DeviceInfo& device) const;
};

void launch_pack(const PackParams& params, const DeviceInfo& device, Stream stream);

// In how many chunks the pixels are summed up on this device: what `sums` must have room for.
int gradient_chunks(const GradientParams& params, const DeviceInfo& device);
// Sets what of the parameters follows from the others.
void launch_gradient(GradientParams params, const DeviceInfo& device, Stream stream);

}  // namespace fastconv::cuda
