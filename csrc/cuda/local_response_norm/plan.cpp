#include "cuda/local_response_norm/plan.h"

#include <algorithm>

namespace fastconv::cuda {
namespace {

using Params = LocalResponseNormParams;

constexpr int kThreads = kLrnThreads;
constexpr int kSharedGoal = 48 * 1024;  // for several blocks on a multiprocessor

// Rows: channels of a tile in vectors of `width`, and pixels of a block
Extent rows_block(const Params& p, int width) {
  const int64_t vectors = p.channels / width;
  const int64_t x = ceil_div(vectors, ceil_div(vectors, kThreads));
  return {static_cast<unsigned>(x), static_cast<unsigned>(kThreads / x)};
}

int64_t rows_shared_bytes(const Params& p, int width, bool backward) {
  const Extent block = rows_block(p, width);
  const int64_t tile = int64_t{block.x} * width, halo = int64_t{p.before} + p.after;
  const auto words = [](int64_t length) { return length + (length - 1) / 32; };
  const int64_t row = backward ? words(tile + 2 * halo) + words(tile + halo) : words(tile + halo);
  return row * block.y * (p.dtype == DType::kFloat64 ? 8 : 4);
}

int width_of(const LrnVariant& variant, const Params& p) {
  return variant.vector_bytes > 0 ? variant.vector_bytes / element_bytes(p.dtype) : 1;
}

}  // namespace

const char* LrnVariant::refusal(const Params& p, const DeviceInfo&) const {
  if (walk == LrnWalk::kWide) return nullptr;
  const int width = width_of(*this, p);
  const bool aligned = width == 1 || (is_aligned(p.input) && is_aligned(p.grad_output) && is_aligned(p.output));
  if (!aligned) return "the tensors are not aligned to 16 bytes";
  if (walk == LrnWalk::kRows) {
    if (p.inner != 1) return "the channels do not lie side by side";
    if (p.channels % width != 0) return "the channels are not whole vectors of 16 bytes";
    if (rows_shared_bytes(p, width, backward) > kSharedGoal) return "the window's halo does not fit into shared memory";
    return nullptr;
  }
  if (!has_known_window(p)) return "the window has another size";
  return p.inner % width == 0 ? nullptr : "the pixels are not whole vectors of 16 bytes";
}

LrnCandidate LrnVariant::candidate(const Params& p, const DeviceInfo& device) const {
  LrnCandidate found;
  found.cost.rate = rate;
  LaunchShape& shape = found.cost.shape;
  shape.block = {kThreads};
  if (walk == LrnWalk::kRows) {
    const int width = width_of(*this, p);
    shape.block = rows_block(p, width);
    shape.grid = {static_cast<unsigned>(ceil_div(p.outer, shape.block.y)),
                  static_cast<unsigned>(ceil_div(p.channels, int64_t{shape.block.x} * width))};
    shape.shared_bytes = rows_shared_bytes(p, width, backward);
    found.cost.resident = backward ? 3 : 4;
  } else if (walk == LrnWalk::kPlanes) {
    const int64_t blocks = ceil_div(p.outer * (p.inner / lrn_planes_width(backward, width_of(*this, p))), kThreads);
    // Cut along the channels until the blocks fill the device; a cut costs reading a halo.
    constexpr int kLeast = 16;
    const int64_t cuts =
        std::clamp<int64_t>(ceil_div(4 * device.multiprocessors, blocks), 1, ceil_div(p.channels, kLeast));
    found.channels_per_block = static_cast<int>(ceil_div(p.channels, cuts));
    shape.grid = {static_cast<unsigned>(blocks), static_cast<unsigned>(ceil_div(p.channels, found.channels_per_block))};
    found.cost.resident = 2;
    // Of pixels that lie alone, a thread would read one element in `channels`.
    if (p.inner == 1) found.cost.objection = "the channels lie side by side";
  } else {
    shape.grid = {static_cast<unsigned>(ceil_div(p.outer * p.channels * p.inner, kThreads))};
    found.cost.resident = 4;
  }
  return found;
}

LrnPlan plan_local_response_norm(bool backward, const Params& params, const DeviceInfo& device) {
  const auto [variant, candidate] = choose<LrnVariant>(backward, params, device);
  LrnPlan plan{variant, params, candidate.cost.shape, 0};
  plan.params.channels_per_block = candidate.channels_per_block;
  const bool wide = variant->walk == LrnWalk::kWide;
  if (wide && backward) plan.workspace = params.outer * params.channels * params.inner;
  return plan;
}

void launch_local_response_norm(LrnPlan& plan, void* workspace, Stream stream) {
  plan.params.workspace = workspace;
  plan.variant->run(plan.variant->info, plan.shape, plan.params, stream);
}

}  // namespace fastconv::cuda
