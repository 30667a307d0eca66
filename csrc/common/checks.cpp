#include "common/checks.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <functional>
#include <map>
#include <sstream>
#include <stdexcept>

// STD_TORCH_CHECK begins with the place in this file, which tells a caller nothing.
#define CHECK(condition, ...) \
  if (!(condition)) throw std::runtime_error(joined(__VA_ARGS__))

namespace fastconv {
namespace {

template <class... Parts>
std::string joined(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

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

// The most of anything that a size is computed from, other than a batch: sums and products of two fit an int64_t, and
// the coordinates of pixels fit the 32 bits that kernels for GPUs have for them.
constexpr int64_t kMost = 2147483647;

template <class Ints>
std::string list(const Ints& values) {
  constexpr size_t kShown = 8;
  std::string text = "[";
  for (size_t i = 0; i < values.size() && i < kShown; ++i) {
    text += (i ? ", " : "") + std::to_string(values[i]);
  }
  return text + (values.size() > kShown ? ", ...]" : "]");
}

std::string shape(const Tensor& tensor) { return list(tensor.sizes()); }

std::string device(const Tensor& tensor) {
  const auto where = tensor.device();
  if (where.is_cpu()) return "cpu";
  if (where.is_cuda()) return "cuda:" + std::to_string(where.index());
  return "another device";
}

void check_pair(const char* op, const char* name, const IntList& values, int64_t least) {
  CHECK(values.size() == 2, op, ": got ", name, " ", list(values),
        ", needed two integers (height, width); pass an int or a pair");
  CHECK(values[0] >= least && values[1] >= least, op, ": got ", name, " ", list(values), ", needed at least ", least,
        " in both directions; pass a larger ", name);
  CHECK(values[0] <= kMost && values[1] <= kMost, op, ": got ", name, " ", list(values), ", needed at most ", kMost,
        " in both directions; pass a smaller ", name);
}

void check_count(const char* op, const char* name, int64_t value, const char* remedy) {
  CHECK(value >= 1, op, ": got ", name, " ", value, ", needed at least 1; ", remedy);
  CHECK(value <= kMost, op, ": got ", name, " ", value, ", needed at most ", kMost, "; pass a smaller ", name);
}

void check_4d(const char* op, const char* name, const Tensor& tensor, const char* axes) {
  CHECK(tensor.dim() == 4, op, ": got ", name, " of shape ", shape(tensor), ", needed 4 dimensions ", axes,
        "; reshape it");
  for (int axis = 1; axis < 4; ++axis) {
    CHECK(tensor.size(axis) <= kMost, op, ": got ", name, " of shape ", shape(tensor), ", needed at most ", kMost,
          " in dimension ", axis, "; split it");
  }
}

// All elements lie within the memory: it can be freed or shrunk behind a tensor's back.
void check_storage(const char* op, const char* name, const Tensor& tensor) {
  if (tensor.numel() == 0) return;
  int64_t held = 0;
  CHECK(aoti_torch_get_storage_size(tensor.get(), &held) == 0, op, ": got ", name,
        " without memory, needed a strided tensor; convert it first");
  int64_t last = tensor.storage_offset();
  for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  const int64_t needed = (last + 1) * static_cast<int64_t>(tensor.element_size());
  CHECK(needed <= held, op, ": got ", name, " of shape ", shape(tensor), " with ", held, " bytes of storage, needed ",
        needed, "; restore the storage before the call");
}

// A tensor of this size can exist.
void check_result(const char* op, const IntList& size, const Tensor& like) {
  auto bytes = static_cast<int64_t>(like.element_size());
  bool fits = true;
  for (const int64_t extent : size) {
    if (extent == 0) return;
    fits = fits && !__builtin_mul_overflow(bytes, extent, &bytes);
  }
  CHECK(fits, op, ": got arguments for a result of shape ", list(size),
        ", needed one of at most 9223372036854775807 bytes; pass smaller ones");
}

}  // namespace

Activation parse_activation(const char* op, const std::string& name) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  CHECK(name == "relu6", op, ": got activation '", name.size() > 40 ? name.substr(0, 40) + "..." : name,
        "', needed 'none', 'relu' or 'relu6'; apply other activations after the op");
  return Activation::kRelu6;
}

void check_floating(const char* op, const Tensor& input) {
  const ScalarType dtype = input.scalar_type();
  CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || is_low_precision(dtype), op,
        ": got input of dtype ", dtype_name(dtype),
        ", needed float32, float64, bfloat16 or float16; convert it with input.float()");
  check_storage(op, "input", input);
}

