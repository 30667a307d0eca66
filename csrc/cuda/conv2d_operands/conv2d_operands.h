// Tensors as the kernels of conv2d read them: themselves where vectors fit them, else copies that have some more
// channels, which are 0.
#pragma once

#include "common/stable.h"
#include "cuda/conv2d/plan.h"
#include "cuda/runtime/device.h"

namespace fastconv::cuda {

constexpr int64_t kFewChannels = 4;  // the narrowest vector of 16-bit types

// What the kernels count with 32 bits, and so far beyond; refuses what is more than they can. `what` names it in the
// message.
int extent(const char* what, int64_t value, int spare = kSpareExtent);

// Of dimensions of one element, whose stride says nothing, what any kernel can take
Strides strides_of(const Tensor& image);
bool has_channels_side_by_side(const Tensor& image);

// So many channels, with some of 0 behind them where no vectors fit; a group's cannot have more.
int64_t packed_channels(const Tensor& like, int64_t channels, int64_t groups);

// Whether the operand is the image as it lies
bool is_operand(const Tensor& image, int64_t groups);

// [n, packed_channels, h, w]
Tensor image_operand(Device& device, const Tensor& image, int64_t groups);

// [filters, r, s, channels], dense; `channels` are those that the image operand has in a group.
Tensor weight_operand(Device& device, const Tensor& weight, int64_t channels);

// The gradient of all branches' results before the activation, side by side; of what the mask of input, weight and bias
// asks for
struct ConvGradient {
  Tensor tensor;               // [n, packed_channels, p, q]
  std::vector<Tensor> biases;  // a sum for each filter, or empty ones
};
ConvGradient gradient_operand(Device& device, const std::vector<Tensor>& grad_outputs,
                              const std::vector<Tensor>& outputs, Activation activation, int64_t groups,
                              std::array<bool, 3> mask);

}  // namespace fastconv::cuda
