// A depthwise convolution and the 1x1 convolution behind it, for fp16, bf16, and float32 in TF32:
//
//   h[n,c,p,q] = act1(b1[c] + sum over r,s of w1[c,r,s] x[n,c, p*stride + ..., ...])     rounded to the factors' type
//   y[n,k,p,q] = act2(b2[k] + sum over c of w2[k,c] h[n,c,p,q])
//
// A block owns kPixels pixels, as tiles of kTile in a row, and computes h for them into shared memory, all channels of
// it. Tensor cores then multiply it with w2, kColumns output channels after the other; w2 comes through a ring of
// kStages stages by cp.async. Where the pixels are few, several blocks share the output channels, and each has its own
// h.
//
// Shared memory: h [kPixels][channels + kChunk], the ring [kStages][kColumns][kDepth + kChunk]. The filters w1 lie
// where the ring will be, as many channels at once as fit. A chunk is 16 bytes; as the end of a row it puts the 8 rows
// that ldmatrix reads at once into different banks. ldmatrix moves two 16-bit elements to a lane, or one of TF32, which
// is where mma wants them.
//
// Warps: 4 along the pixels by 2 along the output channels.
//
// Needs channels that are whole chunks, side by side. Bound by memory (x and y once) for as many channels as the
// pixels of a block make up for the reading of w2; beyond that two kernels are better.
#include <algorithm>

#include "cuda/kernels/depthwise_conv2d.cuh"
#include "cuda/kernels/depthwise_separable_conv2d.h"
#include "cuda/ptx.cuh"

namespace fastconv::cuda {
namespace {

using namespace depthwise;

constexpr int kThreads = 256;
constexpr int kColumns = 64;
constexpr int kStages = 3;
constexpr int kChunkBytes = 16;
constexpr int kDepthBytes = 128;
constexpr int kPitchBytes = kDepthBytes + kChunkBytes;
constexpr int kStageBytes = kColumns * kPitchBytes;
constexpr int kRingBytes = kStages * kStageBytes;
template <class T>
constexpr int kChunk = kChunkBytes / static_cast<int>(sizeof(T));
template <class T>
constexpr int kDepth = kDepthBytes / static_cast<int>(sizeof(T));
constexpr int kSharedLimit = 96 * 1024;
constexpr int kWarpsM = 4, kWarpsN = 2;
constexpr int kWarpColumns = kColumns / kWarpsN;
static_assert(kWarpsM * kWarpsN * 32 == kThreads);
static_assert(kWarpColumns == 32, "a warp's four fragments are turned into 16 bytes for each lane");

// As the tensor cores read it
FASTCONV_DEVICE float to_factor(float v) { return __uint_as_float(ptx::to_tf32(v)); }

// ----------------------------------------------------------------------------------------- the depthwise tile

template <class T, int kPixels, int kFilter, int kStride>
FASTCONV_DEVICE void compute_hidden(const DepthwiseSeparableConv2dParams& p, T* hidden, float* filters) {
  constexpr int kTiles = kPixels / kTile, kWidth = kLane<T>;
  const DepthwiseConv2dParams& d = p.depthwise;
  const int pitch = p.padded_channels + kChunk<T>;
  for (int first = 0; first < p.padded_channels; first += p.channels_at_once) {
    const int rest = p.padded_channels - first;
    const int count = rest < p.channels_at_once ? rest : p.channels_at_once;
    __syncthreads();  // the filters before are done with
    fill_filters<T>(filters, d, first, count);
    __syncthreads();
    const int lanes = count / kWidth;
    for (int item = threadIdx.x; item < lanes * kTiles; item += kThreads) {
      const int local = item / lanes, lane = (item - local * lanes) * kWidth, channel = first + lane;
      const int64_t tile = int64_t{blockIdx.x} * kTiles + local;
      float sums[kTile][kWidth];
      int pixels = 0;  // that exist; what lies beyond, and channels of the padding, must be 0 and not NaN
      if (tile < d.tiles && channel < d.channels) {
        const TilePosition at(static_cast<unsigned>(tile), d.out_height, d);
        convolve_tile<kFilter, kStride>(d, static_cast<const T*>(d.input) + channel, filters + lane, count, at, sums);
        pixels = d.out_width - at.column * kTile;
      }
#pragma unroll
      for (int q = 0; q < kTile; ++q) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          sums[q][i] = q < pixels ? activate(sums[q][i], d.activation) : 0.0f;
          if constexpr (sizeof(T) == 4) sums[q][i] = to_factor(sums[q][i]);
        }
        store_narrow(hidden + (local * kTile + q) * pitch + channel, sums[q]);
      }
    }
  }
  __syncthreads();
}

