#include "cuda/conv2d/stem.h"

#include <algorithm>

#include "cuda/conv2d/plan.h"

namespace fastconv::cuda {
namespace {

constexpr int kElement = 2, kPixelBytes = kStemChannels * kElement;
// Of a filter in columns and rows, and of a step in rows, so that a patch's extents stay small; blocks along y of a
// grid
constexpr int kFarthest = 64, kMostAcross = 65535;
// Estimates: clocks of a multiprocessor to bring a pixel of a patch, and to move a run
constexpr double kClocksOfPixel = 0.2, kClocksOfRun = 0.2;

int rounded_up(int64_t value, int step) { return static_cast<int>(ceil_div(value, step)) * step; }

StemParams stem_params(const ConvArguments& arg) {
  const ConvBranch& branch = arg.branch[0];
  StemParams p{};
  p.image = arg.photograph.input, p.x = arg.photograph.x, p.c = arg.photograph.c;
  p.weight = arg.photograph.weight, p.weight_strides = arg.photograph.weight_strides;
  p.bias = branch.bias, p.output = branch.output;
  p.gradient = arg.grad_output, p.gradient_channels = arg.grad_channels;
  p.y = arg.grad_output ? arg.y : branch.y;
  p.activation = arg.activation;
  p.h = arg.h, p.w = arg.w, p.k = branch.k, p.p = arg.p, p.q = arg.q, p.r = arg.r, p.s = arg.s;
  p.stride_h = arg.stride_h, p.pad_h = arg.pad_h, p.pad_w = arg.pad_w;
  p.dilation_h = arg.r > 1 ? arg.dilation_h : 1;
  return p;
}

// What lies where in shared memory, and how much of it a block has
int64_t place(Pass pass, StemParams& p, const StemTiles& tiles) {
  p.steps = static_cast<int>(ceil_div(p.s, kStemTaps));
  const int taps = p.steps * kStemTaps;
  // 16 bytes more keep the banks of neighbouring filters apart.
  p.filter_pitch = p.r * taps * kPixelBytes + 16;
  p.patch_rows = (kStemRows - 1) * p.stride_h + (p.r - 1) * p.dilation_h + 1;
  p.patch_columns = rounded_up((kStemColumns - 1) * tiles.stride + taps, 4);
  const int row = p.patch_columns * kPixelBytes;
  // Halves begin in the other half of the banks.
  p.half_pitch = tiles.stride == 1 ? rounded_up(row, 128) + 64 : row / 2;
  p.row_pitch = tiles.stride == 1 ? p.half_pitch + rounded_up(row, 128) + 64 : row;
  p.patch_at = pass == Pass::kFprop ? rounded_up(int64_t{tiles.filters} * p.filter_pitch, 128) : 0;
  p.slabs_at = rounded_up(p.patch_at + int64_t{p.patch_rows} * p.row_pitch, 128);
  if (pass == Pass::kWgrad) return p.slabs_at + kStemPixels * stem_pixel_pitch(tiles.filters);
  p.biases_at = p.slabs_at + kStemThreads / 32 * stem_slab_bytes(tiles.filters);
  return p.biases_at + int64_t{tiles.filters} * 4;
}

StemRuns runs_of(const StemParams& p) {
  const auto whole = [](int64_t stride) { return stride % kStemRun == 0; };
  if (!is_aligned(p.output) || !whole(p.y.n) || !whole(p.y.h)) return StemRuns::kNone;
  if (p.y.c == 1 && whole(p.y.w) && whole(p.k)) return StemRuns::kChannels;
  return p.y.w == 1 && whole(p.y.c) && whole(p.q) ? StemRuns::kColumns : StemRuns::kNone;
}

}  // namespace

const char* refuses_stem(Pass pass, const ConvParams& params, const StemTiles& tiles, const DeviceInfo& device) {
  const ConvArguments& arg = params.arg;
  if (arg.photograph.input == nullptr) return "more than four channels, groups, branches, or a residual";
  if (arg.stride_w != tiles.stride) return "it is for another stride";
  if (arg.dilation_w > 1 && arg.s > 1) return "the filter is dilated";
  const int64_t rows = int64_t{arg.r - 1} * arg.dilation_h;
  if (rows > kFarthest || arg.s > kFarthest || arg.stride_h > kFarthest) return "the filter or its step is too large";
  if (ceil_div(arg.branch[0].k, tiles.filters) > kMostAcross) return "there are too many filters";
  if (pass == Pass::kWgrad && !has_vectors(arg.grad_output, arg.y, arg.grad_channels, kStemRun, kElement))
    return "the gradient's channels are not vectors of 16 bytes";
  StemParams p = stem_params(arg);
  return place(pass, p, tiles) <= device.shared_per_block ? nullptr : "the patch does not fit into shared memory";
}

StemLaunch stem_launch(Pass pass, const ConvParams& params, const StemTiles& tiles, const DeviceInfo& device) {
  StemLaunch found{};
  StemParams& p = found.params = stem_params(params.arg);
  found.shape.shared_bytes = place(pass, p, tiles);
  const bool forward = pass == Pass::kFprop;
  if (forward) p.runs = runs_of(p);
  const int rows = static_cast<int>(ceil_div(p.p, kStemRows)), columns = static_cast<int>(ceil_div(p.q, kStemColumns));
  p.tiles = params.arg.n * rows * columns;
  p.by_tiles = Divider(rows * columns), p.by_tile_columns = Divider(columns);
  p.by_patch_columns = Divider(p.patch_columns);
  p.by_taps = Divider(p.steps * kStemTaps), p.by_rows = Divider(p.r), p.by_steps = Divider(p.steps);
  p.extent_a = params.extent_a, p.extent_b = params.extent_b, p.pitch_b = params.pitch_b;

  // A block brings filters once, or adds up in registers, and does one tile after the other: as many blocks as fit.
  const int steps = p.r * p.steps;
  const int64_t across = ceil_div(p.k, tiles.filters), beside = forward ? 1 : ceil_div(steps, tiles.steps);
  const int resident = forward ? stem_blocks(tiles.filters) : stem_wgrad_blocks(tiles.filters, tiles.steps);
  found.shape.block = {kStemThreads};
  const int64_t places = int64_t{device.multiprocessors} * resident_blocks(found.shape, resident, device);
  const int64_t blocks = std::min<int64_t>(p.tiles, ceil_div(places, across * beside));
  found.shape.grid = {static_cast<unsigned>(blocks), static_cast<unsigned>(across), static_cast<unsigned>(beside)};

  const int64_t multiplied = forward ? steps : beside * tiles.steps;
  const double of_pixels = static_cast<double>(p.p) * p.q / (static_cast<double>(rows) * columns * kStemPixels);
  const double of_filters = static_cast<double>(p.k) / static_cast<double>(across * tiles.filters);
  found.fill = of_pixels * of_filters * p.r * p.s / static_cast<double>(multiplied * kStemTaps);
  found.products = static_cast<double>(kStemPixels) * tiles.filters * kStemTaps * kStemChannels / 1024 *
                   static_cast<double>(multiplied / beside);
  found.moves = kClocksOfPixel * p.patch_rows * p.patch_columns + kClocksOfRun * kStemPixels * tiles.filters / kStemRun;
  return found;
}

}  // namespace fastconv::cuda
