#include "cuda/conv2d/stem.h"

#include <algorithm>

namespace fastconv::cuda {
namespace {

constexpr int kElement = 2;        // bytes
constexpr int kWidestFilter = 64;  // in columns and rows, so that a patch's extents stay small
// Estimate: clocks of a multiprocessor to bring a pixel of a patch
constexpr double kClocksOfPixel = 0.2;

int rounded_up(int64_t value, int step) { return static_cast<int>(ceil_div(value, step)) * step; }

// What lies where in shared memory, and how much of it a block has
int64_t place(StemParams& p, int filters, int stride) {
  p.steps = static_cast<int>(ceil_div(p.s, kStemTaps));
  const int taps = p.steps * kStemTaps, bytes_of_pixel = kStemChannels * kElement;
  // 16 bytes more keep the banks of neighbouring filters apart.
  p.filter_pitch = p.r * taps * bytes_of_pixel + 16;
  p.patch_rows = (kStemRows - 1) * p.stride_h + (p.r - 1) * p.dilation_h + 1;
  p.patch_columns = rounded_up((kStemColumns - 1) * stride + taps, 4);
  const int row = p.patch_columns * bytes_of_pixel;
  // Halves begin in the other half of the banks.
  p.half_pitch = stride == 1 ? rounded_up(row, 128) + 64 : row / 2;
  p.row_pitch = stride == 1 ? p.half_pitch + rounded_up(row, 128) + 64 : row;
  p.patch_at = rounded_up(int64_t{filters} * p.filter_pitch, 128);
  p.slabs_at = rounded_up(p.patch_at + int64_t{p.patch_rows} * p.row_pitch, 128);
  p.biases_at = p.slabs_at + kStemThreads / 32 * stem_slab_bytes(filters);
  return p.biases_at + int64_t{filters} * 4;
}

StemRuns runs_of(const StemParams& p) {
  constexpr int kRun = 16 / kElement;
  const auto whole = [](int64_t stride) { return stride % kRun == 0; };
  if (!is_aligned(p.output) || !whole(p.y.n) || !whole(p.y.h)) return StemRuns::kNone;
  if (p.y.c == 1 && whole(p.y.w) && whole(p.k)) return StemRuns::kChannels;
  return p.y.w == 1 && whole(p.y.c) && whole(p.q) ? StemRuns::kColumns : StemRuns::kNone;
}

StemParams stem_params(const ConvArguments& arg) {
  const ConvBranch& branch = arg.branch[0];
  StemParams p{};
  p.image = arg.photograph.input, p.x = arg.photograph.x, p.c = arg.photograph.c;
  p.weight = arg.photograph.weight, p.weight_strides = arg.photograph.weight_strides;
  p.bias = branch.bias, p.output = branch.output, p.y = branch.y;
  p.activation = arg.activation;
  p.h = arg.h, p.w = arg.w, p.k = branch.k, p.p = arg.p, p.q = arg.q, p.r = arg.r, p.s = arg.s;
  p.stride_h = arg.stride_h, p.pad_h = arg.pad_h, p.pad_w = arg.pad_w, p.dilation_h = arg.dilation_h;
  return p;
}

}  // namespace

const char* refuses_stem(const ConvParams& params, int filters, int stride, const DeviceInfo& device) {
  const ConvArguments& arg = params.arg;
  if (arg.photograph.input == nullptr) return "the image has more than four channels, or a residual is added";
  if (arg.stride_w != stride) return "it is for another stride";
  if (arg.dilation_w > 1 && arg.s > 1) return "the filter is dilated";
  const int64_t rows = int64_t{arg.r - 1} * arg.dilation_h;
  if (rows > kWidestFilter || arg.s > kWidestFilter || arg.stride_h > kWidestFilter) return "the filter is too large";
  StemParams p = stem_params(arg);
  return place(p, filters, stride) <= device.shared_per_block ? nullptr : "the patch does not fit into shared memory";
}

StemLaunch stem_launch(const ConvParams& params, int filters, int stride, const DeviceInfo& device) {
  StemLaunch found{};
  StemParams& p = found.params = stem_params(params.arg);
  found.shape.shared_bytes = place(p, filters, stride);
  p.runs = runs_of(p);
  const int rows = static_cast<int>(ceil_div(p.p, kStemRows)), columns = static_cast<int>(ceil_div(p.q, kStemColumns));
  p.tiles = params.arg.n * rows * columns;
  p.by_tiles = Divider(rows * columns), p.by_tile_columns = Divider(columns);
  p.by_patch_columns = Divider(p.patch_columns);
  p.by_taps = Divider(p.steps * kStemTaps), p.by_rows = Divider(p.r);

  // Filters are brought once to a block, which then does one tile after the other: as many blocks as have the same
  // number of them, and fit.
  const int64_t across = ceil_div(p.k, filters);
  const int64_t places = std::max<int64_t>(int64_t{device.multiprocessors} * stem_blocks(filters) / across, 1);
  const int64_t blocks = ceil_div(p.tiles, ceil_div(p.tiles, places));
  found.shape.grid = {static_cast<unsigned>(blocks), static_cast<unsigned>(across)};
  found.shape.block = {kStemThreads};

  constexpr int kPixels = kStemRows * kStemColumns;
  const double of_pixels = static_cast<double>(p.p) * p.q / (static_cast<double>(rows) * columns * kPixels);
  const double of_filters = static_cast<double>(p.k) / static_cast<double>(across * filters);
  found.fill = of_pixels * of_filters * p.s / (p.steps * kStemTaps);
  const double products = static_cast<double>(kPixels) * filters * p.r * p.steps * kStemTaps * kStemChannels / 1024;
  found.busy = products / (products + kClocksOfPixel * (p.patch_rows * p.patch_columns + kPixels * filters / 8));
  return found;
}

}  // namespace fastconv::cuda
