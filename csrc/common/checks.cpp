#include "common/checks.h"

#include <functional>
#include <map>
#include <ostream>

namespace fastconv {
namespace {

const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    default:
      return torch::headeronly::toString(dtype);
  }
}

template <class Ints>
std::string list(const Ints& values) {
  std::string text = "[";
  for (size_t i = 0; i < values.size(); ++i) {
    text += (i ? ", " : "") + std::to_string(values[i]);
  }
  return text + "]";
}

std::string shape(const Tensor& tensor) { return list(tensor.sizes()); }

std::string device(const Tensor& tensor) {
  const auto where = tensor.device();
  if (where.is_cpu()) return "cpu";
  if (where.is_cuda()) return "cuda:" + std::to_string(where.index());
  return "another device";
}

void check_pair(const char* op, const char* name, const IntList& values, int64_t least) {
  STD_TORCH_CHECK(values.size() == 2, op, ": got ", name, " ", list(values),
                  ", needed two integers (height, width); pass an int or a pair");
  STD_TORCH_CHECK(values[0] >= least && values[1] >= least, op, ": got ", name, " ", list(values), ", needed at least ",
                  least, " in both directions; pass a larger ", name);
}

void check_4d(const char* op, const char* name, const Tensor& tensor, const char* axes) {
  STD_TORCH_CHECK(tensor.dim() == 4, op, ": got ", name, " of shape ", shape(tensor), ", needed 4 dimensions ", axes,
                  "; reshape it");
}

}  // namespace

Activation parse_activation(const char* op, const std::string& name) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  STD_TORCH_CHECK(name == "relu6", op, ": got activation '", name,
                  "', needed 'none', 'relu' or 'relu6'; apply other activations after the op");
  return Activation::kRelu6;
}

void check_floating(const char* op, const Tensor& input) {
  const ScalarType dtype = input.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || is_low_precision(dtype), op,
                  ": got input of dtype ", dtype_name(dtype),
                  ", needed float32, float64, bfloat16 or float16; convert it with input.float()");
}

void check_like_input(const char* op, const Tensor& input, const char* name, const Tensor& other) {
  STD_TORCH_CHECK(other.device() == input.device(), op, ": got ", name, " on ", device(other), " beside input on ",
                  device(input), ", needed one device; move it with ", name, ".to(input.device)");
  STD_TORCH_CHECK(other.scalar_type() == input.scalar_type(), op, ": got ", name, " of dtype ",
                  dtype_name(other.scalar_type()), " beside input of dtype ", dtype_name(input.scalar_type()),
                  ", needed one dtype; convert it with ", name, ".to(input.dtype)");
}

void check_same_shape(const char* op, const Tensor& input, const char* name, const Tensor& other) {
  STD_TORCH_CHECK(other.sizes().equals(input.sizes()), op, ": got ", name, " of shape ", shape(other),
                  " beside input of shape ", shape(input), ", needed one shape; expand it first");
}

IntList check_conv2d(const char* op, const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& residual, const ConvGeometry& geometry, const char* residual_name) {
  check_4d(op, "input", input, "(N, C, H, W)");
  check_4d(op, "weight", weight, "(K, C / groups, R, S)");
  check_floating(op, input);
  check_like_input(op, input, "weight", weight);
  check_pair(op, "stride", geometry.stride, 1);
  check_pair(op, "padding", geometry.padding, 0);
  check_pair(op, "dilation", geometry.dilation, 1);
  const int64_t groups = geometry.groups;
  STD_TORCH_CHECK(groups >= 1, op, ": got groups ", groups,
                  ", needed at least 1; pass groups=1 for a dense convolution");
  const int64_t out_channels = weight.size(0);
  STD_TORCH_CHECK(out_channels >= 1 && weight.size(1) >= 1 && weight.size(2) >= 1 && weight.size(3) >= 1, op,
                  ": got weight of shape ", shape(weight),
                  ", needed at least one filter element; pass a non-empty weight");
  STD_TORCH_CHECK(out_channels % groups == 0, op, ": got ", out_channels, " output channels in weight of shape ",
                  shape(weight), ", needed a multiple of groups ", groups, "; change weight or groups");
  STD_TORCH_CHECK(input.size(1) == weight.size(1) * groups, op, ": got ", input.size(1), " channels in input of shape ",
                  shape(input), ", needed ", weight.size(1) * groups, " (weight.shape[1] ", weight.size(1),
                  " x groups ", groups, "); change input, weight or groups");
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t padded = input.size(2 + axis) + 2 * geometry.padding[axis];
    const int64_t extent = geometry.dilation[axis] * (weight.size(2 + axis) - 1) + 1;
    STD_TORCH_CHECK(extent <= padded, op, ": got a filter that spans ", extent, " pixels over a padded ",
                    axis ? "width" : "height", " of ", padded,
                    ", needed at most that; add padding or shrink the filter");
  }
  const IntList output_size = conv2d_output_size(input, weight, geometry);
  if (bias) {
    check_like_input(op, input, "bias", *bias);
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == out_channels, op, ": got bias of shape ", shape(*bias),
                    ", needed [", out_channels, "], one value for each output channel; reshape it");
  }
  if (residual) {
    check_like_input(op, input, residual_name, *residual);
    STD_TORCH_CHECK(residual->sizes().equals(output_size), op, ": got ", residual_name, " of shape ", shape(*residual),
                    ", needed ", list(output_size), ", the shape of the convolution's output; expand it first");
  }
  return output_size;
}