void check_like_input(const char* op, const Tensor& input, const char* name, const Tensor& other) {
  CHECK(other.device() == input.device(), op, ": got ", name, " on ", device(other), " beside input on ", device(input),
        ", needed one device; move it with ", name, ".to(input.device)");
  CHECK(other.scalar_type() == input.scalar_type(), op, ": got ", name, " of dtype ", dtype_name(other.scalar_type()),
        " beside input of dtype ", dtype_name(input.scalar_type()), ", needed one dtype; convert it with ", name,
        ".to(input.dtype)");
  check_storage(op, name, other);
}

void check_same_shape(const char* op, const Tensor& input, const char* name, const Tensor& other) {
  CHECK(other.sizes().equals(input.sizes()), op, ": got ", name, " of shape ", shape(other), " beside input of shape ",
        shape(input), ", needed one shape; expand it first");
}

namespace {

// [N, K, P, Q]
IntList conv2d_output_size(const Tensor& input, const Tensor& weight, const ConvGeometry& geometry) {
  IntList size{input.size(0), weight.size(0), 0, 0};
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t padded = input.size(2 + axis) + 2 * geometry.padding[axis];
    const int64_t extent = geometry.dilation[axis] * (weight.size(2 + axis) - 1) + 1;
    size[2 + axis] = (padded - extent) / geometry.stride[axis] + 1;
  }
  return size;
}

}  // namespace

IntList check_conv2d(const char* op, const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& residual, const ConvGeometry& geometry, const ConvNames& names) {
  check_4d(op, "input", input, "(N, C, H, W)");
  check_4d(op, names.weight.c_str(), weight, "(K, C / groups, R, S)");
  check_floating(op, input);
  check_like_input(op, input, names.weight.c_str(), weight);
  check_pair(op, "stride", geometry.stride, 1);
  check_pair(op, "padding", geometry.padding, 0);
  check_pair(op, "dilation", geometry.dilation, 1);
  const int64_t groups = geometry.groups;
  check_count(op, "groups", groups, "pass groups=1 for a dense convolution");
  const int64_t out_channels = weight.size(0);
  CHECK(out_channels >= 1 && weight.size(1) >= 1 && weight.size(2) >= 1 && weight.size(3) >= 1, op, ": got ",
        names.weight, " of shape ", shape(weight), ", needed at least one filter element; pass a non-empty ",
        names.weight);
  CHECK(out_channels % groups == 0, op, ": got ", out_channels, " output channels in ", names.weight, " of shape ",
        shape(weight), ", needed a multiple of groups ", groups, "; change ", names.weight, " or groups");
  CHECK(input.size(1) == weight.size(1) * groups, op, ": got ", input.size(1), " channels in input of shape ",
        shape(input), ", needed ", weight.size(1) * groups, " (", names.weight, ".shape[1] ", weight.size(1),
        " x groups ", groups, "); change input, ", names.weight, " or groups");
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t padded = input.size(2 + axis) + 2 * geometry.padding[axis];
    CHECK(padded <= kMost, op, ": got a padded ", axis ? "width" : "height", " of ", padded, ", needed at most ", kMost,
          "; pass a smaller padding");
    const int64_t extent = geometry.dilation[axis] * (weight.size(2 + axis) - 1) + 1;
    CHECK(extent <= padded, op, ": got a filter that spans ", extent, " pixels over a padded ",
          axis ? "width" : "height", " of ", padded, ", needed at most that; add padding or shrink the filter");
  }
  const IntList output_size = conv2d_output_size(input, weight, geometry);
  check_result(op, output_size, input);
  if (bias) {
    check_like_input(op, input, names.bias.c_str(), *bias);
    CHECK(bias->dim() == 1 && bias->size(0) == out_channels, op, ": got ", names.bias, " of shape ", shape(*bias),
          ", needed [", out_channels, "], one value for each output channel; reshape it");
  }
  if (residual) {
    check_like_input(op, input, names.residual.c_str(), *residual);
    CHECK(residual->sizes().equals(output_size), op, ": got ", names.residual, " of shape ", shape(*residual),
          ", needed ", list(output_size), ", the shape of the convolution's output; expand it first");
  }
  return output_size;
}

