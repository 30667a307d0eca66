#pragma once

#include "cuda/launcher.h"

namespace fastconv::cuda {

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
  Activation activation;  // of the input, before all else
  int multiprocessors;
  int channels_per_block;  // the launcher fills this in
};

const std::vector<KernelInfo>& local_response_norm_kernels();

void local_response_norm_fprop(const LocalResponseNormParams& params, Stream stream);

// The elements of the workspace that dgrad needs for these parameters, of float32, or float64 for float64; mostly 0
int64_t local_response_norm_workspace(const LocalResponseNormParams& params);
void local_response_norm_dgrad(const LocalResponseNormParams& params, Stream stream);

}  // namespace fastconv::cuda
