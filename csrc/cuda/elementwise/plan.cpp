#include "cuda/elementwise/plan.h"

namespace fastconv::cuda {

const char* ElementwiseVariant::refusal(const ElementwiseParams& p, const DeviceInfo&) const {
  if (access == ElementwiseAccess::kStrided) return p.dims > 0 ? nullptr : "the tensors lie in memory alike";
  if (p.dims > 0) return "the tensors do not lie in memory alike";
  const bool aligned = is_aligned(p.input) && is_aligned(p.other) && is_aligned(p.output);
  return access == ElementwiseAccess::kElements || aligned ? nullptr : "the tensors are not aligned to 16 bytes";
}

ElementwiseCandidate ElementwiseVariant::candidate(const ElementwiseParams& p, const DeviceInfo&) const {
  const bool strided = access == ElementwiseAccess::kStrided;
  const int width = access == ElementwiseAccess::kVectors ? 16 / element_bytes(p.dtype) : 1;
  const int64_t each = int64_t{kElementwiseThreads} * (strided ? 1 : kElementwiseUnroll * width);
  ElementwiseCandidate found;
  found.cost.shape = {{static_cast<unsigned>(ceil_div(p.numel, each))}, {kElementwiseThreads}};
  found.cost.rate = rate;
  found.cost.resident = 4;
  return found;
}

void launch_elementwise(Elementwise operation, const ElementwiseParams& params, const DeviceInfo& device,
                        Stream stream) {
  const auto [variant, candidate] = choose<ElementwiseVariant>(static_cast<int>(operation), params, device);
  variant->run(variant->info, candidate.cost.shape, params, stream);
}

}  // namespace fastconv::cuda
