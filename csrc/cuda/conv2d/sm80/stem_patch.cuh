// The patch of an image that 16 x 16 pixels of the result of its first convolution meet, in shared memory. An image of
// three channels has no vectors: it is brought element by element, once, as pixels of four channels. There windows of
// the patch are rows of a GEMM's operand: four taps of a filter's row are 32 bytes that lie side by side, and those of
// the next pixel begin `stride` pixels further. No tap is copied.
//
// ldmatrix wants rows that begin at a multiple of 16 bytes, and the banks want eight rows to follow each other:
//
//   stride 2   a row of the patch lies as it is
//   stride 4   the even pairs of pixels lie before the odd ones: of four taps each half finds its two
//   stride 1   a row lies there twice, the second time from its second pixel on, for the odd pixels of the result
#pragma once

#include "cuda/conv2d/stem.h"
#include "cuda/runtime/divider.cuh"
#include "cuda/runtime/launch.cuh"

namespace fastconv::cuda::inline sm80 {

// Which tile of which image
struct StemTile {
  int n, row, column;  // pixel
};
FASTCONV_DEVICE StemTile stem_tile(const StemParams& p, int index) {
  const Pixel tile = pixel_at(p.by_tiles, p.by_tile_columns, index);
  return {tile.n, tile.row * kStemRows, tile.column * kStemColumns};
}

template <class T>
FASTCONV_DEVICE Vec<T, kStemChannels> channels_of(const T* first, int64_t stride, int channels, bool exists) {
  Vec<T, kStemChannels> found{};
#pragma unroll
  for (int c = 0; c < kStemChannels; ++c) {
    if (exists && c < channels) found.v[c] = first[c * stride];
  }
  return found;
}

template <class T, int kStride>
FASTCONV_DEVICE void put_stem_pixel(const StemParams& p, unsigned char* patch, int row, int column,
                                    const Vec<T, kStemChannels>& pixel) {
  constexpr int kBytes = kStemChannels * 2;
  const auto put = [&](int at) { store(reinterpret_cast<T*>(patch + row * p.row_pitch + at), pixel); };
  if constexpr (kStride == 4) {
    const int pair = column / 2;
    put(pair % 2 * p.half_pitch + pair / 2 * 16 + column % 2 * kBytes);
  } else {
    put(column * kBytes);
    if (kStride == 1 && column > 0) put(p.half_pitch + (column - 1) * kBytes);
  }
}

template <class T, int kStride>
FASTCONV_DEVICE void bring_stem_patch(const StemParams& p, unsigned char* patch, const StemTile& tile) {
  constexpr int kAtOnce = 4;
  const int first_h = tile.row * p.stride_h - p.pad_h, first_w = tile.column * kStride - p.pad_w;
  const T* const image = static_cast<const T*>(p.image) + tile.n * p.x.n;
  const int all = p.patch_rows * p.patch_columns;
#pragma unroll 1
  for (int first = static_cast<int>(threadIdx.x); first < all; first += kAtOnce * kStemThreads) {
    Vec<T, kStemChannels> pixels[kAtOnce];
    int rows[kAtOnce], columns[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      rows[i] = divide(p.by_patch_columns, first + i * kStemThreads, columns[i]);
      const int h = first_h + rows[i], w = first_w + columns[i];
      const bool exists = rows[i] < p.patch_rows && static_cast<unsigned>(h) < static_cast<unsigned>(p.h) &&
                          static_cast<unsigned>(w) < static_cast<unsigned>(p.w);
      pixels[i] = channels_of(image + (h * p.x.h + w * p.x.w), p.x.c, p.c, exists);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (rows[i] < p.patch_rows) put_stem_pixel<T, kStride>(p, patch, rows[i], columns[i], pixels[i]);
    }
  }
}

// Where a lane finds its row of the first step's matrices, see ldmatrix: pixel `lane % 16` of a row of the result, and
// the first or the second two of four taps
template <int kStride>
FASTCONV_DEVICE int stem_row_of_lane(const StemParams& p, int lane) {
  const int column = lane % 16, half = lane / 16;
  if constexpr (kStride == 4) return half * p.half_pitch + column * 16;
  if constexpr (kStride == 2) return column * 16 + half * 16;
  return column % 2 * p.half_pitch + column / 2 * 16 + half * 16;
}

// From a window to that of the next four taps
template <int kStride>
constexpr int kStemStep = kStride == 4 ? 16 : 32;

}  // namespace fastconv::cuda::inline sm80
