// Depthwise convolution and its gradients; letters as in fastconv/ops/_conv.py:
//
//   fprop  y[n,k,p,q]  = act(b[k] + sum over r,s of w[k,r,s] x[n,c, p*stride + r*dilation - padding, ...]), c = k / M
//   dgrad  dx[n,c,h,w] = sum over k of c, r, s of w[k,r,s] dz[n,k,p,q], where (p,q) reads (h,w) through (r,s)
//   wgrad  dw[k,r,s]   = sum over n,p,q of dz[n,k,p,q] x[n,c,...]     db[k] = sum over n,p,q of dz[n,k,p,q]
//
// where dz is dy behind the activation's mask. A block is x lanes of channels (a vector of 16 bytes each, or one
// element) by y lanes of tiles; a tile is kTile pixels of a row. A loaded vector serves all pixels of the tile that it
// belongs to, and the rows that tiles below each other share come from L1. Filters lie in shared memory, as
// [tap][channel] in the type of computation, the bias behind them.
//
//   nhwc  vectors of channels: x lanes run along memory. One filter per channel.
//   any   single elements, any strides: of NCHW a block has one channel, and y lanes run along the row.
//
// Either comes for 3- and 5-wide filters with stride 1 or 2, whose rows of filter and pixels stay in registers, and for
// any filter, stride and dilation.
//
// wgrad: a block has one row of the filter (one tap, of any filter), a channel lane its sums over a chunk of the tiles;
// partial sums go to a workspace [chunk][tap, bias][k], which a second kernel adds up: always in the same order.
//
// Bound by memory: x and y (or dy, y and dx) once.
#include <algorithm>

#include "cuda/kernels/depthwise_conv2d.cuh"
#include "cuda/kernels/depthwise_conv2d.h"

namespace fastconv::cuda {
namespace {

using namespace depthwise;

constexpr int kThreads = 256;
constexpr int kSharedLimit = 96 * 1024;  // what every device of sm_80 and later has
constexpr int kSharedGoal = 32 * 1024;   // leaves L1 to the pixels
constexpr int kMaxChannelBlocks = 65535;

// dy where the activation let y through, else 0; zeros where there is none
template <class T, int kWidth>
FASTCONV_DEVICE void load_masked(const DepthwiseConv2dParams& p, bool exists, int64_t offset,
                                 Compute<T> (&grad)[kWidth]) {
  load_wide_if(exists, static_cast<const T*>(p.grad_output) + offset, grad);
  if (p.activated) {
    Compute<T> output[kWidth];
    load_wide_if(exists, static_cast<const T*>(p.activated) + offset, output);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) grad[i] = passes_gradient(output[i], p.activation) ? grad[i] : Compute<T>(0);
  }
}

// ---------------------------------------------------------------------------------------------- fprop

template <class T, int kWidth, int kFilter, int kStride>
FASTCONV_KERNEL(kThreads, 2)
fprop(const DepthwiseConv2dParams p) {
  using A = Compute<T>;
  A* filters = dynamic_smem<A>();
  const int count = static_cast<int>(blockDim.x) * kWidth;
  const int64_t first = int64_t{blockIdx.y} * count;
  fill_filters<T>(filters, p, first, count);
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x) * kWidth;
  const int64_t k = first + lane;
  if (k >= int64_t{p.channels} * p.multiplier) return;
  const T* input = static_cast<const T*>(p.input) + (kWidth > 1 ? k : k / p.multiplier) * p.in.c;
  T* output = static_cast<T*>(p.output) + k * p.out.c;
  filters += lane;

  for (int64_t tile = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; tile < p.tiles;
       tile += int64_t{gridDim.x} * blockDim.y) {
    const TilePosition at(static_cast<unsigned>(tile), p.out_height, p);
    const int q0 = at.column * kTile;
    A sums[kTile][kWidth];
    convolve_tile<kFilter, kStride>(p, input, filters, count, at, sums);

    T* out_row = output + at.n * p.out.n + at.row * p.out.h;
#pragma unroll
    for (int q = 0; q < kTile; ++q) {
      if (q0 + q >= p.out_width) break;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sums[q][i] = activate(sums[q][i], p.activation);
      store_narrow(out_row + (q0 + q) * p.out.w, sums[q]);
    }
  }
}

// ---------------------------------------------------------------------------------------------- dgrad

