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
#pragma once

#include "cuda/depthwise_conv2d/sm80/tile.cuh"
#include "cuda/depthwise_separable_conv2d/params.h"
#include "cuda/ptx/sm80.cuh"
#include "cuda/runtime/divider.cuh"

namespace fastconv::cuda::inline sm80::depthwise_separable {

using namespace depthwise;

constexpr int kThreads = 256;
constexpr int kColumns = kSeparableColumns;
constexpr int kStages = kSeparableStages;
constexpr int kChunkBytes = kSeparableChunkBytes;
constexpr int kDepthBytes = kSeparableDepthBytes;
constexpr int kPitchBytes = kDepthBytes + kChunkBytes;
constexpr int kStageBytes = kColumns * kPitchBytes;
static_assert(kStages * kStageBytes == kSeparableRingBytes);
template <class T>
constexpr int kChunk = kChunkBytes / static_cast<int>(sizeof(T));
template <class T>
constexpr int kDepth = kDepthBytes / static_cast<int>(sizeof(T));
constexpr int kWarpsM = 4, kWarpsN = 2;
constexpr int kWarpColumns = kColumns / kWarpsN;
static_assert(kWarpsM * kWarpsN * 32 == kThreads);
static_assert(kWarpColumns == 32, "a warp's four fragments are turned into 16 bytes for each lane");

// As the tensor cores read it
FASTCONV_DEVICE float to_factor(float v) { return __uint_as_float(ptx::to_tf32(v)); }

// ----------------------------------------------------------------------------------------- the depthwise tile

// A tile of pixels by its number, of those that lie below each other first
FASTCONV_DEVICE TilePosition tile_position(const DepthwiseSeparableConv2dParams& p, int tile) {
  TilePosition at(0, 1, p.depthwise);
  at.n = divide(p.by_row_tiles, divide(p.by_rows, tile, at.row), at.column);
  return at;
}

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
    const Divider& by_lanes = count == p.channels_at_once ? p.by_lanes : p.by_last_lanes;
    const int items = count / kWidth * kTiles;
    for (int item = threadIdx.x; item < items; item += kThreads) {
      int lane;
      const int local = divide(by_lanes, item, lane);
      lane *= kWidth;
      const int channel = first + lane;
      const int64_t tile = int64_t{blockIdx.x} * kTiles + local;
      float sums[kTile][kWidth];
      int pixels = 0;  // that exist; what lies beyond, and channels of the padding, must be 0 and not NaN
      if (tile < d.tiles && channel < d.channels) {
        const TilePosition at = tile_position(p, static_cast<int>(tile));
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

// The next stage of the ring, which goes round
FASTCONV_DEVICE void advance(uint32_t& stage, uint32_t ring) {
  stage = stage == ring + (kStages - 1) * kStageBytes ? ring : stage + kStageBytes;
}

// Brings w2 into the ring, a stage at a time: kColumns rows of kDepth<T> channels, zeros beyond the matrix. The depth
// runs fastest, then the tiles of output channels.
template <class T>
struct WeightLoader {
  static constexpr int kChunks = kDepthBytes / kChunkBytes, kRows = kThreads / kChunks;  // of a row; at once

  FASTCONV_DEVICE WeightLoader(const DepthwiseSeparableConv2dParams& p, uint32_t ring, int first_tile, int tiles)
      : ring(ring), stage(ring), tiles(tiles) {
    const int thread = static_cast<int>(threadIdx.x), row = thread / kChunks, chunk = thread % kChunks;
    offset = row * kPitchBytes + chunk * kChunkBytes;
    column = first_tile * kColumns + row;
    depth = chunk * kChunk<T>;
    source = static_cast<const T*>(p.weight) + int64_t{column} * p.depthwise.channels + depth;
    depth_end = p.padded_channels;
  }

  FASTCONV_DEVICE void issue(const DepthwiseSeparableConv2dParams& p) {
    if (tiles > 0) {
      const int channels = p.depthwise.channels;
#pragma unroll
      for (int row = 0; row < kColumns; row += kRows) {
        const bool exists = depth < channels && column + row < p.out_channels;
        const void* from = exists ? source + int64_t{row} * channels : p.weight;
        ptx::cp_async<kChunkBytes>(stage + offset + row * kPitchBytes, from, exists);
      }
      advance(stage, ring);
      depth += kDepth<T>;
      source += kDepth<T>;
      if (depth >= depth_end) {
        depth -= depth_end;
        source += int64_t{kColumns} * channels - depth_end;
        column += kColumns;
        --tiles;
      }
    }
    ptx::cp_async_commit();  // also an empty group: the count of groups tells which have landed
  }

  uint32_t ring, stage, offset;  // in shared memory; the offset is that of this thread's first chunk
  const T* source;               // of that chunk, whose output channel is `column` and whose channel `depth`
  int column, depth, depth_end;
  int tiles;  // that remain
};

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
        const TilePosition at = tile_position(p, static_cast<int>(tile));
        const int q = at.column * kTile + pixel % kTile;
        if (q < d.out_width) offsets[m][half] = at.n * d.out.n + at.row * d.out.h + q * d.out.w;
      }
    }
  }

  const int depth_steps = p.padded_channels / kDepth<T>;
  const int first_tile = static_cast<int>(blockIdx.y) * p.out_tiles_per_block;
  const int own_tiles =
      p.out_tiles - first_tile < p.out_tiles_per_block ? p.out_tiles - first_tile : p.out_tiles_per_block;
  const uint32_t ring_address = ptx::smem_address(ring);
  // Rows and columns of the fragments that this lane points ldmatrix to
  const uint32_t a_address = ptx::smem_address(hidden) + (warp_row + lane % 16) * pitch_bytes + lane / 16 * kChunkBytes;
  const uint32_t b_offset = (warp_column + lane / 16 * 8 + lane % 8) * kPitchBytes + lane / 8 % 2 * kChunkBytes;

  WeightLoader<T> loader(p, ring_address, first_tile, own_tiles);
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) loader.issue(p);

  uint32_t stage = ring_address;
  for (int tile = 0; tile < own_tiles; ++tile) {
    float sums[kFragments][4][4] = {};
    uint32_t a_step = a_address;
    for (int depth_step = 0; depth_step < depth_steps; ++depth_step) {
      ptx::cp_async_wait<kStages - 2>();
      __syncthreads();  // the stage has landed for all, and the one before is free for the next copy
      loader.issue(p);
#pragma unroll
      for (int k = 0; k < kDepthBytes; k += 2 * kChunkBytes) {
        uint32_t a[kFragments][4], b[2][4];
#pragma unroll
        for (int m = 0; m < kFragments; ++m) ptx::ldmatrix_x4(a[m], a_step + 16 * m * pitch_bytes + k);
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
      a_step += kDepthBytes;
      advance(stage, ring_address);
    }

    const int column0 = (first_tile + tile) * kColumns + warp_column;
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

}  // namespace fastconv::cuda::inline sm80::depthwise_separable
