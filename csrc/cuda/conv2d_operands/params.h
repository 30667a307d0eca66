// What becomes of tensors before the kernels of conv2d read them: an image whose channels are no whole vectors is
// packed into one that has some more, which are 0; gradients pass the activation's mask, are summed for the bias and
// come to lie side by side.
#pragma once

#include "cuda/conv2d/params.h"

namespace fastconv::cuda {

struct PackParams {
  DType dtype;
  const void* input;  // [n, c, h, w] with these strides
  Strides strides;
  int c, h, w;
  int pixels;                // n * h * w
  void* packed;              // [n, h, w, packed_c], dense
  int packed_c;              // a multiple of 4
  Divider by_image, by_row;  // h * w, w
};

// The gradient of one branch's output
struct GradientBranch {
  const void* grad;    // with the strides `y`
  const void* output;  // of the activation, with the strides `z`
  void* grad_bias;     // [k] or null
  Strides y, z;
  int k;
  int first;   // channel among all
  int padded;  // channels that are written: k, and what follows it in zeros
};

constexpr int kPackThreads = 256;
constexpr int kGradientThreads = 256, kGradientUnroll = 4;
constexpr int kBiasX = 32, kBiasY = 8;  // threads of a block that adds up the chunks

struct GradientParams {
  DType dtype;
  Activation activation;  // kNone: nothing is masked, and `output` not read
  void* prepared;         // [n, p, q, channels], dense; null where sums are all that is wanted
  int channels;
  int pixels;                     // n * p * q
  Divider by_pixels, by_columns;  // p * q, q
  int chunk, chunks;              // pixels of a block, and such chunks
  float* sums;                    // [chunks, channels], or null
  int branches;
  GradientBranch branch[kMaxBranches];
};

}  // namespace fastconv::cuda
