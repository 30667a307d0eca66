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

// Whether the window is that of the kernels that know its size
inline bool has_known_window(const LocalResponseNormParams& p) {
  return p.before == kLrnWindow / 2 && p.after == kLrnWindow / 2;
}

// Pixels of a thread that walks along planes, for vectors of `width`: a backward one with windows of 8 would run out of
// registers.
constexpr int lrn_planes_width(bool backward, int width) { return backward && width > 4 ? 4 : width; }

}  // namespace fastconv::cuda
