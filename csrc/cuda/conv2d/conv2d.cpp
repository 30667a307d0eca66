// conv2d_relu, conv2d_add_relu, pointwise_conv2d, pointwise_conv2d_group (all branches in one launch) and their
// backward on CUDA.
//
// The kernels read and write images pixel by pixel, with the channels of a pixel side by side: channels_last, or a
// channel slice of it, is taken as it lies where vectors fit it. Else it is packed first, into channels_last with
// channels of 0 up to the next vector, but for the photographs before a network's first layer, which there are kernels
// for (stem.h), and whose result is written as they lie. Wide contiguous images are copied to channels_last by torch,
// and results back. A caller's `out` is written by the kernel itself where its channels lie side by side and a residual
// has its strides, else the result is copied there. In the backward the activation's mask is applied once, to a
// gradient that has all branches side by side. float64 and empty batches go through aten, except for depthwise
// convolutions.
#include "cuda/conv2d/conv2d.h"

#include "common/aten.h"
#include "common/conv2d_operators.h"
#include "common/layout.h"
#include "common/pointwise_conv2d_group_operators.h"
#include "cuda/conv2d/plan.h"
#include "cuda/conv2d_operands/conv2d_operands.h"
#include "cuda/depthwise_conv2d/depthwise_conv2d.h"
#include "cuda/elementwise/activation.h"
#include "cuda/runtime/device.h"
#include "cuda/runtime/register.h"

