#pragma once

#include "cuda/launcher.h"

namespace fastconv::cuda {

// Distances in memory, in elements
struct ImageStrides {
  int64_t n, c, h, w;
};

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
  ImageStrides in;   // of input or grad_input
  ImageStrides out;  // of output, or of grad_output and activated
  int multiprocessors;

  // What the launcher makes of it
  int tiles;        // of pixels, over all images
  int row_tiles;    // of pixels along a row
  int row_shift;    // dgrad: where the first tile of a row begins, to the left of the row
  bool rows_first;  // whether neighbouring tiles lie below each other rather than side by side
  int chunks;       // wgrad: of tiles, each of which gives a partial sum
  int tiles_per_chunk;
};

const std::vector<KernelInfo>& depthwise_conv2d_kernels();

// Whether the kernels can run this: filters that fit into shared memory, less than 2^31 tiles of pixels
bool depthwise_conv2d_takes(const DepthwiseConv2dParams& params);

void depthwise_conv2d_fprop(const DepthwiseConv2dParams& params, Stream stream);
void depthwise_conv2d_dgrad(const DepthwiseConv2dParams& params, Stream stream);

// The elements of the workspace, of float32, or float64 for float64. Needs all parameters but the outputs.
int64_t depthwise_conv2d_wgrad_workspace(const DepthwiseConv2dParams& params);
void depthwise_conv2d_wgrad(const DepthwiseConv2dParams& params, Stream stream);

}  // namespace fastconv::cuda