IntList conv2d_output_size(const Tensor& input, const Tensor& weight, const ConvGeometry& geometry) {
  IntList size{input.size(0), weight.size(0), 0, 0};
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t padded = input.size(2 + axis) + 2 * geometry.padding[axis];
    const int64_t extent = geometry.dilation[axis] * (weight.size(2 + axis) - 1) + 1;
    size[2 + axis] = (padded - extent) / geometry.stride[axis] + 1;
  }
  return size;
}

void check_mask_source(const char* op, const Tensor& grad_output, const std::optional<Tensor>& output,
                       Activation activation) {
  if (activation == Activation::kNone) return;
  STD_TORCH_CHECK(output, op, ": got no output, needed it for the activation's mask; pass the forward's output");
  check_like_input(op, grad_output, "output", *output);
  check_same_shape(op, grad_output, "output", *output);
}

void check_pointwise_weight(const char* op, const char* name, const Tensor& weight) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == 1 && weight.size(3) == 1, op, ": got ", name, " of shape ",
                  shape(weight), ", needed [K, C, 1, 1]; use conv2d_relu for larger filters");
}

namespace {

std::string entry_name(const char* name, size_t i) { return std::string(name) + "[" + std::to_string(i) + "]"; }

}  // namespace

void check_pointwise_group(const char* op, const Tensor& input, const std::vector<Tensor>& weights,
                           const std::vector<Tensor>& biases) {
  STD_TORCH_CHECK(!weights.empty() && (biases.empty() || biases.size() == weights.size()), op, ": got ", weights.size(),
                  " weights and ", biases.size(),
                  " biases, needed at least one weight and as many biases; use None for no bias");
  for (size_t i = 0; i < weights.size(); ++i) {
    check_pointwise_weight(op, entry_name("weights", i).c_str(), weights[i]);
    check_conv2d(op, input, weights[i], biases.empty() ? std::nullopt : std::optional(biases[i]), std::nullopt,
                 kPointwise);
  }
}

namespace {

// From a byte of one tensor to a byte of another: the distance that one step covers, and the fewest and the most steps.
using Steps = std::map<int64_t, std::pair<int64_t, int64_t>, std::greater<>>;

int64_t floor_div(int64_t value, int64_t divisor) { return value / divisor - (value % divisor < 0); }

// Whether the steps add up to this distance. What the shorter ones can reach leaves few counts of the longest to try,
// in slices of one tensor at most three; gives up, hence no, when `work` tries are spent.
bool add_up(int64_t distance, Steps::const_iterator longest, Steps::const_iterator end, int& work) {
  if (longest == end) return distance == 0;
  const auto& [length, counts] = *longest;
  const auto shorter = std::next(longest);
  int64_t low = 0, high = 0;
  for (auto step = shorter; step != end; ++step) {
    low += step->first * step->second.first, high += step->first * step->second.second;
  }
  const int64_t last = std::min(counts.second, floor_div(distance - low, length));
  for (int64_t count = std::max(counts.first, -floor_div(high - distance, length)); count <= last; ++count) {
    if (--work < 0) return false;
    if (add_up(distance - count * length, shorter, end, work)) return true;
  }
  return false;
}

bool overlap(const Tensor& one, const Tensor& two) {
  if (one.numel() == 0 || two.numel() == 0) return false;
  Steps steps;
  const auto add = [&steps](int64_t length, int64_t least, int64_t most) {
    auto& counts = steps[length];
    counts.first += least, counts.second += most;
  };
  const auto bytes = static_cast<int64_t>(one.element_size());
  for (int64_t i = 0; i < one.dim(); ++i) {
    if (one.stride(i) != 0) add(one.stride(i) * bytes, 0, one.size(i) - 1);
  }
  for (int64_t i = 0; i < two.dim(); ++i) {
    if (two.stride(i) != 0) add(two.stride(i) * bytes, 1 - two.size(i), 0);
  }
  add(1, 1 - bytes, bytes - 1);
  int work = 1000;
  const int64_t distance =
      static_cast<const char*>(two.const_data_ptr()) - static_cast<const char*>(one.const_data_ptr());
  return add_up(distance, steps.begin(), steps.end(), work);
}

}  // namespace

