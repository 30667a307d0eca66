#pragma once

#include "cuda/kernels/depthwise_conv2d.h"

namespace fastconv::cuda {

struct DepthwiseSeparableConv2dParams {
  DepthwiseConv2dParams depthwise;  // its `out` strides are those of this output; its own output stays in the block
  const void* weight;               // pointwise, [out_channels, channels], dense
  const void* bias;                 // pointwise, may be null
  void* output;
  int out_channels;
  Activation activation;  // of the pointwise convolution
  bool tf32;              // whether float32 may be rounded to TF32 for the pointwise one

  // What the launcher makes of it
  int padded_channels;      // of the depthwise tile
  int channels_at_once;     // whose filters lie in shared memory together
  int out_tiles;            // of out_channels, in all
  int out_tiles_per_block;  // those of a block
  bool wide;                // whether results can be written by 16 bytes
};

const std::vector<KernelInfo>& depthwise_separable_conv2d_kernels();

// Whether the fused kernel can run this, and is the better way rather than two kernels; true as well when it is forced
bool depthwise_separable_conv2d_takes(const DepthwiseSeparableConv2dParams& params);

void depthwise_separable_conv2d_fprop(const DepthwiseSeparableConv2dParams& params, Stream stream);

}  // namespace fastconv::cuda
