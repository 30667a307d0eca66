// What the kernels of local response normalisation take.
#pragma once

#include "cuda/runtime/divider.h"
#include "cuda/runtime/launcher.h"

namespace fastconv::cuda {

constexpr int kLrnThreads = 256;                                     // of a block
constexpr int kLrnWindow = 5;                                        // of the kernels that know their size
constexpr int kLrnLanesResident = 8, kLrnLanesResidentBackward = 6;  // blocks on a multiprocessor

// How d^-beta is computed
enum class LrnPower {
  kRoots,  // beta 0.75; of 16-bit types for d >= 2^-126 only
  kExp2,   // of 16-bit types, for d >= 2^-126 and beta > 0
  kAny,
};

template <class A>
struct LrnCoefficients {
  A scale, k, beta;
  A slope;  // 2 * scale * beta
};

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
  LrnCoefficients<double> coefficients;  // scale: alpha / size
  Activation activation;                 // of the input, before all else

  // What the plan makes of it
  LrnCoefficients<float> coefficients32;
  LrnPower power;
  int channels_per_block;       // planes
  int vectors;                  // lanes: of the tensor
  int vectors_per_warp, first;  // lanes: those that a warp writes, from which of its lanes on
  Divider by_row;               // lanes: vectors of a pixel
};

// Whether the window is that of the kernels that know its size
inline bool has_known_window(const LocalResponseNormParams& p) {
  return p.before == kLrnWindow / 2 && p.after == kLrnWindow / 2;
}

// Pixels of a thread that walks along planes, for vectors of `width`: a backward one with windows of 8 would run out of
// registers.
constexpr int lrn_planes_width(bool backward, int width) { return backward && width > 4 ? 4 : width; }

}  // namespace fastconv::cuda