void check_destination(const char* op, const char* name, const Tensor& out, const IntList& size, const Tensor& input,
                       const std::vector<std::optional<Tensor>>& others) {
  const bool fits = out.sizes().equals(size) && out.scalar_type() == input.scalar_type();
  STD_TORCH_CHECK(fits && out.device() == input.device(), op, ": got ", name, " of shape ", shape(out), ", ",
                  dtype_name(out.scalar_type()), " on ", device(out), ", needed ", list(size), ", ",
                  dtype_name(input.scalar_type()), " on ", device(input),
                  ", as the result is; allocate it so, it is not resized");
  for (int64_t i = 0; i < out.dim(); ++i) {
    STD_TORCH_CHECK(out.stride(i) != 0 || out.size(i) < 2, op, ": got ", name, " of shape ", shape(out),
                    " with strides ", list(out.strides()),
                    ", needed memory for every element; pass a tensor that is not expanded");
  }
  for (const std::optional<Tensor>& other : others) {
    STD_TORCH_CHECK(
        !other || !overlap(out, *other), op, ": got ", name,
        " that overlaps the memory of another argument, needed memory of its own; pass another tensor, or a "
        "slice that nothing else uses");
  }
}

void check_pointwise_group_destinations(const char* op, const std::vector<Tensor>& out, const Tensor& input,
                                        const std::vector<Tensor>& weights, const std::vector<Tensor>& biases) {
  STD_TORCH_CHECK(out.size() == weights.size(), op, ": got ", out.size(), " tensors in out, needed ", weights.size(),
                  ", one for each weight; pass as many");
  std::vector<std::optional<Tensor>> others{input};
  others.insert(others.end(), weights.begin(), weights.end());
  others.insert(others.end(), biases.begin(), biases.end());
  for (size_t i = 0; i < out.size(); ++i) {
    check_destination(op, entry_name("out", i).c_str(), out[i], conv2d_output_size(input, weights[i], kPointwise),
                      input, others);
    others.push_back(out[i]);
  }
}

void check_pointwise_group_backward(const char* op, const std::vector<Tensor>& grad_outputs,
                                    const std::vector<Tensor>& outputs, const Tensor& input,
                                    const std::vector<Tensor>& weights, Activation activation) {
  const size_t needed_outputs = activation == Activation::kNone ? 0 : weights.size();
  STD_TORCH_CHECK(!weights.empty() && grad_outputs.size() == weights.size() && outputs.size() == needed_outputs, op,
                  ": got ", weights.size(), " weights, ", grad_outputs.size(), " gradients and ", outputs.size(),
                  " outputs, needed as many of each, and no outputs without an activation; pass what the "
                  "forward had");
  for (size_t i = 0; i < weights.size(); ++i) {
    check_pointwise_weight(op, entry_name("weights", i).c_str(), weights[i]);
    check_conv2d(op, input, weights[i], std::nullopt, grad_outputs[i], kPointwise, "grad_outputs");
    if (activation != Activation::kNone)
      check_same_shape(op, grad_outputs[i], entry_name("outputs", i).c_str(), outputs[i]);
  }
}

int64_t check_depthwise_weight(const char* op, const char* name, const Tensor& input, const Tensor& weight) {
  check_4d(op, "input", input, "(N, C, H, W)");
  const int64_t channels = input.size(1);
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(1) == 1 && channels > 0 && weight.size(0) % channels == 0, op,
                  ": got ", name, " of shape ", shape(weight), ", needed [", channels,
                  " * multiplier, 1, R, S] for input of shape ", shape(input), "; use conv2d_relu for other groups");
  return channels;
}

Activation check_local_response_norm(const char* op, const Tensor& input, int64_t size, const std::string& activation) {
  STD_TORCH_CHECK(input.dim() >= 3, op, ": got input of shape ", shape(input),
                  ", needed at least 3 dimensions (N, C, ...); reshape it");
  check_floating(op, input);
  STD_TORCH_CHECK(size >= 1, op, ": got size ", size, ", needed at least 1; pass the number of channels to sum over");
  return parse_activation(op, activation);
}

void check_output_mask(const char* op, const std::vector<bool>& output_mask, size_t entries) {
  STD_TORCH_CHECK(output_mask.size() == entries, op, ": got output_mask of ", output_mask.size(), " entries, needed ",
                  entries, "; pass one for each differentiable input");
}

}  // namespace fastconv
