#include "cuda/depthwise_conv2d/plan.h"

#include <algorithm>

namespace fastconv::cuda {
namespace {

constexpr int kTile = kDepthwiseTile;
constexpr int kResident = 2;            // what the kernels' launch bounds promise
constexpr int kSharedGoal = 32 * 1024;  // leaves L1 to the pixels
constexpr int kFewestColumns = 2;       // of a tile or a strip
constexpr int kFewestRows = 4;          // wgrad: of a lane, in tiles or strips, to be worth the sum over the lanes
constexpr int kMaxChannelBlocks = 65535;

int64_t out_channels(const DepthwiseConv2dParams& p) { return int64_t{p.channels} * p.multiplier; }

int compute_bytes(const DepthwiseConv2dParams& p) { return p.dtype == DType::kFloat64 ? 8 : 4; }

int64_t filter_bytes(const DepthwiseConv2dParams& p, Pass pass) {  // of a lane's channel in shared memory
  const int64_t taps = int64_t{p.filter_height} * p.filter_width + 1;
  return taps * (pass == Pass::kDgrad ? p.multiplier : 1) * compute_bytes(p);
}

// Every pixel of a tile is one of a row.
DepthwiseConv2dParams with_tiles(DepthwiseConv2dParams p, Pass pass) {
  const int rows = pass == Pass::kDgrad ? p.height : p.out_height;
  p.row_tiles = static_cast<int>(ceil_div(pass == Pass::kDgrad ? p.width : p.out_width, kTile));
  p.tiles = static_cast<int>(std::min<int64_t>(int64_t{p.batch} * rows * p.row_tiles, INT32_MAX));
  p.rows_first = p.in.c == 1;  // of NHWC the rows above and below come from L1; of NCHW lanes run along memory
  return p;
}

// The lanes of a block: x along the channels, y along the pixels
struct Lanes {
  int64_t x, y, channel_blocks;
};

// As many lanes of channels as leave shared memory for several blocks
Lanes lanes_of(const DepthwiseConv2dParams& p, Pass pass, int width, int threads) {
  const int64_t lanes = (pass == Pass::kDgrad ? p.channels : out_channels(p)) / width;
  int64_t most = p.in.c == 1 || p.out.c == 1 ? 32 : 1;
  if (pass != Pass::kWgrad) most = std::min(most, kSharedGoal / (filter_bytes(p, pass) * width));
  most = std::max<int64_t>({most, ceil_div(lanes, kMaxChannelBlocks), 1});
  const int64_t channel_blocks = ceil_div(lanes, most), x = ceil_div(lanes, channel_blocks);
  return {x, std::max<int64_t>(threads / x, 1), channel_blocks};
}

// The longer the strips, the fewer rows are loaded twice; the shorter, the more of them there are to fill the device.
// Takes the length that is done first.
void cut_into_strips(DepthwiseConv2dParams& p, Pass pass, Vectors vectors, const Strip& strip, const Lanes& lanes,
                     int64_t blocks_at_once) {
  const bool backward = pass == Pass::kDgrad;
  p.row_shift = backward && vectors != Vectors::kPixels ? p.padding_width % p.stride_width : 0;
  p.row_tiles = static_cast<int>(ceil_div(backward ? int64_t{p.width} + p.row_shift : p.out_width, strip.columns));
  p.first_row = backward ? p.padding_height / p.stride_height : 0;
  p.rows = backward ? (p.height - 1 + p.padding_height) / p.stride_height - p.first_row + 1 : p.out_height;
  constexpr int kStart = 2;  // in rows: what it takes to find a strip and to wait for its first pixels
  const int ahead = (p.filter_height - 1) / p.stride_height + kStart;
  const int64_t shortest = pass == Pass::kWgrad ? std::min(kFewestRows, p.rows) : 1;
  int64_t least = INT64_MAX;
  for (int64_t longest = p.rows; longest > 0; longest -= 1 + longest / 5) {
    const int64_t strips = ceil_div(p.rows, longest), rows = ceil_div(p.rows, strips);
    const int64_t tiles = p.batch * strips * p.row_tiles;
    const int64_t time = ceil_div(ceil_div(tiles, lanes.y) * lanes.channel_blocks, blocks_at_once) * (rows + ahead);
    if (rows < shortest || time >= least || tiles > INT32_MAX) continue;
    least = time;
    p.strip_rows = static_cast<int>(rows);
    p.strips = static_cast<int>(strips);
    p.tiles = static_cast<int>(tiles);
  }
  p.by_row_tiles = Divider(p.row_tiles);
  p.by_strips = Divider(p.strips);
}

bool are_aligned(const DepthwiseConv2dParams& p, int bytes) {
  for (const void* pointer : {p.input, static_cast<const void*>(p.output), p.grad_output, p.activated,
                              static_cast<const void*>(p.grad_input)}) {
    if (!is_aligned(pointer, bytes)) return false;
  }
  return true;
}

const char* channels_refusal(const DepthwiseConv2dParams& p, Pass pass, const DeviceInfo& device) {
  const int width = lane_channels(p.dtype), bytes = width * element_bytes(p.dtype);
  if (p.multiplier != 1) return "a channel has several filters";
  if (p.channels % width != 0) return "the channels are not whole vectors";
  for (const Strides* s : {&p.in, &p.out}) {
    if (s->c != 1) return "the channels do not lie side by side";
    if (s->n % width != 0 || s->h % width != 0 || s->w % width != 0) return "the pixels are not aligned to vectors";
  }
  if (!are_aligned(p, bytes)) return "the pixels are not aligned to vectors";
  const bool fits = pass == Pass::kWgrad || filter_bytes(p, pass) * width <= device.shared_per_block;
  return fits ? nullptr : "the filters of a vector do not fit into shared memory";
}

const char* rows_refusal(const DepthwiseConv2dParams& p) {
  const int width = lane_channels(p.dtype), bytes = width * element_bytes(p.dtype);
  if (p.padding_width != p.filter_width / 2) return "the rows' padding is not half of the filter";
  if (p.width % width != 0 || p.out_width % width != 0) return "the rows are not whole vectors";
  for (const Strides* s : {&p.in, &p.out}) {
    if (s->w != 1) return "the columns do not lie side by side";
    if (s->n % width != 0 || s->c % width != 0 || s->h % width != 0) return "the rows are not aligned to vectors";
  }
  return are_aligned(p, bytes) ? nullptr : "the rows are not aligned to vectors";
}

}  // namespace

const char* DepthwiseVariant::refusal(const DepthwiseConv2dParams& p, const DeviceInfo& device) const {
  if (filter > 0) {
    if (p.filter_width != filter || p.filter_height != filter) return "the filter has another size";
    if (p.dilation_width != 1 || p.dilation_height != 1) return "the filter is dilated";
    if (p.stride_width > 2 || p.stride_height != p.stride_width) return "the strides are not both 1 or both 2";
    if (pass == Pass::kDgrad && p.multiplier != 1) return "a channel has several filters";
  }
  if (vectors == Vectors::kPixels) return rows_refusal(p);
  return vectors == Vectors::kChannels ? channels_refusal(p, pass, device) : nullptr;
}

DepthwiseCandidate DepthwiseVariant::candidate(const DepthwiseConv2dParams& params, const DeviceInfo& device) const {
  DepthwiseCandidate found;
  found.params = params;
  DepthwiseConv2dParams& p = found.params;
  const Strip strip = strip_of(pass, element_bytes(p.dtype), vectors, filter);
  const int width = filter > 0 ? strip.channels : vectors == Vectors::kChannels ? lane_channels(p.dtype) : 1;
  const int resident = filter > 0 ? strip_resident(pass, vectors, filter, p.stride_width) : kResident;
  auto [x, y, channel_blocks] = lanes_of(p, pass, width, filter > 0 ? kStripThreads : kDepthwiseThreads);
  if (filter > 0) {
    cut_into_strips(p, pass, vectors, strip, {x, y, channel_blocks}, int64_t{resident} * device.multiprocessors);
  } else {
    p = with_tiles(p, pass);
  }
  // Warps without work would only wait at the barriers.
  y = std::max<int64_t>(std::min(y, ceil_div(p.tiles * x, 32) * 32 / x), 1);

  LaunchShape& shape = found.cost.shape;
  shape.block = {static_cast<unsigned>(x), static_cast<unsigned>(y)};
  shape.grid.y = static_cast<unsigned>(channel_blocks);
  if (pass == Pass::kWgrad) {
    const int64_t parts = filter > 0 ? 1 : int64_t{p.filter_height} * p.filter_width;
    // Of strips, one wave: every block adds up its lanes' sums once.
    const int64_t wanted = filter > 0 ? std::max<int64_t>(resident * device.multiprocessors / channel_blocks, 1)
                                      : ceil_div(int64_t{8} * device.multiprocessors, parts * channel_blocks);
    const int64_t least = filter > 0 ? ceil_div(kFewestRows, p.strip_rows) : kFewestRows;
    const int64_t chunks = std::clamp<int64_t>(std::min(wanted, ceil_div(p.tiles, least * y)), 1, 512);
    p.tiles_per_chunk = static_cast<int>(ceil_div(p.tiles, chunks));
    p.chunks = static_cast<int>(ceil_div(p.tiles, p.tiles_per_chunk));
    shape.grid.x = static_cast<unsigned>(p.chunks * parts);
    shape.shared_bytes = x * y * width * compute_bytes(p);
  } else {
    // Enough to fill the device several times; then each works on several tiles with the filters it has loaded.
    const int64_t wanted = ceil_div(int64_t{32} * device.multiprocessors, channel_blocks);
    shape.grid.x = static_cast<unsigned>(std::min(ceil_div(p.tiles, y), wanted));
    shape.shared_bytes = x * width * filter_bytes(p, pass);
  }
  found.cost.rate = rate;
  found.cost.resident = resident;
  return found;
}

bool depthwise_conv2d_takes(const DepthwiseConv2dParams& p, const DeviceInfo& device) {
  for (const int rows : {p.height, p.out_height}) {
    const int64_t row_tiles = ceil_div(int64_t{std::max(p.width, p.out_width)} + 1, kFewestColumns);
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
