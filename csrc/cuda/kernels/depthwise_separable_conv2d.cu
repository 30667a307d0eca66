// Whether the kernel of depthwise_separable_conv2d.cuh runs, which one, and in what grid.
#include <algorithm>

#include "cuda/kernels/depthwise_separable_conv2d.cuh"

namespace fastconv::cuda {
namespace {

using namespace depthwise_separable;

constexpr int kSharedLimit = 96 * 1024;
constexpr const char* kOp = "depthwise_separable_conv2d_fprop";
constexpr int kPixelChoices[] = {128, 64};

int64_t padded_channels(const DepthwiseSeparableConv2dParams& p) {
  const int64_t depth = kDepthBytes / element_bytes(p.depthwise.dtype);
  return ceil_div(p.depthwise.channels, depth) * depth;
}

int64_t shared_bytes(const DepthwiseSeparableConv2dParams& p, int pixels) {
  return pixels * (padded_channels(p) * element_bytes(p.depthwise.dtype) + kChunkBytes) + kRingBytes;
}

// Channels whose filters fit where the ring will be
int64_t channels_at_once(const DepthwiseSeparableConv2dParams& p) {
  const int64_t words = int64_t{p.depthwise.filter_height} * p.depthwise.filter_width + 1;
  const int64_t fitting = kRingBytes / (words * 4) / 8 * 8;
  // A pass over 128 channels of 64 pixels has two items for every thread; more would not be faster.
  return std::min<int64_t>({fitting, padded_channels(p), 128});
}

bool has_fast_filter(const DepthwiseConv2dParams& d) {
  return d.dilation_width == 1 && d.filter_width == 3 && (d.stride_width == 1 || d.stride_width == 2);
}

std::string name_of(DType dtype, int pixels, bool fast) {
  return std::string(kOp) + (dtype == DType::kFloat32 ? "_nhwc_tf32" : "_nhwc") + (pixels == 128 ? "_128" : "_64") +
         (fast ? "_3x" : "");
}

bool fits(const DepthwiseSeparableConv2dParams& p, int pixels) {
  const DepthwiseConv2dParams& d = p.depthwise;
  const int bytes = element_bytes(d.dtype);
  const auto strides = [](const ImageStrides& s) { return s.n % 4 == 0 && s.h % 4 == 0 && s.w % 4 == 0; };
  return (bytes == 2 || p.tf32) && d.multiplier == 1 && d.channels * bytes % kChunkBytes == 0 && d.in.c == 1 &&
         strides(d.in) && is_aligned(d.input, 4 * bytes) && is_aligned(p.weight) && depthwise_conv2d_takes(d) &&
         channels_at_once(p) > 0 && shared_bytes(p, pixels) <= kSharedLimit;
}

int64_t tiles_of(const DepthwiseConv2dParams& d) {
  return int64_t{d.batch} * d.out_height * ceil_div(d.out_width, kTile);
}

// The pixels of a block, 0 for two kernels instead. Each block reads all of w2 from L2: the more channels, the more
// pixels it takes to make up for it.
int choose_pixels(const DepthwiseSeparableConv2dParams& p) {
  const int64_t blocks = ceil_div(tiles_of(p.depthwise) * kTile, 128);
  const bool few = blocks < p.depthwise.multiprocessors;
  if (!few && p.depthwise.channels <= 256 && fits(p, 128)) return 128;
  if ((few || p.depthwise.channels <= 128) && fits(p, 64)) return 64;
  return 0;
}

struct Choice {
  const KernelInfo* info = nullptr;
  int pixels = 0;
  bool fast = false;
};

Choice choose(const DepthwiseSeparableConv2dParams& p) {
  Choice choice{nullptr, choose_pixels(p), has_fast_filter(p.depthwise)};
  if (const char* forced = forced_kernel(kOp)) {
    const KernelInfo& info = find_kernel(depthwise_separable_conv2d_kernels(), forced);
    for (const int pixels : kPixelChoices) {
      for (const bool fast : {true, false}) {
        const bool matches = name_of(p.depthwise.dtype, pixels, fast) == forced;
        if (matches && fits(p, pixels) && (choice.fast || !fast)) return {&info, pixels, fast};
      }
    }
    throw std::runtime_error(std::string("fastconv: kernel ") + forced + " was forced, but needs " + info.needs);
  }
  if (choice.pixels > 0) {
    const std::string name = name_of(p.depthwise.dtype, choice.pixels, choice.fast);
    choice.info = &find_kernel(depthwise_separable_conv2d_kernels(), name.c_str());
  }
  return choice;
}

template <class T, int kPixels>
auto kernel_of(bool fast, int stride) {
  if (!fast) return &fprop_nhwc<T, kPixels, 0, 1>;
  return stride == 1 ? &fprop_nhwc<T, kPixels, 3, 1> : &fprop_nhwc<T, kPixels, 3, 2>;
}

}  // namespace

const std::vector<KernelInfo>& depthwise_separable_conv2d_kernels() {
  constexpr const char* kNeeds = "fp16 or bf16, channels a multiple of 8 and side by side, one filter for each";
  constexpr const char* kNeeds3 =
      "fp16 or bf16, channels a multiple of 8 and side by side, one filter 3 wide for each, no dilation, stride 1 or 2";
  constexpr const char* kTf32 = "float32 in TF32, channels a multiple of 4 and side by side, one filter for each";
  constexpr const char* kTf323 =
      "float32 in TF32, channels a multiple of 4 and side by side, one filter 3 wide for each, no dilation, stride 1 "
      "or 2";
  static const auto entry = [](const char* name, int pixels, int depth, const char* needs) {
    return KernelInfo{name, kOp, 80, {pixels, kColumns, depth}, kStages, kThreads, -1, needs};
  };
  static const std::vector<KernelInfo> kernels = {
      entry("depthwise_separable_conv2d_fprop_nhwc_128_3x", 128, kDepth<Half>, kNeeds3),
      entry("depthwise_separable_conv2d_fprop_nhwc_128", 128, kDepth<Half>, kNeeds),
      entry("depthwise_separable_conv2d_fprop_nhwc_64_3x", 64, kDepth<Half>, kNeeds3),
      entry("depthwise_separable_conv2d_fprop_nhwc_64", 64, kDepth<Half>, kNeeds),
      entry("depthwise_separable_conv2d_fprop_nhwc_tf32_128_3x", 128, kDepth<float>, kTf323),
      entry("depthwise_separable_conv2d_fprop_nhwc_tf32_128", 128, kDepth<float>, kTf32),
      entry("depthwise_separable_conv2d_fprop_nhwc_tf32_64_3x", 64, kDepth<float>, kTf323),
      entry("depthwise_separable_conv2d_fprop_nhwc_tf32_64", 64, kDepth<float>, kTf32),
  };
  return kernels;
}

bool depthwise_separable_conv2d_takes(const DepthwiseSeparableConv2dParams& params) {
  return choose(params).pixels > 0;
}

void depthwise_separable_conv2d_fprop(const DepthwiseSeparableConv2dParams& params, Stream stream) {
  DepthwiseSeparableConv2dParams p = params;
  DepthwiseConv2dParams& d = p.depthwise;
  const Choice choice = choose(p);
  d.row_tiles = static_cast<int>(ceil_div(d.out_width, kTile));
  d.tiles = static_cast<int>(tiles_of(d));
  d.rows_first = true;
  p.padded_channels = static_cast<int>(padded_channels(p));
  p.channels_at_once = static_cast<int>(channels_at_once(p));
  p.out_tiles = static_cast<int>(ceil_div(p.out_channels, kColumns));
  const ImageStrides& out = d.out;
  p.wide = out.c == 1 && p.out_channels % 8 == 0 && is_aligned(p.output) && out.n % 8 == 0 && out.h % 8 == 0 &&
           out.w % 8 == 0;
  const int64_t blocks = ceil_div(int64_t{d.tiles} * kTile, choice.pixels);
  const int64_t sharing = std::clamp<int64_t>(ceil_div(d.multiprocessors, blocks), 1, p.out_tiles);
  p.out_tiles_per_block = static_cast<int>(ceil_div(p.out_tiles, sharing));
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(ceil_div(p.out_tiles, p.out_tiles_per_block)));
  const auto run = [&](auto kernel) {
    launch(*choice.info, kernel, grid, dim3(kThreads), shared_bytes(p, choice.pixels), stream, p);
  };
  const auto with_type = [&](auto element) {
    using T = typename decltype(element)::Type;
    if (choice.pixels == 128) {
      run(kernel_of<T, 128>(choice.fast, d.stride_width));
    } else {
      run(kernel_of<T, 64>(choice.fast, d.stride_width));
    }
  };
  if (d.dtype == DType::kFloat16) {
    with_type(ElementType<Half>{});
  } else if (d.dtype == DType::kBFloat16) {
    with_type(ElementType<BFloat16>{});
  } else {
    with_type(ElementType<float>{});
  }
}

}  // namespace fastconv::cuda
