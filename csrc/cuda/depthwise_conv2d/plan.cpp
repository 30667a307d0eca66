#include "cuda/depthwise_conv2d/plan.h"

#include <algorithm>

namespace fastconv::cuda {
namespace {

constexpr int kThreads = kDepthwiseThreads, kTile = kDepthwiseTile;
constexpr int kResident = 2;            // what the kernels' launch bounds promise
constexpr int kSharedGoal = 32 * 1024;  // leaves L1 to the pixels
constexpr int kMaxChannelBlocks = 65535;

int64_t out_channels(const DepthwiseConv2dParams& p) { return int64_t{p.channels} * p.multiplier; }

int compute_bytes(const DepthwiseConv2dParams& p) { return p.dtype == DType::kFloat64 ? 8 : 4; }

int64_t filter_bytes(const DepthwiseConv2dParams& p, Pass pass) {  // of a lane's channel in shared memory
  const int64_t taps = int64_t{p.filter_height} * p.filter_width + 1;
  return taps * (pass == Pass::kDgrad ? p.multiplier : 1) * compute_bytes(p);
}

// Every pixel of a tile is one of a row. With `fast` filters dgrad's tiles begin where (w + padding) is a multiple of
// the stride.
DepthwiseConv2dParams with_tiles(DepthwiseConv2dParams p, Pass pass, bool fast) {
  const int rows = pass == Pass::kDgrad ? p.height : p.out_height;
  p.row_shift = pass == Pass::kDgrad && fast ? p.padding_width % p.stride_width : 0;
  const int64_t row = pass == Pass::kDgrad ? int64_t{p.width} + p.row_shift : p.out_width;
  p.row_tiles = static_cast<int>(ceil_div(row, kTile));
  p.tiles = static_cast<int>(std::min<int64_t>(int64_t{p.batch} * rows * p.row_tiles, INT32_MAX));
  p.rows_first = p.in.c == 1;  // of NHWC the rows above and below come from L1; of NCHW lanes run along memory
  return p;
}

}  // namespace

const char* DepthwiseVariant::refusal(const DepthwiseConv2dParams& p, const DeviceInfo& device) const {
  if (filter > 0) {
    if (p.filter_width != filter) return "the filter has another width";
    if (p.dilation_width != 1) return "the filter is dilated along the row";
    if (p.stride_width > 2) return "the stride along the row is larger than 2";
  }
  if (!vectors) return nullptr;
  const int width = lane_channels(p.dtype), bytes = width * element_bytes(p.dtype);
  if (p.multiplier != 1) return "a channel has several filters";
  if (p.channels % width != 0) return "the channels are not whole vectors";
  for (const Strides* s : {&p.in, &p.out}) {
    if (s->c != 1) return "the channels do not lie side by side";
    if (s->n % width != 0 || s->h % width != 0 || s->w % width != 0) return "the pixels are not aligned to vectors";
  }
  for (const void* pointer : {p.input, static_cast<const void*>(p.output), p.grad_output, p.activated,
                              static_cast<const void*>(p.grad_input)}) {
    if (!is_aligned(pointer, bytes)) return "the pixels are not aligned to vectors";
  }
  const bool fits = pass == Pass::kWgrad || filter_bytes(p, pass) * width <= device.shared_per_block;
  return fits ? nullptr : "the filters of a vector do not fit into shared memory";
}

// As many lanes of channels as leave shared memory for several blocks, and tiles for the others.
DepthwiseCandidate DepthwiseVariant::candidate(const DepthwiseConv2dParams& params, const DeviceInfo& device) const {
  DepthwiseCandidate found;
  found.params = with_tiles(params, pass, filter > 0);
  DepthwiseConv2dParams& p = found.params;
  const int vector = vectors ? lane_channels(p.dtype) : 1;
  const int64_t lanes = (pass == Pass::kDgrad ? p.channels : out_channels(p)) / vector;
  const int64_t lane_bytes = pass == Pass::kWgrad ? 0 : filter_bytes(p, pass) * vector;
  int64_t most = p.in.c == 1 || p.out.c == 1 ? 32 : 1;
  if (lane_bytes > 0) most = std::min(most, kSharedGoal / lane_bytes);
  most = std::max<int64_t>({most, ceil_div(lanes, kMaxChannelBlocks), 1});
  const int64_t channel_blocks = ceil_div(lanes, most);
  const int64_t x = ceil_div(lanes, channel_blocks);
  // Warps without work would only wait at the barriers.
  const int64_t y = std::max<int64_t>(std::min(kThreads / x, ceil_div(p.tiles * x, 32) * 32 / x), 1);

  LaunchShape& shape = found.cost.shape;
  shape.block = {static_cast<unsigned>(x), static_cast<unsigned>(y)};
  shape.grid.y = static_cast<unsigned>(channel_blocks);
  if (pass == Pass::kWgrad) {
    const int64_t parts = filter > 0 ? p.filter_height : int64_t{p.filter_height} * p.filter_width;
    const int64_t wanted = ceil_div(int64_t{8} * device.multiprocessors, parts * channel_blocks);
    const int64_t fewest = ceil_div(p.tiles, int64_t{4} * y);  // a lane has at least 4 tiles
    const int64_t chunks = std::clamp<int64_t>(std::min(wanted, fewest), 1, 512);
    p.tiles_per_chunk = static_cast<int>(ceil_div(p.tiles, chunks));
    p.chunks = static_cast<int>(ceil_div(p.tiles, p.tiles_per_chunk));
    shape.grid.x = static_cast<unsigned>(p.chunks * parts);
    shape.shared_bytes = x * y * vector * compute_bytes(p);
  } else {
    // Enough to fill the device several times; then each works on several tiles with the filters it has loaded.
    const int64_t wanted = ceil_div(int64_t{32} * device.multiprocessors, channel_blocks);
    shape.grid.x = static_cast<unsigned>(std::min(ceil_div(p.tiles, y), wanted));
    shape.shared_bytes = x * lane_bytes;
  }
  found.cost.rate = rate;
  found.cost.resident = kResident;
  return found;
}

bool depthwise_conv2d_takes(const DepthwiseConv2dParams& p, const DeviceInfo& device) {
  for (const int rows : {p.height, p.out_height}) {
    const int64_t row_tiles = ceil_div(int64_t{std::max(p.width, p.out_width)} + 1, kTile);
    if (int64_t{p.batch} * rows * row_tiles >= INT32_MAX) return false;
  }
  return out_channels(p) < INT32_MAX &&
         filter_bytes(p, Pass::kFprop) * ceil_div(out_channels(p), kMaxChannelBlocks) <= device.shared_per_block &&
         filter_bytes(p, Pass::kDgrad) * ceil_div(p.channels, kMaxChannelBlocks) <= device.shared_per_block;
}

DepthwisePlan plan_depthwise_conv2d(Pass pass, const DepthwiseConv2dParams& params, const DeviceInfo& device) {
  const auto [variant, candidate] = choose<DepthwiseVariant>(static_cast<int>(pass), params, device);
  DepthwisePlan plan{variant, candidate.params, candidate.cost.shape, {}, 0};
  const DepthwiseConv2dParams& p = plan.params;
  if (pass == Pass::kWgrad) {
    const int64_t rows = int64_t{p.filter_height} * p.filter_width + 1;  // the taps and the bias
    plan.workspace = p.chunks * rows * out_channels(p);
    plan.sums = {{static_cast<unsigned>(ceil_div(out_channels(p), kDepthwiseSumX) * rows)},
                 {kDepthwiseSumX, kDepthwiseSumY},
                 kDepthwiseSumX * kDepthwiseSumY * compute_bytes(p)};
  }
  return plan;
}

void launch_depthwise_conv2d(DepthwisePlan& plan, void* workspace, Stream stream) {
  plan.params.workspace = workspace;
  plan.variant->run(plan.variant->info, plan.shape, plan.sums, plan.params, stream);
}

}  // namespace fastconv::cuda
