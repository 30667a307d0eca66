// A network's first convolution, of an image of at most four channels, as sm80/stem.cuh computes it and
// sm80/stem_wgrad.cuh the gradient of its weight: from image and weight as the caller has them, whatever their strides,
// so that nothing is packed before.
#pragma once

#include "cuda/conv2d/params.h"
#include "cuda/runtime/device_info.h"

namespace fastconv::cuda {

// Pixels of the result that a block computes at once, by so many threads
constexpr int kStemRows = 16, kStemColumns = 16, kStemThreads = 128;
// On a multiprocessor, that the registers allow
constexpr int stem_blocks(int filters) { return filters > 32 ? 2 : 3; }
// Four taps of a filter's row, of four channels each, are the depth of a product.
constexpr int kStemTaps = 4, kStemChannels = 4;
constexpr int kStemPixels = kStemRows * kStemColumns;
constexpr int kStemRun = 8;  // elements that are moved at once

// In wgrad
constexpr int stem_wgrad_blocks(int filters, int steps) { return filters * steps > 512 ? 2 : 3; }
// Of the results, or gradients, of a pixel and, of 16 pixels, of a filter in shared memory, with padding that keeps the
// banks apart; of a warp's results on their way out
constexpr int stem_pixel_pitch(int filters) { return filters * 2 + 16; }  // bytes
constexpr int kStemFilterPitch = kStemColumns * 2 + 16;
constexpr int stem_slab_bytes(int filters) {
  const int by_pixels = kStemColumns * stem_pixel_pitch(filters), by_filters = filters * kStemFilterPitch;
  return by_pixels > by_filters ? by_pixels : by_filters;
}

// Which neighbours of a result are written at once, by 16 bytes
enum class StemRuns { kNone, kChannels, kColumns };

// The one parameter of the kernels
struct StemParams {
  const void* image;
  Strides x;
  const void* weight;  // [k, c, r, s]; in fprop
  Strides weight_strides;
  const void* bias;      // [k] or null; in fprop
  void* output;          // in fprop
  const void* gradient;  // of the output, in wgrad; its channels lie side by side
  Strides y;             // of the output or its gradient
  Activation activation;
  int c, h, w, k, p, q, r, s;
  int stride_h, pad_h, pad_w, dilation_h;

  int steps;  // of four taps to a row of the filter, of which the last may be beyond it
  // In shared memory: bytes from one filter to the next; of the patch of the image that a tile meets, from one row to
  // the next, and to the row's other half (see sm80/stem.cuh); where the parts begin
  int filter_pitch, row_pitch, half_pitch;
  int patch_at, slabs_at, biases_at;  // in wgrad slabs_at is the gradient's place
  int patch_rows, patch_columns;
  StemRuns runs;
  int tiles;
  Divider by_tiles, by_tile_columns;  // of an image, of its rows
  Divider by_patch_columns, by_taps, by_rows, by_steps;

  int gradient_channels;  // in wgrad
  float* workspace;       // in wgrad: [blocks, extent_a, pitch_b]
  int extent_a, extent_b, pitch_b;
};

// What a kernel does at once: filters, and columns to a step of the result; in wgrad steps of four taps, too
struct StemTiles {
  int filters, stride, steps;
};

// Why such a kernel cannot serve the call; null if it can.
const char* refuses_stem(Pass pass, const ConvParams& params, const StemTiles& tiles, const DeviceInfo& device);

struct StemLaunch {
  StemParams params;
  LaunchShape shape;
  double fill;             // what of the products is asked for, beside those of an image of four channels
  double products, moves;  // clocks of a multiprocessor for those of a tile, and for what they are made of
};
StemLaunch stem_launch(Pass pass, const ConvParams& params, const StemTiles& tiles, const DeviceInfo& device);

}  // namespace fastconv::cuda
