// What the fused kernels of depthwise-separable convolutions take.
#pragma once

#include "cuda/depthwise_conv2d/params.h"
#include "cuda/runtime/divider.h"

namespace fastconv::cuda {

// What a block has in shared memory, see sm80/kernel.cuh
constexpr int kSeparableColumns = 64;      // output channels at once
constexpr int kSeparableStages = 3;        // of the ring that brings the pointwise weight
constexpr int kSeparableChunkBytes = 16;   // at the end of a row, for the banks
constexpr int kSeparableDepthBytes = 128;  // of a row of a stage
constexpr int kSeparableRingBytes =
    kSeparableStages * kSeparableColumns * (kSeparableDepthBytes + kSeparableChunkBytes);

struct DepthwiseSeparableConv2dParams {
  DepthwiseConv2dParams depthwise;  // its `out` strides are those of this output; its own output stays in the block
  const void* weight;               // pointwise, [out_channels, channels], dense
  const void* bias;                 // pointwise, may be null
  void* output;
  int out_channels;
  Activation activation;  // of the pointwise convolution
  bool tf32;              // whether float32 may be rounded to TF32 for the pointwise one

  // What the plan makes of it
  int padded_channels;      // of the depthwise tile
  int channels_at_once;     // whose filters lie in shared memory together
  int out_tiles;            // of out_channels, in all
  int out_tiles_per_block;  // those of a block
  Divider by_rows;          // tiles of pixels below each other
  Divider by_row_tiles;     // and side by side
  Divider by_lanes;         // threads to a tile, for channels_at_once
  Divider by_last_lanes;    // the same for the channels that remain
  bool wide;                // whether results can be written by 16 bytes
  bool channels_last;       // whether the output is to be; kernels do not look at it
};

}  // namespace fastconv::cuda
