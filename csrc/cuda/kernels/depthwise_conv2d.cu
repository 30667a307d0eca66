// Which kernel of depthwise_conv2d.cuh runs, and in what grid.
#include <algorithm>

#include "cuda/kernels/depthwise_conv2d.cuh"

namespace fastconv::cuda {
namespace {

using namespace depthwise;

constexpr int kSharedLimit = 96 * 1024;  // what every device of sm_80 and later has
constexpr int kSharedGoal = 32 * 1024;   // leaves L1 to the pixels
constexpr int kMaxChannelBlocks = 65535;

enum class Pass { kFprop, kDgrad, kWgrad };

struct Choice {
  const KernelInfo* info;
  int vector;          // elements in a lane's vector
  int filter, stride;  // template arguments; 0, 1 for any
  dim3 block;
  int channel_blocks;
  size_t shared_bytes;
};

int64_t out_channels(const DepthwiseConv2dParams& p) { return int64_t{p.channels} * p.multiplier; }

int64_t filter_bytes(const DepthwiseConv2dParams& p, Pass pass) {  // of a lane's channel in shared memory
  const int64_t taps = int64_t{p.filter_height} * p.filter_width + 1;
  return taps * (pass == Pass::kDgrad ? p.multiplier : 1) * (p.dtype == DType::kFloat64 ? 8 : 4);
}

bool takes_vectors(const DepthwiseConv2dParams& p, Pass pass) {
  const int width = lane_width(p.dtype), bytes = width * element_bytes(p.dtype);
  const auto strides = [&](const ImageStrides& s) {
    return s.c == 1 && s.n % width == 0 && s.h % width == 0 && s.w % width == 0;
  };
  const bool aligned = is_aligned(p.input, bytes) && is_aligned(p.output, bytes) && is_aligned(p.grad_output, bytes) &&
                       is_aligned(p.activated, bytes) && is_aligned(p.grad_input, bytes);
  const bool fits = pass == Pass::kWgrad || filter_bytes(p, pass) * width <= kSharedLimit;
  return p.multiplier == 1 && p.channels % width == 0 && strides(p.in) && strides(p.out) && aligned && fits;
}

bool has_fast_filter(const DepthwiseConv2dParams& p) {
  return p.dilation_width == 1 && (p.filter_width == 3 || p.filter_width == 5) &&
         (p.stride_width == 1 || p.stride_width == 2);
}

constexpr const char* kPassNames[] = {"depthwise_conv2d_fprop", "depthwise_conv2d_dgrad", "depthwise_conv2d_wgrad"};
constexpr const char* kFilterNames[] = {"_3x", "_5x", ""};

// All heuristics: vectors where they fit, registers for the filters that networks use, and as many lanes of channels as
// leave shared memory for four blocks.
Choice choose(const DepthwiseConv2dParams& p, Pass pass) {
  const std::string stem = kPassNames[static_cast<int>(pass)];
  const auto name_of = [&](bool vectors, int filter) {
    return stem + (vectors ? "_nhwc" : "_any") + (filter == 3 ? "_3x" : filter == 5 ? "_5x" : "");
  };
  bool vectors = takes_vectors(p, pass), fast = has_fast_filter(p);
  if (const char* forced = forced_kernel(stem.c_str())) {
    bool found = false;
    for (const bool v : {vectors, false}) {
      for (const bool f : {fast, false}) {
        if (found || name_of(v, f ? p.filter_width : 0) != forced) continue;
        found = true;
        vectors = v;
        fast = f;
      }
    }
    if (!found) {
      throw std::runtime_error(std::string("fastconv: kernel ") + forced + " was forced, but needs " +
                               find_kernel(depthwise_conv2d_kernels(), forced).needs);
    }
  }
  Choice choice{};
  choice.filter = fast ? p.filter_width : 0;
  choice.stride = fast ? p.stride_width : 1;
  choice.info = &find_kernel(depthwise_conv2d_kernels(), name_of(vectors, choice.filter).c_str());
  choice.vector = vectors ? lane_width(p.dtype) : 1;

  const int64_t lanes = (pass == Pass::kDgrad ? p.channels : out_channels(p)) / choice.vector;
  const int64_t lane_bytes = pass == Pass::kWgrad ? 0 : filter_bytes(p, pass) * choice.vector;
  int64_t most = p.in.c == 1 || p.out.c == 1 ? 32 : 1;
  if (lane_bytes > 0) most = std::min(most, kSharedGoal / lane_bytes);
  most = std::max<int64_t>(most, ceil_div(lanes, kMaxChannelBlocks));
  most = std::max<int64_t>(most, 1);
  choice.channel_blocks = static_cast<int>(ceil_div(lanes, most));
  const int64_t x = ceil_div(lanes, choice.channel_blocks);
  // Warps without work would only wait at the barriers.
  const int64_t y = std::min<int64_t>(kThreads / x, ceil_div(p.tiles * x, 32) * 32 / x);
  choice.block = dim3(static_cast<unsigned>(x), static_cast<unsigned>(std::max<int64_t>(y, 1)));
  const int compute_bytes = p.dtype == DType::kFloat64 ? 8 : 4;
  choice.shared_bytes = pass == Pass::kWgrad ? choice.block.x * choice.block.y * choice.vector * compute_bytes
                                             : static_cast<size_t>(x * lane_bytes);
  return choice;
}

DepthwiseConv2dParams with_tiles(DepthwiseConv2dParams p, Pass pass) {
  const bool fast = has_fast_filter(p);
  const int rows = pass == Pass::kDgrad ? p.height : p.out_height;
  p.row_shift = pass == Pass::kDgrad && fast ? p.padding_width % p.stride_width : 0;
  const int64_t row = pass == Pass::kDgrad ? int64_t{p.width} + p.row_shift : p.out_width;
  p.row_tiles = static_cast<int>(ceil_div(row, kTile));
  p.tiles = static_cast<int>(std::min<int64_t>(int64_t{p.batch} * rows * p.row_tiles, INT32_MAX));
  p.rows_first = p.in.c == 1;  // of NHWC the rows above and below come from L1; of NCHW lanes run along memory
  return p;
}

// f(kernel) of the chosen template arguments
template <template <class, int, int, int> class Kernel, class T, class F>
void for_kernel(const Choice& choice, F&& f) {
  const auto with_width = [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    if (choice.filter == 3 && choice.stride == 1) return f(Kernel<T, kWidth, 3, 1>::get());
    if (choice.filter == 3) return f(Kernel<T, kWidth, 3, 2>::get());
    if (choice.filter == 5 && choice.stride == 1) return f(Kernel<T, kWidth, 5, 1>::get());
    if (choice.filter == 5) return f(Kernel<T, kWidth, 5, 2>::get());
    return f(Kernel<T, kWidth, 0, 1>::get());
  };
  if (choice.vector > 1) {
    with_width(std::integral_constant<int, kLane<T>>{});
  } else {
    with_width(std::integral_constant<int, 1>{});
  }
}

template <class T, int kWidth, int kFilter, int kStride>
struct Fprop {
  static constexpr auto get() { return &fprop<T, kWidth, kFilter, kStride>; }
};
template <class T, int kWidth, int kFilter, int kStride>
struct Dgrad {
  static constexpr auto get() { return &dgrad<T, kWidth, kFilter, kStride>; }
};
template <class T, int kWidth, int kFilter, int kStride>
struct Wgrad {
  static constexpr auto get() { return &wgrad<T, kWidth, kFilter, kStride>; }
};

// Blocks along the tiles: enough to fill the machine several times, and then each works on several tiles with the
// filters it has loaded.
unsigned tile_blocks(const DepthwiseConv2dParams& p, const Choice& choice) {
  const int64_t most = ceil_div(p.tiles, choice.block.y);
  const int64_t wanted = ceil_div(int64_t{32} * p.multiprocessors, choice.channel_blocks);
  return static_cast<unsigned>(std::min(most, wanted));
}

template <template <class, int, int, int> class Kernel>
void launch_tiles(Pass pass, const DepthwiseConv2dParams& p, Stream stream) {
  const Choice choice = choose(p, pass);
  const dim3 grid(tile_blocks(p, choice), static_cast<unsigned>(choice.channel_blocks));
  for_element_type(p.dtype, [&](auto element) {
    for_kernel<Kernel, typename decltype(element)::Type>(
        choice, [&](auto kernel) { launch(*choice.info, kernel, grid, choice.block, choice.shared_bytes, stream, p); });
  });
}

void with_chunks(DepthwiseConv2dParams& p, const Choice& choice) {
  const int64_t parts = choice.filter ? p.filter_height : int64_t{p.filter_height} * p.filter_width;
  const int64_t wanted = ceil_div(int64_t{8} * p.multiprocessors, parts * choice.channel_blocks);
  const int64_t most = ceil_div(p.tiles, int64_t{4} * choice.block.y);  // a lane has at least 4 tiles
  const int64_t chunks = std::clamp<int64_t>(std::min(wanted, most), 1, 512);
  p.tiles_per_chunk = static_cast<int>(ceil_div(p.tiles, chunks));
  p.chunks = static_cast<int>(ceil_div(p.tiles, p.tiles_per_chunk));
}

}  // namespace

const std::vector<KernelInfo>& depthwise_conv2d_kernels() {
  static const std::vector<KernelInfo> kernels = [] {
    static std::vector<std::string> names;  // what the entries point to
    names.reserve(18);
    std::vector<KernelInfo> entries;
    for (const char* pass : kPassNames) {
      for (const bool vectors : {true, false}) {
        for (const char* filter : kFilterNames) {
          names.push_back(std::string(pass) + (vectors ? "_nhwc" : "_any") + filter);
          const char* needs =
              vectors ? (*filter ? "channels side by side in whole vectors of 4 (float64: 2), aligned to these, one "
                                   "filter for each, a filter "
                                   "of this width without dilation, stride 1 or 2 along the row"
                                 : "channels side by side in whole vectors of 4 (float64: 2), aligned to these, one "
                                   "filter for each")
                      : (*filter ? "a filter of this width without dilation, stride 1 or 2 along the row" : "");
          entries.push_back({names.back().c_str(), pass, 80, {0, 0, 0}, 0, kThreads, -1, needs});
        }
      }
    }
    return entries;
  }();
  return kernels;
}

bool depthwise_conv2d_takes(const DepthwiseConv2dParams& p) {
  for (const int rows : {p.height, p.out_height}) {
    const int64_t row_tiles = ceil_div(int64_t{std::max(p.width, p.out_width)} + 1, kTile);
    if (int64_t{p.batch} * rows * row_tiles >= INT32_MAX) return false;
  }
  return out_channels(p) < INT32_MAX &&
         filter_bytes(p, Pass::kFprop) * ceil_div(out_channels(p), kMaxChannelBlocks) <= kSharedLimit &&
         filter_bytes(p, Pass::kDgrad) * ceil_div(p.channels, kMaxChannelBlocks) <= kSharedLimit;
}

void depthwise_conv2d_fprop(const DepthwiseConv2dParams& params, Stream stream) {
  launch_tiles<Fprop>(Pass::kFprop, with_tiles(params, Pass::kFprop), stream);
}

void depthwise_conv2d_dgrad(const DepthwiseConv2dParams& params, Stream stream) {
  DepthwiseConv2dParams p = with_tiles(params, Pass::kDgrad);
  p.bias = nullptr;
  launch_tiles<Dgrad>(Pass::kDgrad, p, stream);
}

int64_t depthwise_conv2d_wgrad_workspace(const DepthwiseConv2dParams& params) {
  DepthwiseConv2dParams p = with_tiles(params, Pass::kWgrad);
  with_chunks(p, choose(p, Pass::kWgrad));
  return p.chunks * (int64_t{p.filter_height} * p.filter_width + 1) * out_channels(p);
}

void depthwise_conv2d_wgrad(const DepthwiseConv2dParams& params, Stream stream) {
  DepthwiseConv2dParams p = with_tiles(params, Pass::kWgrad);
  const Choice choice = choose(p, Pass::kWgrad);
  with_chunks(p, choice);
  const int taps = p.filter_height * p.filter_width;
  const dim3 grid(static_cast<unsigned>(p.chunks) * (choice.filter ? p.filter_height : taps),
                  static_cast<unsigned>(choice.channel_blocks));
  for_element_type(p.dtype, [&](auto element) {
    using T = typename decltype(element)::Type;
    for_kernel<Wgrad, T>(
        choice, [&](auto kernel) { launch(*choice.info, kernel, grid, choice.block, choice.shared_bytes, stream, p); });
    const dim3 sum_grid(static_cast<unsigned>(ceil_div(out_channels(p), kSumX) * (taps + 1)));
    launch(*choice.info, &wgrad_sum<T>, sum_grid, dim3(kSumX, kSumY), kSumX * kSumY * sizeof(Compute<T>), stream, p);
  });
}

}  // namespace fastconv::cuda