void check_mask_source(const char* op, const Tensor& grad_output, const std::optional<Tensor>& output,
                       Activation activation) {
  if (activation == Activation::kNone) return;
  CHECK(output, op, ": got no output, needed it for the activation's mask; pass the forward's output");
  check_like_input(op, grad_output, "output", *output);
  check_same_shape(op, grad_output, "output", *output);
}

void check_pointwise_weight(const char* op, const char* name, const Tensor& weight) {
  CHECK(weight.dim() == 4 && weight.size(2) == 1 && weight.size(3) == 1, op, ": got ", name, " of shape ",
        shape(weight), ", needed [K, C, 1, 1]; use conv2d_relu for larger filters");
}

namespace {

std::string entry_name(const char* name, size_t i) { return std::string(name) + "[" + std::to_string(i) + "]"; }

}  // namespace

std::vector<IntList> check_pointwise_group(const char* op, const Tensor& input, const std::vector<Tensor>& weights,
                                           const std::vector<Tensor>& biases) {
  CHECK(!weights.empty() && (biases.empty() || biases.size() == weights.size()), op, ": got ", weights.size(),
        " weights and ", biases.size(), " biases, needed at least one weight and as many biases; use None for no bias");
  std::vector<IntList> sizes;
  for (size_t i = 0; i < weights.size(); ++i) {
    const ConvNames names{entry_name("weights", i), entry_name("biases", i)};
    check_pointwise_weight(op, names.weight.c_str(), weights[i]);
    sizes.push_back(check_conv2d(op, input, weights[i], entry(biases, i), std::nullopt, kPointwise, names));
  }
  return sizes;
}

namespace {

// From a byte of one tensor to a byte of another: the distance that one step covers, and the fewest and the most steps.
using Steps = std::map<int64_t, std::pair<int64_t, int64_t>, std::greater<>>;

int64_t floor_div(int64_t value, int64_t divisor) { return value / divisor - (value % divisor < 0); }

// Whether the steps add up to this distance. What the shorter ones can reach leaves few counts of the longest to try,
// in slices of one tensor at most three; gives up, hence no, when `work` tries are spent and it is then negative.
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

// Whether two elements share memory; taken for granted where the strides interleave too wildly to tell.
bool overlaps_itself(const Tensor& tensor) {
  if (tensor.numel() == 0) return false;
  // From an element to another: the dimensions' strides, the longest first, which any tensor that was allocated, sliced
  // or permuted has so that one step is longer than all the shorter ones together.
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    if (tensor.size(i) > 1) dims.emplace_back(tensor.stride(i), tensor.size(i) - 1);
  }
  std::sort(dims.begin(), dims.end());
  Steps steps;
  int64_t reach = 0;
  int work = 1000;
  for (const auto& [stride, most] : dims) {
    if (stride == 0) return true;
    if (stride <= reach) {
      // At least one step of this dimension, none of a longer one, back to where it began
      Steps from_here = steps;
      if (!from_here.emplace(stride, std::pair{1, most}).second) return true;
      if (add_up(0, from_here.begin(), from_here.end(), work) || work < 0) return true;
    }
    steps.emplace(stride, std::pair{-most, most});
    reach += stride * most;
  }
  return false;
}

}  // namespace

