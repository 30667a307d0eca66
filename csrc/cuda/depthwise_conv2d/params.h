// What the kernels of depthwise convolutions take.
#pragma once

#include "cuda/runtime/divider.h"
#include "cuda/runtime/launcher.h"

namespace fastconv::cuda {

constexpr int kDepthwiseThreads = 256;  // of a block, at most
constexpr int kDepthwiseTile = 4;       // pixels of a row, to a thread
// wgrad's second kernel: channels and shares of the chunks to a block
constexpr int kDepthwiseSumX = 32, kDepthwiseSumY = 8;

// Channels of a thread in the kernels for vectors: 4, or what 16 bytes hold. With 8 of a 16-bit type a tile's sums,
// pixels and filters would not fit into the registers.
constexpr int lane_channels(DType dtype) { return dtype == DType::kFloat64 ? 2 : 4; }

// What lies side by side in the vectors that a kernel loads
enum class Vectors { kNone, kChannels, kPixels };

// What a thread of the kernels for strips owns: so many neighbouring channels and columns of the result, as many as its
// registers hold sums, filters and pixels of.
struct Strip {
  int channels, columns;
};
constexpr Strip strip_of(Pass pass, int element_bytes, Vectors vectors, int filter) {
  if (vectors == Vectors::kNone) return {1, 2};
  if (vectors == Vectors::kPixels) return {1, element_bytes == 8 ? 2 : 4};
  const bool wgrad = pass == Pass::kWgrad;
  const int columns = wgrad && element_bytes > 2 ? 2 : 4;
  if (filter == 3) return {element_bytes == 8 ? 2 : 4, columns};
  return {element_bytes == 8 ? 1 : element_bytes == 4 || wgrad ? 2 : 4, columns};
}
// Threads of a block of theirs, and blocks on a multiprocessor
constexpr int kStripThreads = 128;
constexpr int strip_resident(Pass pass, Vectors vectors, int filter, int stride) {
  const bool small = filter == 3, wgrad = pass == Pass::kWgrad, many_rows = wgrad && stride == 2;
  if (vectors == Vectors::kChannels) return many_rows || !(small || wgrad) ? 2 : 3;
  return many_rows ? (small ? 4 : 2) : wgrad ? (small ? 5 : 3) : small ? 6 : 5;
}

// One channel's convolution after the other: output channel k reads input channel k / multiplier.
struct DepthwiseConv2dParams {
  const void* input;        // fprop, wgrad
  const void* weight;       // fprop, dgrad: [channels * multiplier, R, S], dense
  const void* bias;         // fprop, may be null
  void* output;             // fprop
  const void* grad_output;  // dgrad, wgrad
  const void* activated;    // dgrad, wgrad: the forward's output in the layout of grad_output, null without activation
  void* grad_input;         // dgrad
  void* grad_weight;        // wgrad, may be null
  void* grad_bias;          // wgrad, may be null
  void* workspace;          // wgrad
  DType dtype;
  Activation activation;
  int batch, channels, multiplier, height, width;
  int filter_height, filter_width, out_height, out_width;
  int stride_height, stride_width, padding_height, padding_width, dilation_height, dilation_width;
  Strides in;   // of input or grad_input
  Strides out;  // of output, or of grad_output and activated

  // What the plan makes of it
  int chunks;       // wgrad: of tiles, each of which gives a partial sum
  int tiles;        // of pixels, over all images
  int row_tiles;    // of pixels along a row
  int row_shift;    // dgrad: where the first tile of a row begins, to the left of the row
  bool rows_first;  // whether neighbouring tiles lie below each other rather than side by side
  int tiles_per_chunk;

  // In the kernels for strips, whose number is `tiles`, with `row_tiles` of them side by side
  int first_row, rows;  // of the result; of dgrad's, with the padding, as many as the stride count as one
  int strips;           // from the top of an image to its bottom
  int strip_rows;       // of each, but for the last
  Divider by_row_tiles, by_strips;
};

}  // namespace fastconv::cuda
