// The same GEMMs as in params.h, as the TMA of sm_90 brings their operands: by boxes of 64 channels of some pixels,
// filters, or rows of filters. Extents and the depth count boxes, of which none has parts of two filter positions or of
// two branches:
//
//            extent a             extent b               depth
//   fprop    pixels               branches' filters      positions x channels
//   dgrad    pixels of a phase    channels               positions of the phase x filters
//   wgrad    branches' filters    positions x channels   pixels
//
// What a box has beyond the channels, filters or pixels that exist is 0 where it is read, and dropped where it is
// written.
#pragma once

#include "cuda/conv2d/params.h"
#include "cuda/runtime/tensor_map.h"

namespace fastconv::cuda {

constexpr int kBox = kBoxChannels;

// Of the kernels that bring a pixel once for all positions, see sm90a/halo.cuh: their tiles, and the boxes of pixels
// that shared memory has room for at once; of wgrad the filter's side.
constexpr int kHaloTile = 256, kHaloSlots = 13;
constexpr int kHaloWgradSlots = 18, kHaloSide = 3;
struct Halo {
  int pixels;      // of the results, and those between them
  int row_pitch;   // of these from one row to the next
  int patch;       // boxes of pixels that a tile meets
  bool slides;     // whether it has those that it shares with the tile before from there
  int tiles, run;  // along extent a; of a block
  int r;           // rows of positions
};

// The one parameter of the kernels that use boxes
struct BoxParams {
  TensorMap image;     // the input; in dgrad the gradient of the output
  TensorMap gradient;  // of the output, in wgrad
  TensorMap residual;
  TensorMap weight[kMaxBranches];  // in fprop; one in dgrad
  TensorMap result[kMaxBranches];
  // Whether a map is of a matrix, as pixels lie at one pitch; else it is an im2col map. Results that have no pitch are
  // no boxes.
  bool plain_image, plain_gradient, plain_result;
  bool has_residual;
  Activation activation;

  int extent_a, extent_b;  // as in ConvParams, in elements; with a halo a has what lies between the pixels, too
  int boxes_b, deep;       // along extent b and the depth
  // Tiles, or pairs of them for a cluster of two, or with a halo runs of them; times the parts of a split depth
  int work;
  int splits, split_deep;  // split_deep: boxes
  Divider by_tiles, by_tiles_b;
  int channels, channel_boxes;  // of a position of the filter
  int first_channel;            // beyond all of them where no position meets the pixels: sums of zeros
  Divider by_channel_boxes, by_s;
  int s;

  // Pixels, and where the walk of an im2col map meets the filter's first position; see Im2colMap
  Divider by_pixels, by_columns;
  int first_h, first_w, step_h, step_w;
  int offset_h, offset_w, tap_h, tap_w;               // of a position from there: offset + index * tap
  int first_position, position_row, position_column;  // a position's number in the weight
  Phase rows, columns;                                // of the pixels that are computed
  void* output;                                       // of results that are no boxes
  Strides y;

  Halo halo;

  int branches;
  int filters[kMaxBranches];
  int first_filter[kMaxBranches];   // of each branch among all
  int first_box[kMaxBranches + 1];  // of each branch along the extent that has filters
  const void* bias[kMaxBranches];   // in fprop
  float* workspace;                 // [splits, extent_a, pitch_b]
  int pitch_b;
};

// What a kernel does with boxes
struct BoxTiles {
  int a = 0, b = 0;   // of a tile
  int cluster = 1;    // tiles below each other that are done at once
  bool halo = false;  // whether a pixel comes once for all positions
};

// Extents; along the depth and of what has parts the last box may be partly empty.
struct BoxExtents {
  int64_t rows;       // of extent a: elements, or with a halo all that are computed; in wgrad those of boxes
  int64_t b, depth;   // boxes
  double multiplied;  // of the depth in boxes
};
BoxExtents box_extents(Pass pass, const ConvParams& params, bool halo);

// Tiles of a block with a halo, such that so many multiprocessors have one block each; in wgrad these split the depth.
int halo_run(Pass pass, int64_t tiles_a, int64_t tiles_b, int multiprocessors);

// Why boxes cannot serve a call that vectors of 16 bytes serve; null if they can.
const char* refuses_boxes(Pass pass, const ConvParams& params, bool halo);

// `params` is completed, but for its walk, which counts elements from the first pixel of the image.
BoxParams box_params(Pass pass, const ConvParams& params, const BoxTiles& tiles, int multiprocessors);

}  // namespace fastconv::cuda
