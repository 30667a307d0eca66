// The operators that are a convolution with more or less around it: arguments checked and brought into one form, for
// the convolution of any backend.
#pragma once

#include "common/checks.h"
#include "common/layout.h"

namespace fastconv {

// The two overloads of an operator, from one function whose first argument is where the result goes, if that is given.
template <auto kFunction>
struct Overloads;
template <class Result, class... Arguments, Result (*kFunction)(const std::optional<Result>&, Arguments...)>
struct Overloads<kFunction> {
  static Result functional(Arguments... arguments) {
    return kFunction(std::nullopt, std::forward<Arguments>(arguments)...);
  }
  static void out(Arguments... arguments, Result out) { kFunction(out, std::forward<Arguments>(arguments)...); }
};

// The functions are those of cuda/conv2d/conv2d.h and cpu/conv2d.h:
//   Tensor kConvolution(input, weight, bias, residual, output_size, geometry, activation, out)
//   tuple of 3 kBackward(grad_output, output, input, weight, geometry, activation, mask)
//   Tensor kActivationBackward(grad_output, output, activation)
template <auto kConvolution, auto kBackward, auto kActivationBackward>
struct Conv2dOperators {
  static Tensor conv2d_relu(const std::optional<Tensor>& out, const Tensor& input, const Tensor& weight,
                            const std::optional<Tensor>& bias, IntList stride, IntList padding, IntList dilation,
                            int64_t groups, std::string activation) {
    const ConvGeometry geometry{std::move(stride), std::move(padding), std::move(dilation), groups};
    return forward("fastconv::conv2d_relu", out, input, weight, bias, std::nullopt, geometry, activation);
  }

  static Tensor conv2d_add_relu(const std::optional<Tensor>& out, const Tensor& input, const Tensor& weight,
                                const std::optional<Tensor>& bias, const Tensor& residual, IntList stride,
                                IntList padding, IntList dilation, int64_t groups, std::string activation) {
    const ConvGeometry geometry{std::move(stride), std::move(padding), std::move(dilation), groups};
    return forward("fastconv::conv2d_add_relu", out, input, weight, bias, residual, geometry, activation);
  }

  static Tensor pointwise_conv2d(const std::optional<Tensor>& out, const Tensor& input, const Tensor& weight,
                                 const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                                 IntList stride, std::string activation) {
    constexpr auto kOp = "fastconv::pointwise_conv2d";
    check_pointwise_weight(kOp, "weight", weight);
    return forward(kOp, out, input, weight, bias, residual, {std::move(stride), {0, 0}, {1, 1}, 1}, activation);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> conv2d_backward(const Tensor& grad_output,
                                                                    const std::optional<Tensor>& output,
                                                                    const Tensor& input, const Tensor& weight,
                                                                    IntList stride, IntList padding, IntList dilation,
                                                                    int64_t groups, std::string activation,
                                                                    std::vector<bool> output_mask) {
    constexpr auto kOp = "fastconv::conv2d_backward";
    const ConvGeometry geometry{std::move(stride), std::move(padding), std::move(dilation), groups};
    check_output_mask(kOp, output_mask, 4);
    check_conv2d(kOp, input, weight, std::nullopt, grad_output, geometry, {"weight", "bias", "grad_output"});
    const Activation kind = parse_activation(kOp, activation);
    check_mask_source(kOp, grad_output, output, kind);
    const std::array<bool, 3> convolved{output_mask[0], output_mask[1], output_mask[2]};
    if (!output_mask[3]) {
      auto [grad_input, grad_weight, grad_bias] =
          kBackward(grad_output, output, input, weight, geometry, kind, convolved);
      return {grad_input, grad_weight, grad_bias, empty_gradient(input)};
    }
    // The residual's gradient is the masked one, which then serves the others as well.
    const Tensor grad =
        kind == Activation::kNone ? torch::stable::clone(grad_output) : kActivationBackward(grad_output, *output, kind);
    auto [grad_input, grad_weight, grad_bias] =
        kBackward(grad, std::nullopt, input, weight, geometry, Activation::kNone, convolved);
    return {grad_input, grad_weight, grad_bias, grad};
  }

  template <class Library>
  static void implement(Library& m) {
    m.impl("conv2d_relu", TORCH_BOX(&Overloads<&conv2d_relu>::functional));
    m.impl("conv2d_relu.out", TORCH_BOX(&Overloads<&conv2d_relu>::out));
    m.impl("conv2d_add_relu", TORCH_BOX(&Overloads<&conv2d_add_relu>::functional));
    m.impl("conv2d_add_relu.out", TORCH_BOX(&Overloads<&conv2d_add_relu>::out));
    m.impl("pointwise_conv2d", TORCH_BOX(&Overloads<&pointwise_conv2d>::functional));
    m.impl("pointwise_conv2d.out", TORCH_BOX(&Overloads<&pointwise_conv2d>::out));
    m.impl("conv2d_backward", TORCH_BOX(&conv2d_backward));
  }

 private:
  static Tensor forward(const char* op, const std::optional<Tensor>& out, const Tensor& input, const Tensor& weight,
                        const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                        const ConvGeometry& geometry, const std::string& activation) {
    const IntList size = check_conv2d(op, input, weight, bias, residual, geometry);
    const Activation kind = parse_activation(op, activation);
    if (out) check_destination(op, "out", *out, size, input, {input, weight, bias, residual});
    return kConvolution(input, weight, bias, residual, size, geometry, kind, out);
  }
};

}  // namespace fastconv