// -------------------------------------------------------------------------------------------- the pointwise part

// The stage `step` of w2: kColumns rows of kDepth<T> channels, zeros beyond the matrix
template <class T>
FASTCONV_DEVICE void issue_stage(const DepthwiseSeparableConv2dParams& p, uint32_t ring, int step, int steps,
                                 int depth_steps) {
  if (step < steps) {
    const T* weight = static_cast<const T*>(p.weight);
    const int channels = p.depthwise.channels;
    const int column0 = (static_cast<int>(blockIdx.y) * p.out_tiles_per_block + step / depth_steps) * kColumns;
    const int depth0 = step % depth_steps * kDepth<T>;
    const uint32_t stage = ring + step % kStages * kStageBytes;
    constexpr int kChunks = kDepthBytes / kChunkBytes;
#pragma unroll
    for (int i = 0; i < kColumns * kChunks / kThreads; ++i) {
      const int chunk = static_cast<int>(threadIdx.x) + i * kThreads;
      const int row = chunk / kChunks, at = chunk % kChunks * kChunk<T>;
      const bool exists = column0 + row < p.out_channels && depth0 + at < channels;
      const T* source = exists ? weight + int64_t{column0 + row} * channels + depth0 + at : weight;
      ptx::cp_async<kChunkBytes>(stage + row * kPitchBytes + chunk % kChunks * kChunkBytes, source, exists);
    }
  }
  ptx::cp_async_commit();  // also an empty group: the count of groups tells which have landed
}

// sums += a 16x16 tile of h times a 16x8 one of w2, or for TF32 half as deep
template <class T>
FASTCONV_DEVICE void multiply(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (sizeof(T) == 4) {
    ptx::mma_m16n8k8_tf32(sums, a, b);
  } else {
    ptx::mma_m16n8k16<T>(sums, a, b);
  }
}

// Turns the columns of four neighbouring fragments round among the four lanes of a row: lane t gets all 8 columns of
// fragment t.
FASTCONV_DEVICE void transpose_lanes(uint32_t (&v)[4], int t) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = t & bit;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j & bit) continue;
      const uint32_t other = __shfl_xor_sync(0xffffffffu, upper ? v[j] : v[j | bit], bit);
      if (upper) {
        v[j] = other;
      } else {
        v[j | bit] = other;
      }
    }
  }
}

// A lane's results of one row: columns 8n + 2t and the next from `column0`, for n < 4. The offset is -1 for a row that
// does not exist.
template <class T>
FASTCONV_DEVICE void store_row(const DepthwiseSeparableConv2dParams& p, int64_t offset, int column0, int t,
                               const float (&values)[4][2]) {
  T* output = static_cast<T*>(p.output) + offset;
  if constexpr (sizeof(T) == 2) {
    if (p.wide) {
      uint32_t packed[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) packed[n] = pack2<T>(values[n][0], values[n][1]);
      transpose_lanes(packed, t);
      const int k = column0 + 8 * t;
      if (offset >= 0 && k < p.out_channels) {
        const Vec<uint32_t, 4> vec = {{packed[0], packed[1], packed[2], packed[3]}};
        store(reinterpret_cast<uint32_t*>(output + k), vec);
      }
      return;
    }
  }
  if (offset < 0) return;
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const int k = column0 + 8 * n + 2 * t;
    if (p.wide) {
      if (k < p.out_channels) store(output + k, Vec<T, 2>{{from_float<T>(values[n][0]), from_float<T>(values[n][1])}});
      continue;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (k + i < p.out_channels) output[(k + i) * p.depthwise.out.c] = from_float<T>(values[n][i]);
    }
  }
}