// Tiles are of the input's pixels. With kFilter they begin where (w + padding) is a multiple of the stride, so that it
// is known which tap joins which two pixels.
template <class T, int kWidth, int kFilter, int kStride>
FASTCONV_KERNEL(kThreads, 2)
dgrad(const DepthwiseConv2dParams p) {
  using A = Compute<T>;
  A* filters = dynamic_smem<A>();
  const int multiplier = kWidth > 1 ? 1 : p.multiplier;
  const int count = static_cast<int>(blockDim.x) * kWidth * multiplier;
  const int64_t first = int64_t{blockIdx.y} * count;
  fill_filters<T>(filters, p, first, count);
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x) * kWidth;
  const int64_t c = int64_t{blockIdx.y} * blockDim.x * kWidth + lane;
  if (c >= p.channels) return;
  T* grad_input = static_cast<T*>(p.grad_input) + c * p.in.c;
  filters += lane * multiplier;

  for (int64_t tile = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; tile < p.tiles;
       tile += int64_t{gridDim.x} * blockDim.y) {
    const TilePosition at(static_cast<unsigned>(tile), p.height, p);
    const int w0 = at.column * kTile - p.row_shift;
    A sums[kTile][kWidth];
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sums[i][j] = 0;
    }
    for (int m = 0; m < multiplier; ++m) {
      const int64_t image = at.n * p.out.n + (c * multiplier + m) * p.out.c;
      for (int r = 0; r < p.filter_height; ++r) {
        const int above = at.row + p.padding_height - r * p.dilation_height;
        const int row = above / p.stride_height;
        if (above < 0 || row * p.stride_height != above || row >= p.out_height) continue;
        const int64_t out_row = image + row * p.out.h;
        const A* row_filters = filters + r * p.filter_width * count + m;
        if constexpr (kFilter > 0) {
          A taps[kFilter][kWidth];
#pragma unroll
          for (int s = 0; s < kFilter; ++s) copy(row_filters + s * count, taps[s]);
          const int base = (w0 + p.padding_width) / kStride;  // exact
#pragma unroll
          for (int j = -((kFilter - 1) / kStride); j <= (kTile - 1) / kStride; ++j) {
            const int q = base + j;
            A grad[kWidth];
            load_masked<T>(p, q >= 0 && q < p.out_width, out_row + q * p.out.w, grad);
#pragma unroll
            for (int i = 0; i < kTile; ++i) {
              const int s = i - j * kStride;
              if (s >= 0 && s < kFilter) multiply_add(grad, taps[s], sums[i]);
            }
          }
        } else {
          for (int s = 0; s < p.filter_width; ++s) {
            A tap[kWidth];
            copy(row_filters + s * count, tap);
#pragma unroll
            for (int i = 0; i < kTile; ++i) {
              const int before = w0 + i + p.padding_width - s * p.dilation_width;
              const int q = before / p.stride_width;
              if (before < 0 || q * p.stride_width != before || q >= p.out_width) continue;
              A grad[kWidth];
              load_masked<T>(p, true, out_row + q * p.out.w, grad);
              multiply_add(grad, tap, sums[i]);
            }
          }
        }
      }
    }
    T* in_row = grad_input + at.n * p.in.n + at.row * p.in.h;
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      if (w0 + i >= 0 && w0 + i < p.width) store_narrow(in_row + (w0 + i) * p.in.w, sums[i]);
    }
  }
}

// ---------------------------------------------------------------------------------------------- wgrad

// The sum over the block's y lanes, in lane 0
template <class A, int kWidth>
FASTCONV_DEVICE void sum_lanes(A* memory, A (&values)[kWidth]) {
  // Vectors lie an x lane apart, so that neighbours use neighbouring banks.
  const int x = static_cast<int>(threadIdx.x), lanes = static_cast<int>(blockDim.x);
  const int y = static_cast<int>(threadIdx.y);
  A* own = memory + y * lanes * kWidth + x;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) own[i * lanes] = values[i];
  __syncthreads();
  for (int rows = static_cast<int>(blockDim.y); rows > 1; rows = (rows + 1) / 2) {
    const int half = (rows + 1) / 2;
    if (y + half < rows) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) own[i * lanes] += own[i * lanes + half * lanes * kWidth];
    }
    __syncthreads();
  }
  if (y == 0) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[i] = own[i * lanes];
  }
  __syncthreads();
}

template <class T, int kWidth, int kFilter, int kStride>
FASTCONV_KERNEL(kThreads, 2)
wgrad(const DepthwiseConv2dParams p) {
  using A = Compute<T>;
  constexpr int kSums = kFilter > 0 ? kFilter : 1;
  const int taps = p.filter_height * p.filter_width, all = p.channels * p.multiplier;
  // Blocks of one chunk are neighbours: what one reads, the others find in L2.
  const int parts = kFilter > 0 ? p.filter_height : taps;
  const int chunk = static_cast<int>(blockIdx.x) / parts, part = static_cast<int>(blockIdx.x) - chunk * parts;
  const int r = kFilter > 0 ? part : part / p.filter_width, s0 = kFilter > 0 ? 0 : part - r * p.filter_width;
  const int k = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x) * kWidth;
  A sums[kSums][kWidth], bias_sums[kWidth];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    bias_sums[i] = 0;
