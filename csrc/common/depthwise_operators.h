// The operators that begin with a depthwise convolution: arguments checked and brought into one form, for the
// convolutions of any backend.
#pragma once

#include "common/checks.h"
#include "common/layout.h"

namespace fastconv {

// `kConvolution` is Tensor(input, weight, bias, output_size, geometry, activation), as cpu/depthwise.h and
// cuda/depthwise_conv2d/depthwise_conv2d.h declare it.
template <auto kConvolution>
struct DepthwiseOperators {
  static Tensor depthwise_conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                                 IntList stride, IntList padding, IntList dilation, std::string activation) {
    constexpr auto kOp = "fastconv::depthwise_conv2d";
    const Activation kind = parse_activation(kOp, activation);
    const int64_t groups = check_depthwise_weight(kOp, "weight", input, weight);
    const ConvGeometry geometry{std::move(stride), std::move(padding), std::move(dilation), groups};
    const IntList output_size = check_conv2d(kOp, input, weight, bias, std::nullopt, geometry);
    return kConvolution(input, weight, bias, output_size, geometry, kind);
  }

  template <class Library>
  static void implement(Library& m) {
    m.impl("depthwise_conv2d", TORCH_BOX(&depthwise_conv2d));
  }
};

// Whether the second convolution's output is channels_last in eager. The first one's result loses that layout to an
// ReLU if it has a single channel or a single pixel; with both it cannot have it.
inline bool separable_is_channels_last(const Tensor& input, const Tensor& depthwise_weight,
                                       const Tensor& pointwise_weight, const IntList& hidden_size,
                                       Activation depthwise_activation) {
  const bool one_channel = hidden_size[1] == 1, one_pixel = hidden_size[2] == 1 && hidden_size[3] == 1;
  const bool through_relu = depthwise_activation == Activation::kRelu;
  const bool kept = through_relu ? !one_channel && !one_pixel : !one_channel || !one_pixel;
  return (kept && output_is_channels_last(input, depthwise_weight)) || has_channels_last_strides(pointwise_weight);
}

// `kForward` is Tensor(input, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, hidden_size,
// geometry, inner, outer). The backward is made of parts: `kDepthwise` as above, which computes the depthwise result
// again, and for each of the two convolutions the gradients of its input, weight and bias, (grad_output, output, input,
// weight, geometry, activation, mask), as cuda/conv2d/conv2d.h declares them.
template <auto kForward, auto kDepthwise, auto kDepthwiseBackward, auto kPointwiseBackward>
struct DepthwiseSeparableOperators {
  static Tensor depthwise_separable_conv2d(const Tensor& input, const Tensor& depthwise_weight,
                                           const Tensor& pointwise_weight, const std::optional<Tensor>& depthwise_bias,
                                           const std::optional<Tensor>& pointwise_bias, IntList stride, IntList padding,
                                           IntList dilation, std::string depthwise_activation,
                                           std::string pointwise_activation) {
    constexpr auto kOp = "fastconv::depthwise_separable_conv2d";
    const Activation inner = parse_activation(kOp, depthwise_activation);
    const Activation outer = parse_activation(kOp, pointwise_activation);
    const int64_t groups = check_depthwise_weight(kOp, "depthwise_weight", input, depthwise_weight);
    check_pointwise_weight(kOp, "pointwise_weight", pointwise_weight);
    const ConvGeometry geometry{std::move(stride), std::move(padding), std::move(dilation), groups};
    const IntList hidden_size = check_conv2d(kOp, input, depthwise_weight, depthwise_bias, std::nullopt, geometry,
                                             {"depthwise_weight", "depthwise_bias"});
    check_conv2d(kOp, of_size(input, hidden_size), pointwise_weight, pointwise_bias, std::nullopt, kPointwise,
                 {"pointwise_weight", "pointwise_bias"});
    return kForward(input, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, hidden_size, geometry,
                    inner, outer);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> depthwise_separable_conv2d_backward(
      const Tensor& grad_output, const std::optional<Tensor>& output, const Tensor& input,
      const Tensor& depthwise_weight, const Tensor& pointwise_weight, const std::optional<Tensor>& depthwise_bias,
      IntList stride, IntList padding, IntList dilation, std::string depthwise_activation,
      std::string pointwise_activation, std::vector<bool> output_mask) {
    constexpr auto kOp = "fastconv::depthwise_separable_conv2d_backward";
    check_output_mask(kOp, output_mask, 5);
    const Activation inner = parse_activation(kOp, depthwise_activation);
    const Activation outer = parse_activation(kOp, pointwise_activation);
    const int64_t groups = check_depthwise_weight(kOp, "depthwise_weight", input, depthwise_weight);
    check_pointwise_weight(kOp, "pointwise_weight", pointwise_weight);
    const ConvGeometry geometry{std::move(stride), std::move(padding), std::move(dilation), groups};
    const IntList hidden_size = check_conv2d(kOp, input, depthwise_weight, depthwise_bias, std::nullopt, geometry,
                                             {"depthwise_weight", "depthwise_bias"});
    check_conv2d(kOp, of_size(input, hidden_size), pointwise_weight, std::nullopt, grad_output, kPointwise,
                 {"pointwise_weight", "pointwise_bias", "grad_output"});
    check_mask_source(kOp, grad_output, output, outer);

    const bool wants_depthwise = output_mask[0] || output_mask[1] || output_mask[3];
    const Tensor hidden = kDepthwise(input, depthwise_weight, depthwise_bias, hidden_size, geometry, inner);
    auto [grad_hidden, grad_pointwise, grad_pointwise_bias] =
        kPointwiseBackward(grad_output, output, hidden, pointwise_weight, kPointwise, outer,
                           {wants_depthwise, output_mask[2], output_mask[4]});
    if (!wants_depthwise) {
      return {empty_gradient(input), empty_gradient(input), grad_pointwise, empty_gradient(input), grad_pointwise_bias};
    }
    auto [grad_input, grad_depthwise, grad_depthwise_bias] =
        kDepthwiseBackward(grad_hidden, hidden, input, depthwise_weight, geometry, inner,
                           {output_mask[0], output_mask[1], output_mask[3]});
    return {grad_input, grad_depthwise, grad_pointwise, grad_depthwise_bias, grad_pointwise_bias};
  }

  template <class Library>
  static void implement(Library& m) {
    m.impl("depthwise_separable_conv2d", TORCH_BOX(&depthwise_separable_conv2d));
    m.impl("depthwise_separable_conv2d_backward", TORCH_BOX(&depthwise_separable_conv2d_backward));
  }

 private:
  // For the checks: a tensor of this size without the memory
  static Tensor of_size(const Tensor& like, const IntList& size) {
    return call<Tensor>("aten::expand", "", torch::stable::new_empty(like, {1, 1, 1, 1}), size, false);
  }
};

}  // namespace fastconv
