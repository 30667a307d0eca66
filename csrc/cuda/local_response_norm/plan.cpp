#include "cuda/local_response_norm/plan.h"

#include <algorithm>
#include <limits>

namespace fastconv::cuda {
namespace {

using Params = LocalResponseNormParams;

constexpr int kThreads = kLrnThreads;
constexpr int64_t kMostVectors = (int64_t{1} << 31) - 4096;  // so that a block's end is an int, too
constexpr int kSharedGoal = 48 * 1024;                       // for several blocks on a multiprocessor

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

// A warp takes whole pixels if they leave no more of its lanes idle than neighbours on both sides do.
struct WarpVectors {
  int count, first;
};
WarpVectors warp_vectors(int64_t row) {
  const auto whole = static_cast<int>(32 / row * row);
  return whole >= 30 ? WarpVectors{whole, 0} : WarpVectors{30, 1};
}

LrnPower power_of(const Params& p) {
  const auto& [scale, k, beta, slope] = p.coefficients;
  const bool roots = beta == 0.75;
  if (element_bytes(p.dtype) > 2) return roots ? LrnPower::kRoots : LrnPower::kAny;
  const bool positive = scale >= 0 && k >= std::numeric_limits<float>::min() && beta > 0;
  if (!positive) return LrnPower::kAny;
  return roots ? LrnPower::kRoots : LrnPower::kExp2;
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
  if (walk == LrnWalk::kLanes) {
    if (p.dtype == DType::kFloat64) return "float64 is not among its types";
    if (p.inner != 1) return "the channels do not lie side by side";
    if (p.channels % width != 0) return "the channels are not whole vectors of 16 bytes";
    return p.outer * (p.channels / width) <= kMostVectors ? nullptr : "there are too many vectors";
  }
  return p.inner % width == 0 ? nullptr : "the pixels are not whole vectors of 16 bytes";
}

LrnCandidate LrnVariant::candidate(const Params& given, const DeviceInfo& device) const {
  LrnCandidate found;
  found.params = given;
  Params& p = found.params;
  const auto& [scale, k, beta, slope] = p.coefficients;
  p.coefficients32 = {static_cast<float>(scale), static_cast<float>(k), static_cast<float>(beta),
                      static_cast<float>(slope)};
  p.power = power_of(p);
  found.cost.rate = rate;
  LaunchShape& shape = found.cost.shape;
  shape.block = {kThreads};
  if (walk == LrnWalk::kLanes) {
    const int row = p.channels / width_of(*this, p);
    p.vectors = static_cast<int>(p.outer * row);
    p.by_row = Divider(row);
    const auto [count, first] = warp_vectors(row);
    p.vectors_per_warp = count;
    p.first = first;
    shape.grid = {static_cast<unsigned>(ceil_div(p.vectors, count * (kThreads / 32)))};
    found.cost.resident = backward ? kLrnLanesResidentBackward : kLrnLanesResident;
  } else if (walk == LrnWalk::kRows) {
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
    p.channels_per_block = static_cast<int>(ceil_div(p.channels, cuts));
    shape.grid = {static_cast<unsigned>(blocks), static_cast<unsigned>(ceil_div(p.channels, p.channels_per_block))};
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
  LrnPlan plan{variant, candidate.params, candidate.cost.shape, 0};
  const bool wide = variant->walk == LrnWalk::kWide;
  if (wide && backward) plan.workspace = params.outer * params.channels * params.inner;
  return plan;
}

void launch_local_response_norm(LrnPlan& plan, void* workspace, Stream stream) {
  plan.params.workspace = workspace;
  plan.variant->run(plan.variant->info, plan.shape, plan.params, stream);
}

}  // namespace fastconv::cuda