namespace fastconv::cuda {
namespace {

bool has_kernels(const Tensor& input) { return input.scalar_type() != ScalarType::Double && input.numel() > 0; }

IntList sizes_of(const Tensor& tensor) { return {tensor.sizes().begin(), tensor.sizes().end()}; }

// A result of this size, in eager's layout after `delivered`
Tensor empty_image(const Tensor& like, const IntList& size, bool channels_last, bool direct) {
  return direct && !channels_last ? torch::stable::new_empty(like, size) : empty_channels_last(like, size);
}
Tensor delivered(const Tensor& image, bool channels_last) {
  return channels_last ? image : with_plain_strides(torch::stable::contiguous(image));
}

// Whether the kernels write into `out` itself; they read the residual with its strides.
bool is_writable(const Tensor& out, const std::optional<Tensor>& residual, bool direct) {
  return (direct || out.stride(1) == 1) && (!residual || residual->strides().equals(out.strides()));
}

// `channels` of the image that the kernels read, or as if they did
ConvArguments arguments_of(const Tensor& input, int64_t channels, const Tensor& weight, int64_t p, int64_t q,
                           const ConvGeometry& geometry) {
  ConvArguments arg;
  arg.dtype = element_type(input);
  arg.n = extent("images", input.size(0)), arg.c = extent("channels", channels);
  arg.h = extent("rows", input.size(2)), arg.w = extent("columns", input.size(3));
  arg.p = static_cast<int>(p), arg.q = static_cast<int>(q);
  extent("input pixels", input.size(0) * input.size(2) * input.size(3));
  extent("output pixels", input.size(0) * p * q);
  extent("weights", weight.size(0) * (channels / geometry.groups) * weight.size(2) * weight.size(3));
  arg.r = static_cast<int>(weight.size(2)), arg.s = static_cast<int>(weight.size(3));
  const auto pair = [](const IntList& list, int& h, int& w) {
    h = extent("rows to a step", list[0], 0), w = extent("columns to a step", list[1], 0);
  };
  pair(geometry.stride, arg.stride_h, arg.stride_w);
  pair(geometry.padding, arg.pad_h, arg.pad_w);
  pair(geometry.dilation, arg.dilation_h, arg.dilation_w);
  arg.groups = static_cast<int>(geometry.groups);
  return arg;
}

void run(const ConvChoice& choice, Device& device, const Tensor& like) {
  ConvPlan plan = plan_conv2d(choice, device.info());
  float* workspace = nullptr;
  std::optional<Tensor> memory;
  if (plan.workspace > 0) {
    memory = torch::stable::empty(IntList{plan.workspace}, ScalarType::Float, std::nullopt, like.device());
    workspace = device.scratch<float>(*memory);
  }
  launch_conv2d(plan, workspace, device.stream());
}
void run(Pass pass, Device& device, const ConvArguments& arg, const Tensor& like) {
  run(choose_conv2d(pass, arg, device.info()), device, like);
}

// The pass over `image`, of which `prepare` makes the operand, in `arg`. There are kernels that read a photograph as it
// lies: which one runs is decided before it is packed.
template <class Prepare>
void run_over(Pass pass, Device& device, ConvArguments& arg, const Tensor& image, const Tensor& weight,
              Prepare&& prepare) {
  const bool is_photograph = image.size(1) <= kFewChannels && arg.groups == 1 && arg.branches == 1 &&
                             !arg.branch[0].residual && element_bytes(arg.dtype) == 2;
  if (!is_photograph) {
    prepare();
    return run(pass, device, arg, image);
  }
  arg.photograph = {device.in(image), strides_of(image), static_cast<int>(image.size(1)), device.in(weight),
                    strides_of(weight)};
  const auto stride = [](int extent, int64_t value) { return extent == 1 ? 0 : value; };
  const Strides packed{stride(arg.n, int64_t{arg.h} * arg.w * arg.c), 1, stride(arg.h, int64_t{arg.w} * arg.c),
                       stride(arg.w, arg.c)};
  arg.x = is_operand(image, arg.groups) ? strides_of(image) : packed;
  ConvChoice choice = choose_conv2d(pass, arg, device.info());
  if (!choice.variant->reads_photographs()) {
    prepare();
    choice.prepared(arg);
  }
  run(choice, device, image);
}

// The first channels of a wider result, as a tensor of its own
Tensor without_padding(const Tensor& tensor, int64_t channels, bool channels_last) {
  IntList size = sizes_of(tensor);
  size[1] = channels;
  Tensor result = channels_last ? empty_channels_last(tensor, size) : torch::stable::new_empty(tensor, size);
  torch::stable::copy_(result, torch::stable::narrow(const_cast<Tensor&>(tensor), 1, 0, channels));
  return result;
}

// One of several convolutions of an input
struct Forward {
  Tensor weight;
  IntList output_size;
  std::optional<Tensor> bias, residual, out;
};

// At most kMaxBranches convolutions in one launch; more than one must be 1x1.
std::vector<Tensor> launch_forward(const Tensor& given, const std::vector<Forward>& branches,
                                   const ConvGeometry& geometry, Activation activation) {
  Device device(given);
  // The result of a photograph is written as the photograph lies.
  const bool direct = given.size(1) == 1 || (given.size(1) <= kFewChannels && !has_channels_side_by_side(given));
  const IntList& first = branches[0].output_size;
  const int64_t channels = packed_channels(given, given.size(1), geometry.groups);
  ConvArguments arg = arguments_of(given, channels, branches[0].weight, first[2], first[3], geometry);
  arg.tf32 = allows_tf32(given);
  arg.activation = activation;
  arg.branches = static_cast<int>(branches.size());
  std::vector<Tensor> outputs, kept;
  const auto keep = [&kept](Tensor tensor) -> const Tensor& { return kept.emplace_back(std::move(tensor)); };
  kept.reserve(3 * branches.size() + 1);
  const auto prepare = [&] {
    const Tensor& input = keep(image_operand(device, given, geometry.groups));
    arg.input = device.in(input);
    arg.x = strides_of(input);
    for (size_t i = 0; i < branches.size(); ++i) {
      const Tensor& weight = keep(weight_operand(device, branches[i].weight, channels / geometry.groups));
      arg.branch[i].weight = device.in(weight);
    }
  };
  for (size_t i = 0; i < branches.size(); ++i) {
    const auto& [weight, size, bias, residual, out] = branches[i];
    const bool in_place = out && is_writable(*out, residual, direct);
    const bool channels_last = output_is_channels_last(given, weight);
    const Tensor& output = outputs.emplace_back(in_place ? *out : empty_image(given, size, channels_last, direct));
    ConvBranch& branch = arg.branch[i];
    branch.k = extent("filters", size[1]);
    if (bias) branch.bias = device.in(keep(torch::stable::contiguous(*bias)));
    if (residual) branch.residual = device.in(keep(with_layout_of(output, *residual)));
    branch.output = device.out(output);
    branch.y = strides_of(output);
  }
  run_over(Pass::kFprop, device, arg, given, branches[0].weight, prepare);
  for (size_t i = 0; i < branches.size(); ++i) {
    const auto& [weight, size, bias, residual, out] = branches[i];
    if (!out) {
      outputs[i] = delivered(outputs[i], output_is_channels_last(given, weight));
      if (residual || activation == Activation::kRelu) outputs[i] = with_plain_strides(outputs[i]);
    } else if (!is_writable(*out, residual, direct)) {
      outputs[i] = stored(outputs[i], out);
    }
  }
  return outputs;
}

GroupGradients launch_backward(const std::vector<Tensor>& grad_outputs, const std::vector<Tensor>& outputs,
                               const Tensor& given, const std::vector<Tensor>& weights, const ConvGeometry& geometry,
                               Activation activation, std::array<bool, 3> mask) {
  Device device(given);
  const ConvGradient gradient = gradient_operand(device, grad_outputs, outputs, activation, geometry.groups, mask);
  GroupGradients found{empty_gradient(given), {}, gradient.biases};
  bool channels_last = false;
  for (const Tensor& weight : weights) channels_last |= output_is_channels_last(given, weight);
  const int64_t channels = packed_channels(given, given.size(1), geometry.groups),
                of_group = channels / geometry.groups;
  const bool tf32 = allows_tf32(given);
  const auto arguments = [&](const Tensor& image) {
    const Tensor& like = grad_outputs[0];
    ConvArguments arg = arguments_of(image, channels, weights[0], like.size(2), like.size(3), geometry);
    arg.tf32 = tf32;
    arg.grad_output = device.in(gradient.tensor);
    arg.grad_channels = extent("filters", gradient.tensor.size(1));
    arg.y = strides_of(gradient.tensor);
    return arg;
  };
  if (mask[1]) {
    ConvArguments arg = arguments(given);
    std::optional<Tensor> input;
    const auto prepare = [&] {
      input = image_operand(device, given, geometry.groups);
      arg.input = device.in(*input);
      arg.x = strides_of(*input);
    };
    arg.branches = static_cast<int>(weights.size());
    for (size_t i = 0; i < weights.size(); ++i) {
      IntList size = sizes_of(weights[i]);
      size[1] = of_group;
      found.weights.push_back(empty_channels_last(given, size));
      arg.branch[i].k = extent("filters", size[0]);
      arg.branch[i].grad_weight = device.out(found.weights[i]);
    }
    run_over(Pass::kWgrad, device, arg, given, weights[0], prepare);
    for (size_t i = 0; i < weights.size(); ++i) {
      const bool last = output_is_channels_last(given, weights[i]);
      const int64_t own = weights[i].size(1);
      Tensor& weight = found.weights[i];
      weight = own == of_group ? delivered(weight, last) : without_padding(weight, own, last);
    }
  } else {
    found.weights.assign(weights.size(), empty_gradient(given));
  }
  if (mask[0]) {
    const Tensor joined = weights.size() > 1 ? call<Tensor>("aten::cat", "", weights, int64_t{0}) : weights[0];
    const Tensor weight = weight_operand(device, joined, of_group);
    const bool direct = !has_channels_side_by_side(given) && channels == given.size(1) && channels <= kFewChannels;
    IntList size = sizes_of(given);
    size[1] = channels;
    found.input = empty_image(given, size, channels_last, direct);
    ConvArguments arg = arguments(found.input);
    arg.grad_input = device.out(found.input);
    arg.x = strides_of(found.input);
    arg.branch[0].k = extent("filters", weight.size(0));
    arg.branch[0].weight = device.in(weight);
    run(Pass::kDgrad, device, arg, found.input);
    found.input = channels == given.size(1) ? delivered(found.input, channels_last)
                                            : without_padding(found.input, given.size(1), channels_last);
  }
  return found;
}

bool is_depthwise(const Tensor& input, const ConvGeometry& geometry) {
  return geometry.groups > 1 && geometry.groups == input.size(1);
}

}  // namespace

bool allows_tf32(const Tensor& input) {
  // Asked through Python, as the stable ABI does not know the switch
  return input.scalar_type() == ScalarType::Float && call<bool>("fastconv::_allow_tf32", "");
}

Tensor convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& residual, const IntList& size, const ConvGeometry& geometry,
                   Activation activation, const std::optional<Tensor>& out) {
  if (is_depthwise(input, geometry)) {
    const Activation first = residual ? Activation::kNone : activation;
    Tensor output = depthwise_convolution(input, weight, bias, size, geometry, first);
    if (residual) {
      add_activation_inplace(output, *residual, activation);
      output = with_plain_strides(output);
    }
    return stored(output, out);
  }
  if (!has_kernels(input)) {
    Tensor output = aten_convolution(input, weight, bias, geometry);
    if (residual) {
      add_activation_inplace(output, *residual, activation);
    } else {
      activation_inplace(output, activation);
    }
    if (residual || activation == Activation::kRelu) output = with_plain_strides(output);
    return stored(output, out);
  }
  return launch_forward(input, {{weight, size, bias, residual, out}}, geometry, activation)[0];
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& grad_output, const std::optional<Tensor>& output,
                                                        const Tensor& input, const Tensor& weight,
                                                        const ConvGeometry& geometry, Activation activation,
                                                        std::array<bool, 3> mask) {
  if (is_depthwise(input, geometry)) {
    return depthwise_convolution_backward(grad_output, output, input, weight, geometry, activation, mask);
  }
  if (!has_kernels(input)) {
    const Tensor grad =
        activation == Activation::kNone ? grad_output : activation_backward(grad_output, *output, activation);
    return aten_convolution_backward(grad, input, weight, geometry, mask);
  }
  std::vector<Tensor> outputs;
  if (output) outputs.push_back(*output);
  auto found = launch_backward({grad_output}, outputs, input, {weight}, geometry, activation, mask);
  return {found.input, found.weights[0], found.biases[0]};
}

