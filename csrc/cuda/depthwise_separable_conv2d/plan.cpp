#include "cuda/depthwise_separable_conv2d/plan.h"

#include <algorithm>

#include "cuda/depthwise_conv2d/plan.h"

namespace fastconv::cuda {
namespace {

using Params = DepthwiseSeparableConv2dParams;

constexpr int kResident = 2;                // what the kernels' launch bounds promise
constexpr int64_t kSharedGoal = 96 * 1024;  // beyond, a block is alone on its multiprocessor; not measured

int64_t padded_channels(const Params& p) {
  const int64_t depth = kSeparableDepthBytes / element_bytes(p.depthwise.dtype);
  return ceil_div(p.depthwise.channels, depth) * depth;
}

int64_t shared_bytes(const Params& p, int pixels) {
  return pixels * (padded_channels(p) * element_bytes(p.depthwise.dtype) + kSeparableChunkBytes) + kSeparableRingBytes;
}

// Channels whose filters fit where the ring will be
int64_t channels_at_once(const Params& p) {
  const int64_t words = int64_t{p.depthwise.filter_height} * p.depthwise.filter_width + 1;
  const int64_t fitting = kSeparableRingBytes / (words * 4) / 8 * 8;
  // A pass over 128 channels of 64 pixels has two items for every thread; more would not be faster.
  return std::min<int64_t>({fitting, padded_channels(p), 128});
}

int64_t tiles_of(const DepthwiseConv2dParams& d) {
  return int64_t{d.batch} * d.out_height * ceil_div(d.out_width, kDepthwiseTile);
}

int64_t blocks_of(const DepthwiseConv2dParams& d, int pixels) { return ceil_div(tiles_of(d) * kDepthwiseTile, pixels); }

// Each block reads all of the pointwise weight from L2: the more channels, the more pixels it takes to make up for it.
const char* objection(const Params& p, int pixels, const DeviceInfo& device) {
  if (shared_bytes(p, pixels) > kSharedGoal) return "two kernels are better than blocks of so much shared memory";
  const bool few = blocks_of(p.depthwise, 128) < device.multiprocessors;
  if (pixels == 128) {
    if (few) return "its blocks do not fill the device";
    return p.depthwise.channels <= 256 ? nullptr : "two kernels are better for more than 256 channels";
  }
  return few || p.depthwise.channels <= 128 ? nullptr : "larger blocks or two kernels are better for so many channels";
}

// Whether results can be written by 16 bytes
bool writes_wide(const Params& p) {
  const Strides& out = p.depthwise.out;
  return out.c == 1 && p.out_channels % 8 == 0 && is_aligned(p.output) && out.n % 8 == 0 && out.h % 8 == 0 &&
         out.w % 8 == 0;
}

}  // namespace

const char* SeparableVariant::refusal(const Params& p, const DeviceInfo& device) const {
  const DepthwiseConv2dParams& d = p.depthwise;
  const int bytes = element_bytes(d.dtype);
  if (bytes == 8 || tf32 != (bytes == 4)) return "the tensors have another dtype";
  if (tf32 && !p.tf32) return "TF32 is not allowed";
  if (!p.channels_last) return "the output is not channels_last";
  if (d.multiplier != 1) return "a channel has several filters";
  if (d.channels * bytes % kSeparableChunkBytes != 0) return "the channels are not whole vectors of 16 bytes";
  if (d.in.c != 1) return "the channels do not lie side by side";
  if (d.in.n % 4 != 0 || d.in.h % 4 != 0 || d.in.w % 4 != 0 || !is_aligned(d.input, 4 * bytes)) {
    return "the pixels are not aligned to vectors";
  }
  if (!is_aligned(p.weight)) return "the pointwise weight is not aligned to 16 bytes";
  if (filter > 0) {
    if (d.filter_width != filter) return "the filter has another width";
    if (d.dilation_width != 1) return "the filter is dilated along the row";
    if (d.stride_width > 2) return "the stride along the row is larger than 2";
  }
  if (!depthwise_conv2d_takes(d, device)) return "there are too many pixels or taps";
  const bool fits = channels_at_once(p) > 0 && shared_bytes(p, pixels) <= device.shared_per_block;
  return fits ? nullptr : "the depthwise result does not fit into shared memory";
}

SeparableCandidate SeparableVariant::candidate(const Params& given, const DeviceInfo& device) const {
  SeparableCandidate found;
  found.params = given;
  Params& p = found.params;
  DepthwiseConv2dParams& d = p.depthwise;
  d.row_tiles = static_cast<int>(ceil_div(d.out_width, kDepthwiseTile));
  d.tiles = static_cast<int>(tiles_of(d));
  d.rows_first = true;
  p.padded_channels = static_cast<int>(padded_channels(p));
  p.channels_at_once = static_cast<int>(channels_at_once(p));
  p.out_tiles = static_cast<int>(ceil_div(p.out_channels, kSeparableColumns));
  p.by_rows = Divider(d.out_height);
  p.by_row_tiles = Divider(d.row_tiles);
  const int lanes = lane_channels(d.dtype), last = p.padded_channels % p.channels_at_once;
  p.by_lanes = Divider(p.channels_at_once / lanes);
  p.by_last_lanes = Divider(std::max(last / lanes, 1));
  const int64_t blocks = blocks_of(d, pixels);
  const int64_t sharing = std::clamp<int64_t>(ceil_div(device.multiprocessors, blocks), 1, p.out_tiles);
  p.out_tiles_per_block = static_cast<int>(ceil_div(p.out_tiles, sharing));
  found.cost.shape = {
      {static_cast<unsigned>(blocks), static_cast<unsigned>(ceil_div(p.out_tiles, p.out_tiles_per_block))},
      {static_cast<unsigned>(info.threads)},
      shared_bytes(p, pixels)};
  found.cost.rate = rate;
  found.cost.resident = kResident;
  found.cost.objection = objection(p, pixels, device);
  return found;
}

SeparablePlan plan_depthwise_separable_conv2d(const Params& params, const DeviceInfo& device) {
  const auto [variant, candidate] = choose_if_any<SeparableVariant>(0, params, device);
  return {variant, candidate.params, candidate.cost.shape};
}

void launch_depthwise_separable_conv2d(SeparablePlan& plan, Stream stream) {
  plan.params.wide = writes_wide(plan.params);
  plan.variant->run(plan.variant->info, plan.shape, plan.params, stream);
}

}  // namespace fastconv::cuda