#pragma unroll
    for (int s = 0; s < kSums; ++s) sums[s][i] = 0;
  }

  if (k < all) {
    const T* input = static_cast<const T*>(p.input) + int64_t{kWidth > 1 ? k : k / p.multiplier} * p.in.c;
    const int64_t begin = int64_t{chunk} * p.tiles_per_chunk;
    const int64_t end = begin + p.tiles_per_chunk < p.tiles ? begin + p.tiles_per_chunk : p.tiles;
    for (int64_t tile = begin + threadIdx.y; tile < end; tile += blockDim.y) {
      const TilePosition at(static_cast<unsigned>(tile), p.out_height, p);
      const int q0 = at.column * kTile;
      const int64_t out_row = at.n * p.out.n + k * p.out.c + at.row * p.out.h;
      A grad[kTile][kWidth];
#pragma unroll
      for (int q = 0; q < kTile; ++q) {
        load_masked<T>(p, q0 + q < p.out_width, out_row + (q0 + q) * p.out.w, grad[q]);
        if (part == 0) {
#pragma unroll
          for (int i = 0; i < kWidth; ++i) bias_sums[i] += grad[q][i];
        }
      }
      const int h = at.row * p.stride_height - p.padding_height + r * p.dilation_height;
      if (h < 0 || h >= p.height) continue;
      const T* row = input + at.n * p.in.n + h * p.in.h;
      if constexpr (kFilter > 0) {
        const int left = q0 * kStride - p.padding_width;
#pragma unroll
        for (int j = 0; j < (kTile - 1) * kStride + kFilter; ++j) {
          const int w = left + j;
          A pixel[kWidth];
          load_wide_if(w >= 0 && w < p.width, row + w * p.in.w, pixel);
#pragma unroll
          for (int q = 0; q < kTile; ++q) {
            const int s = j - q * kStride;
            // A gradient of 0 beyond the row's end would not do: the pixel may be Inf.
            if (s >= 0 && s < kFilter && q0 + q < p.out_width) multiply_add(pixel, grad[q], sums[s]);
          }
        }
      } else {
#pragma unroll
        for (int q = 0; q < kTile; ++q) {
          const int w = (q0 + q) * p.stride_width - p.padding_width + s0 * p.dilation_width;
          if (q0 + q >= p.out_width || w < 0 || w >= p.width) continue;
          A pixel[kWidth];
          load_wide(row + w * p.in.w, pixel);
          multiply_add(pixel, grad[q], sums[0]);
        }
      }
    }
  }

  A* memory = dynamic_smem<A>();
  A* partial = static_cast<A*>(p.workspace) + int64_t{chunk} * (taps + 1) * all;
  const auto write = [&](int tap, A(&values)[kWidth]) {
    sum_lanes(memory, values);
    if (threadIdx.y != 0 || k >= all) return;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) partial[int64_t{tap} * all + k + i] = values[i];
  };
#pragma unroll
  for (int s = 0; s < kSums; ++s) write(r * p.filter_width + s0 + s, sums[s]);
  if (part == 0) write(taps, bias_sums);
}

// Adds up the chunks: a block has 32 neighbouring channels of a tap, its y lanes share the chunks.
constexpr int kSumX = 32, kSumY = 8;

template <class T>
FASTCONV_KERNEL(kSumX* kSumY, 4)
wgrad_sum(const DepthwiseConv2dParams p) {
  using A = Compute<T>;
  const int taps = p.filter_height * p.filter_width, all = p.channels * p.multiplier;
  const int tap = static_cast<int>(blockIdx.x) % (taps + 1);
  const int k = static_cast<int>(blockIdx.x) / (taps + 1) * kSumX + static_cast<int>(threadIdx.x);
  A sum[1] = {0};
  if (k < all) {
    const A* partial = static_cast<const A*>(p.workspace) + int64_t{tap} * all + k;
#pragma unroll 4
    for (int chunk = threadIdx.y; chunk < p.chunks; chunk += kSumY)
      sum[0] += partial[int64_t{chunk} * (taps + 1) * all];
  }
  sum_lanes(dynamic_smem<A>(), sum);
  if (threadIdx.y != 0 || k >= all) return;
  if (tap < taps) {
    if (p.grad_weight) static_cast<T*>(p.grad_weight)[int64_t{k} * taps + tap] = narrow<T>(sum[0]);
  } else if (p.grad_bias) {
    static_cast<T*>(p.grad_bias)[k] = narrow<T>(sum[0]);
  }
}

// ------------------------------------------------------------------------------------------ heuristics

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