namespace {

std::vector<Tensor> forward_group(const Tensor& input, const std::vector<Tensor>& weights,
                                  const std::vector<Tensor>& biases, const std::vector<IntList>& sizes,
                                  Activation activation, const std::optional<std::vector<Tensor>>& out) {
  std::vector<Tensor> outputs;
  if (!has_kernels(input)) {
    for (size_t i = 0; i < weights.size(); ++i) {
      outputs.push_back(convolution(input, weights[i], entry(biases, i), std::nullopt, sizes[i], kPointwise, activation,
                                    entry(out, i)));
    }
    return outputs;
  }
  for (size_t first = 0; first < weights.size(); first += kMaxBranches) {
    std::vector<Forward> branches;
    for (size_t i = first; i < std::min(first + kMaxBranches, weights.size()); ++i) {
      branches.push_back({weights[i], sizes[i], entry(biases, i), std::nullopt, entry(out, i)});
    }
    for (Tensor& output : launch_forward(input, branches, kPointwise, activation)) outputs.push_back(output);
  }
  return outputs;
}

GroupGradients backward_group(const std::vector<Tensor>& grad_outputs, const std::vector<Tensor>& outputs,
                              const Tensor& input, const std::vector<Tensor>& weights, Activation activation,
                              std::array<bool, 3> mask) {
  GroupGradients found{empty_gradient(input), {}, {}};
  const bool at_once = has_kernels(input);
  const size_t step = at_once ? kMaxBranches : 1;
  for (size_t first = 0; first < weights.size(); first += step) {
    const size_t last = std::min(first + step, weights.size());
    const auto part = [&](const std::vector<Tensor>& all) {
      return all.empty() ? all : std::vector<Tensor>(all.begin() + first, all.begin() + last);
    };
    GroupGradients more;
    if (at_once) {
      more = launch_backward(part(grad_outputs), part(outputs), input, part(weights), kPointwise, activation, mask);
    } else {
      const auto output = outputs.empty() ? std::nullopt : std::optional(outputs[first]);
      auto [of_input, of_weight, of_bias] =
          convolution_backward(grad_outputs[first], output, input, weights[first], kPointwise, activation, mask);
      more = {of_input, {of_weight}, {of_bias}};
    }
    if (first == 0) {
      found.input = more.input;
    } else if (mask[0]) {
      add_activation_inplace(found.input, more.input, Activation::kNone);
    }
    found.weights.insert(found.weights.end(), more.weights.begin(), more.weights.end());
    found.biases.insert(found.biases.end(), more.biases.begin(), more.biases.end());
  }
  return found;
}

}  // namespace
}  // namespace fastconv::cuda

FASTCONV_CUDA_LIBRARY(m) {
  using namespace fastconv::cuda;
  fastconv::Conv2dOperators<convolution, convolution_backward, activation_backward>::implement(m);
  fastconv::PointwiseConv2dGroupOperators<forward_group, backward_group>::implement(m);
}
