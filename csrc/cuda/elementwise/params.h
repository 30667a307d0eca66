// What the elementwise kernels take.
#pragma once

#include "cuda/runtime/launcher.h"

namespace fastconv::cuda {

enum class Elementwise {
  kAdd,       // activation(input + other)
  kMask,      // input where the activation let `other`, its output, through
  kActivate,  // activation(input)
};

constexpr int kElementwiseThreads = 256;  // of a block
constexpr int kElementwiseUnroll = 2;     // vectors of a thread
constexpr int kMaxElementwiseDims = 6;

struct ElementwiseParams {
  const void* input;
  const void* other;  // null for kActivate
  void* output;       // dense; may be `input` or `other` where those lie in memory alike
  int64_t numel;
  Activation activation;
  DType dtype;
  // 0 dimensions: all tensors lie in memory alike. Otherwise output lies in the order of these dimensions, the last one
  // innermost, and the other two have strides.
  int dims;
  int64_t sizes[kMaxElementwiseDims];
  int64_t input_strides[kMaxElementwiseDims];
  int64_t other_strides[kMaxElementwiseDims];
};

}  // namespace fastconv::cuda