void check_destination(const char* op, const char* name, const Tensor& out, const IntList& size, const Tensor& input,
                       const std::vector<std::optional<Tensor>>& others) {
  const bool fits = out.sizes().equals(size) && out.scalar_type() == input.scalar_type();
  CHECK(fits && out.device() == input.device(), op, ": got ", name, " of shape ", shape(out), ", ",
        dtype_name(out.scalar_type()), " on ", device(out), ", needed ", list(size), ", ",
        dtype_name(input.scalar_type()), " on ", device(input),
        ", as the result is; allocate it so, it is not resized");
  check_storage(op, name, out);
  CHECK(!overlaps_itself(out), op, ": got ", name, " of shape ", shape(out), " with strides ", list(out.strides()),
        ", needed memory for every element; pass a tensor whose elements do not overlap");
  for (const std::optional<Tensor>& other : others) {
    CHECK(!other || !overlap(out, *other), op, ": got ", name,
          " that overlaps the memory of another argument, needed memory of its own; pass another tensor, or a "
          "slice that nothing else uses");
  }
}

void check_pointwise_group_destinations(const char* op, const std::vector<Tensor>& out,
                                        const std::vector<IntList>& sizes, const Tensor& input,
                                        const std::vector<Tensor>& weights, const std::vector<Tensor>& biases) {
  CHECK(out.size() == weights.size(), op, ": got ", out.size(), " tensors in out, needed ", weights.size(),
        ", one for each weight; pass as many");
  std::vector<std::optional<Tensor>> others{input};
  others.insert(others.end(), weights.begin(), weights.end());
  others.insert(others.end(), biases.begin(), biases.end());
  for (size_t i = 0; i < out.size(); ++i) {
    check_destination(op, entry_name("out", i).c_str(), out[i], sizes[i], input, others);
    others.push_back(out[i]);
  }
}

void check_pointwise_group_backward(const char* op, const std::vector<Tensor>& grad_outputs,
                                    const std::vector<Tensor>& outputs, const Tensor& input,
                                    const std::vector<Tensor>& weights, Activation activation) {
  const size_t needed_outputs = activation == Activation::kNone ? 0 : weights.size();
  CHECK(!weights.empty() && grad_outputs.size() == weights.size() && outputs.size() == needed_outputs, op, ": got ",
        weights.size(), " weights, ", grad_outputs.size(), " gradients and ", outputs.size(),
        " outputs, needed as many of each, and no outputs without an activation; pass what the "
        "forward had");
  for (size_t i = 0; i < weights.size(); ++i) {
    const ConvNames names{entry_name("weights", i), "", entry_name("grad_outputs", i)};
    check_pointwise_weight(op, names.weight.c_str(), weights[i]);
    check_conv2d(op, input, weights[i], std::nullopt, grad_outputs[i], kPointwise, names);
    if (activation != Activation::kNone) {
      const std::string name = entry_name("outputs", i);
      check_like_input(op, input, name.c_str(), outputs[i]);
      check_same_shape(op, grad_outputs[i], name.c_str(), outputs[i]);
    }
  }
}

int64_t check_depthwise_weight(const char* op, const char* name, const Tensor& input, const Tensor& weight) {
  check_4d(op, "input", input, "(N, C, H, W)");
  const int64_t channels = input.size(1);
  CHECK(weight.dim() == 4 && weight.size(1) == 1 && channels > 0 && weight.size(0) % channels == 0, op, ": got ", name,
        " of shape ", shape(weight), ", needed [", channels, " * multiplier, 1, R, S] for input of shape ",
        shape(input), "; use conv2d_relu for other groups");
  return channels;
}

Activation check_local_response_norm(const char* op, const Tensor& input, int64_t size, const std::string& activation) {
  CHECK(input.dim() >= 3, op, ": got input of shape ", shape(input),
        ", needed at least 3 dimensions (N, C, ...); reshape it");
  check_floating(op, input);
  check_count(op, "size", size, "pass the number of channels to sum over");
  return parse_activation(op, activation);
}

void check_output_mask(const char* op, const std::vector<bool>& output_mask, size_t entries) {
  CHECK(output_mask.size() == entries, op, ": got output_mask of ", output_mask.size(), " entries, needed ", entries,
        "; pass one for each differentiable input");
}

}  // namespace fastconv
