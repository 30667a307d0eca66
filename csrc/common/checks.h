// The argument checks that every backend's kernels share. fastconv/operators/checks.py says the same in
// the same words for tensors without data (fake, meta) and for the reference; tests/ops/test_errors.py
// holds the two together.
//
// A message names the operator, what arrived, what was needed and the remedy.
#pragma once

#include "common/activation.h"
#include "common/stable.h"

namespace fastconv {

struct ConvGeometry {
  IntList stride, padding, dilation;
  int64_t groups = 1;
};

inline const ConvGeometry kPointwise{{1, 1}, {0, 0}, {1, 1}, 1};

// Each throws std::runtime_error, RuntimeError in Python. `op` is the operator's full name.
Activation parse_activation(const char* op, const std::string& name);

// These two also see to it that the tensor's storage holds its elements.
void check_floating(const char* op, const Tensor& input);
// `other` has the dtype and the device of `input`.
void check_like_input(const char* op, const Tensor& input, const char* name, const Tensor& other);
void check_same_shape(const char* op, const Tensor& input, const char* name, const Tensor& other);

// What a convolution's tensors are called in its operator.
struct ConvNames {
  std::string weight = "weight", bias = "bias", residual = "residual";
};

// Everything about a 2-d convolution's arguments, as torch.nn.functional.conv2d wants them. Returns
// its output size, which is that of the residual (in a backward: of grad_output), too.
IntList check_conv2d(const char* op, const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& residual, const ConvGeometry& geometry, const ConvNames& names = {});
// In a backward: the forward's output is there where the activation's mask is read from it.
void check_mask_source(const char* op, const Tensor& grad_output, const std::optional<Tensor>& output,
                       Activation activation);
void check_pointwise_weight(const char* op, const char* name, const Tensor& weight);
// One bias for each weight, or none at all. Returns the outputs' sizes.
std::vector<IntList> check_pointwise_group(const char* op, const Tensor& input, const std::vector<Tensor>& weights,
                                           const std::vector<Tensor>& biases);
// A result of this size, in the dtype and on the device of `input`, can go into `out`. That overlaps neither itself nor
// another argument; where two tensors interleave too wildly to tell within reason, they are taken to be apart.
void check_destination(const char* op, const char* name, const Tensor& out, const IntList& size, const Tensor& input,
                       const std::vector<std::optional<Tensor>>& others);
// The same for a group, with the sizes of check_pointwise_group: one for each weight
void check_pointwise_group_destinations(const char* op, const std::vector<Tensor>& out,
                                        const std::vector<IntList>& sizes, const Tensor& input,
                                        const std::vector<Tensor>& weights, const std::vector<Tensor>& biases);
void check_pointwise_group_backward(const char* op, const std::vector<Tensor>& grad_outputs,
                                    const std::vector<Tensor>& outputs, const Tensor& input,
                                    const std::vector<Tensor>& weights, Activation activation);
// Weight [C * multiplier, 1, R, S]: one filter set for each of the input's channels. Returns C, the
// groups.
int64_t check_depthwise_weight(const char* op, const char* name, const Tensor& input, const Tensor& weight);
Activation check_local_response_norm(const char* op, const Tensor& input, int64_t size, const std::string& activation);
void check_output_mask(const char* op, const std::vector<bool>& output_mask, size_t entries);

}  // namespace fastconv