template <class T, int kPixels, int kFilter, int kStride>
FASTCONV_KERNEL(kThreads, 2)
fprop_nhwc(const DepthwiseSeparableConv2dParams p) {
  constexpr int kRows = kPixels / kWarpsM, kFragments = kRows / 16;  // of a warp
  const DepthwiseConv2dParams& d = p.depthwise;
  const int pitch = p.padded_channels + kChunk<T>, pitch_bytes = pitch * static_cast<int>(sizeof(T));
  T* hidden = dynamic_smem<T>();
  T* ring = hidden + kPixels * pitch;
  compute_hidden<T, kPixels, kFilter, kStride>(p, hidden, reinterpret_cast<float*>(ring));

  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int group = lane / 4, t = lane % 4;
  const int warp_row = warp / kWarpsN * kRows, warp_column = warp % kWarpsN * kWarpColumns;

  // Where this lane's rows of the result lie, -1 for pixels that do not exist
  int64_t offsets[kFragments][2];
#pragma unroll
  for (int m = 0; m < kFragments; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int pixel = warp_row + 16 * m + 8 * half + group;
      const int64_t tile = int64_t{blockIdx.x} * (kPixels / kTile) + pixel / kTile;
      offsets[m][half] = -1;
      if (tile < d.tiles) {
        const TilePosition at(static_cast<unsigned>(tile), d.out_height, d);
        const int q = at.column * kTile + pixel % kTile;
        if (q < d.out_width) offsets[m][half] = at.n * d.out.n + at.row * d.out.h + q * d.out.w;
      }
    }
  }

  const int depth_steps = p.padded_channels / kDepth<T>;
  const int first_tile = static_cast<int>(blockIdx.y) * p.out_tiles_per_block;
  const int own_tiles =
      p.out_tiles - first_tile < p.out_tiles_per_block ? p.out_tiles - first_tile : p.out_tiles_per_block;
  const int steps = own_tiles * depth_steps;
  const uint32_t ring_address = ptx::smem_address(ring);
  // Rows and columns of the fragments that this lane points ldmatrix to
  const uint32_t a_address = ptx::smem_address(hidden) + (warp_row + lane % 16) * pitch_bytes + lane / 16 * kChunkBytes;
  const uint32_t b_offset = (warp_column + lane / 16 * 8 + lane % 8) * kPitchBytes + lane / 8 % 2 * kChunkBytes;

#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) issue_stage<T>(p, ring_address, stage, steps, depth_steps);

  float sums[kFragments][4][4];
  for (int step = 0; step < steps; ++step) {
    const int depth_step = step % depth_steps;
    if (depth_step == 0) {
#pragma unroll
      for (int m = 0; m < kFragments; ++m) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[m][n][i] = 0.0f;
        }
      }
    }
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();  // the stage has landed for all, and the one before is free for the next copy
    issue_stage<T>(p, ring_address, step + kStages - 1, steps, depth_steps);

    const uint32_t stage = ring_address + step % kStages * kStageBytes;
#pragma unroll
    for (int k = 0; k < kDepthBytes; k += 2 * kChunkBytes) {
      uint32_t a[kFragments][4], b[2][4];
#pragma unroll
      for (int m = 0; m < kFragments; ++m) {
        ptx::ldmatrix_x4(a[m], a_address + 16 * m * pitch_bytes + depth_step * kDepthBytes + k);
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        ptx::ldmatrix_x4(b[n], stage + b_offset + 16 * n * kPitchBytes + k);
        if constexpr (sizeof(T) == 4) {
#pragma unroll
          for (int i = 0; i < 4; ++i) b[n][i] = ptx::to_tf32(__uint_as_float(b[n][i]));
        }
      }
#pragma unroll
      for (int m = 0; m < kFragments; ++m) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const uint32_t column[2] = {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]};
          multiply<T>(sums[m][n], a[m], column);
        }
      }
    }
    if (depth_step + 1 < depth_steps) continue;

    const int column0 = (first_tile + step / depth_steps) * kColumns + warp_column;
    const T* bias = static_cast<const T*>(p.bias);
    float biases[4][2];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int k = column0 + 8 * n + 2 * t + i;
        biases[n][i] = bias && k < p.out_channels ? to_float(bias[k]) : 0.0f;
      }
    }
#pragma unroll
    for (int m = 0; m < kFragments; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float values[4][2];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) values[n][i] = activate(sums[m][n][2 * half + i] + biases[n][i], p.activation);
        }
        store_row<T>(p, offsets[m][half], column0, t, values);
      }
    }
  }
  ptx::cp_async_wait<0>();
}

// ------------------------------------------------------------------------------------------------- heuristics

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
