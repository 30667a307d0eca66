// From a convolution's arguments to its launches: which kernel, over what grid, with what parameters. Planned once; a
// launch only adds the workspace. Which kernel it is can be known before its operands are prepared.
#pragma once

#include <optional>
#include <vector>

#include "cuda/conv2d/boxes.h"
#include "cuda/conv2d/params.h"
#include "cuda/conv2d/stem.h"
#include "cuda/runtime/choice.h"

namespace fastconv::cuda {

struct ConvCandidate {
  Cost cost;
  // Over how many blocks the depth of each tile is split. The parts are added in a fixed order by a second kernel, so
  // the result does not depend on timing.
  int splits = 1;
};

// One GEMM of a plan
struct ConvLaunch {
  ConvParams params;
  std::optional<BoxParams> boxes;  // for kernels that use them
  std::optional<StemParams> stem;
  LaunchShape shape, reduction;
  bool in_parts;  // whether the reduction follows, also where there is one part
};

// A kernel for one pass and type.
struct ConvVariant {
  static constexpr const char* kOps[] = {"conv2d_fprop", "conv2d_dgrad", "conv2d_wgrad"};
  using Candidate = ConvCandidate;
  using Run = void (*)(const KernelInfo&, const ConvLaunch&, Stream);

  KernelInfo info;
  Pass pass;
  DType dtype;
  bool tf32;
  int vector;    // elements that are read at once
  int resident;  // see Cost
  double rate;   // see Cost
  Run run;
  bool boxes = false;  // whether the TMA brings boxes, and blocks do one tile after the other
  int cluster = 1;     // blocks of a cluster
  bool halo = false;   // whether a pixel's box comes once for all positions, and blocks do tiles that follow each other
  StemTiles stem{};    // of the kernels that read a photograph as it lies

  bool reads_photographs() const { return stem.stride > 0; }
  const char* refusal(const ConvParams& params, const DeviceInfo& device) const;
  Candidate candidate(const ConvParams& params, const DeviceInfo& device) const;
};

// Adds the parts of a split depth, for all kernels of a pass and type.
struct ConvReduction {
  Pass pass;
  DType dtype;
  KernelInfo info;
  ConvVariant::Run run;
};
void register_reduction(const ConvReduction& reduction);

// Whether so many channels of each pixel can be moved by `vector` elements of so many bytes at once.
bool has_vectors(const void* data, const Strides& strides, int64_t channels, int vector, int element);

struct ConvPlan {
  const ConvVariant* variant = nullptr;
  const ConvReduction* reduction = nullptr;
  std::vector<ConvLaunch> launches;  // in dgrad one for each phase
  int64_t workspace = 0;             // float32 elements
};

// A kernel for the GEMMs of a call. Operands that were prepared since must be told.
struct ConvChoice {
  const ConvVariant* variant = nullptr;
  ConvCandidate candidate;
  std::vector<ConvParams> gemms;  // in dgrad one for each phase

  void prepared(const ConvArguments& arguments);
};

// Extents are below 2^31 - kSpareExtent, those of the GEMM included; the glue checks that. Throws when the kernel that
// was forced upon the pass does not take these tensors. Of pointers only whether they are null and aligned is asked.
ConvChoice choose_conv2d(Pass pass, const ConvArguments& arguments, const DeviceInfo& device);
ConvPlan plan_conv2d(const ConvChoice& choice, const DeviceInfo& device);
void launch_conv2d(ConvPlan& plan, float* workspace, Stream stream);

}  // namespace fastconv::cuda
