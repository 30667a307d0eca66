#include "cuda/conv2d_operands/plan.h"

#include <algorithm>

namespace fastconv::cuda {
namespace {

constexpr int kMostRows = 65535;            // of a grid
constexpr int kBlocksOfMultiprocessor = 4;  // of gradients

// Lanes of a block that lie side by side, each with so many channels
int lanes_of(const GradientParams& p, int width) {
  int widest = 0;
  for (int i = 0; i < p.branches; ++i) widest = std::max(widest, p.branch[i].padded);
  int lanes = 1;
  while (lanes < 32 && lanes * width < widest) lanes *= 2;
  return lanes;
}

}  // namespace

OperandCandidate PackVariant::candidate(const PackParams& p, const DeviceInfo&) const {
  const int vector = 16 / element_bytes(p.dtype), width = p.packed_c % vector == 0 ? vector : 4;
  OperandCandidate found;
  found.cost.shape = {{static_cast<unsigned>(ceil_div(p.pixels, kPackThreads)),
                       static_cast<unsigned>(std::min(p.packed_c / width, kMostRows))},
                      {kPackThreads}};
  return found;
}

const char* GradientVariant::refusal(const GradientParams& p, const DeviceInfo&) const {
  if (!vectors) return nullptr;
  const int width = 16 / element_bytes(p.dtype);
  const auto fits = [&](const void* data, const Strides& s) {
    return is_aligned(data) && s.n % width == 0 && s.h % width == 0 && s.w % width == 0;
  };
  if (p.channels % width != 0) return "the channels are not whole vectors of 16 bytes";
  for (int i = 0; i < p.branches; ++i) {
    const GradientBranch& branch = p.branch[i];
    if (branch.k % width != 0 || branch.first % width != 0) return "the channels are not whole vectors of 16 bytes";
    if (!fits(branch.grad, branch.y) || (p.activation != Activation::kNone && !fits(branch.output, branch.z))) {
      return "the tensors are not aligned to 16 bytes";
    }
  }
  return nullptr;
}

OperandCandidate GradientVariant::candidate(const GradientParams& p, const DeviceInfo& device) const {
  const int width = vectors ? 16 / element_bytes(p.dtype) : 1;
  const int lanes = lanes_of(p, width);
  int columns = 0;
  for (int i = 0; i < p.branches; ++i) {
    columns = std::max(columns, static_cast<int>(ceil_div(p.branch[i].padded, lanes * width)));
  }
  OperandCandidate found;
  found.cost.shape = {{static_cast<unsigned>(gradient_chunks(p, device)), static_cast<unsigned>(columns),
                       static_cast<unsigned>(p.branches)},
                      {static_cast<unsigned>(lanes), static_cast<unsigned>(kGradientThreads / lanes)},
                      int64_t{kGradientThreads} * width * static_cast<int64_t>(sizeof(float))};
  found.cost.rate = rate;
  found.cost.resident = 2;
  return found;
}

int gradient_chunks(const GradientParams& p, const DeviceInfo& device) {
  const int64_t least = int64_t{kGradientUnroll} * 32;  // pixels
  const int64_t most = int64_t{kBlocksOfMultiprocessor} * device.multiprocessors;
  return static_cast<int>(std::clamp<int64_t>(ceil_div(p.pixels, least), 1, most));
}

void launch_pack(const PackParams& params, const DeviceInfo& device, Stream stream) {
  const auto [variant, candidate] = choose<PackVariant>(0, params, device);
  variant->run(variant->info, candidate.cost.shape, params, stream);
}

void launch_gradient(GradientParams params, const DeviceInfo& device, Stream stream) {
  const auto [variant, candidate] = choose<GradientVariant>(0, params, device);
  params.chunks = gradient_chunks(params, device);
  params.chunk = static_cast<int>(ceil_div(params.pixels, params.chunks));
  variant->run(variant->info, candidate.cost.shape, params, stream);
  if (params.sums == nullptr) return;
  const LaunchShape shape{{static_cast<unsigned>(ceil_div(params.channels, kBiasX))},
                          {kBiasX, kBiasY},
                          kBiasX * kBiasY * static_cast<int64_t>(sizeof(float))};
  variant->sum(*variant->sum_info, shape, params, stream);
}

}  // namespace fastconv::cuda
