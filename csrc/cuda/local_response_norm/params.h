// What the kernels of local response normalisation take.
#pragma once

#include "cuda/runtime/launcher.h"

namespace fastconv::cuda {

constexpr int kLrnThreads = 256;  // of a block
constexpr int kLrnWindow = 5;     // of the kernels that know their size

// Dense tensors [outer, channels, inner]
struct LocalResponseNormParams {
  const void* input;
  const void* grad_output;  // dgrad only
  void* output;             // y, or dx of dgrad
  void* workspace;          // of dgrad, if it asks for one
  DType dtype;
  int64_t outer;
  int64_t inner;
  int channels;
  int before;  // the window of channel c: c - before ... c + after, without what lies outside of the tensor
  int after;
  double scale;  // alpha / size
  double beta;
  double k;
  Activation activation;   // of the input, before all else
  int channels_per_block;  // planes; the plan fills this in
};

}  // namespace fastconv::cuda
