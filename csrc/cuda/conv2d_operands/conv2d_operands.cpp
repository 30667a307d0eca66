#include "cuda/conv2d_operands/conv2d_operands.h"

#include <limits>

#include "common/layout.h"
#include "cuda/conv2d_operands/plan.h"

namespace fastconv::cuda {
namespace {

constexpr int64_t kMostToPack = 16;  // channels of a contiguous image; wider ones are copied by torch

Tensor side_by_side(const Tensor& image) {
  return has_channels_side_by_side(image) ? image : torch::stable::contiguous(image, MemoryFormat::ChannelsLast);
}

int element_bytes(const Tensor& tensor) { return element_bytes(element_type(tensor)); }

// Whether kernels can read the channels of its groups by 16 bytes, or by 8 where those are no multiples of 16.
bool fits_vectors(const Tensor& image, int64_t groups) {
  const int64_t channels = image.size(1) / groups;
  const int element = element_bytes(image), bytes = channels * element % 16 == 0 ? 16 : 8;
  return has_vectors(image.const_data_ptr(), strides_of(image), channels, bytes / element, element);
}

// The tensor with channels of 0 behind its own, dense in channels_last
Tensor packed(Device& device, const Tensor& image, int64_t channels) {
  Tensor result = empty_channels_last(image, {image.size(0), channels, image.size(2), image.size(3)});
  PackParams params{};
  params.dtype = element_type(image);
  params.input = device.in(image), params.packed = device.scratch(result);
  params.strides = strides_of(image);
  params.c = static_cast<int>(image.size(1)), params.packed_c = static_cast<int>(channels);
  params.h = static_cast<int>(image.size(2)), params.w = static_cast<int>(image.size(3));
  params.pixels = extent("pixels", image.size(0) * image.size(2) * image.size(3));
  params.by_image = Divider(params.h * params.w), params.by_row = Divider(params.w);
  launch_pack(params, device.info(), device.stream());
  return result;
}

}  // namespace

int extent(const char* what, int64_t value, int spare) {
  STD_TORCH_CHECK(value <= std::numeric_limits<int>::max() - spare, "fastconv: got a convolution with ", value, " ",
                  what, ", needed at most 2^31 - ", spare + 1, "; split the batch");
  return static_cast<int>(value);
}

Strides strides_of(const Tensor& image) {
  const auto stride = [&](int axis) { return image.size(axis) == 1 ? 0 : image.stride(axis); };
  return {stride(0), image.size(1) == 1 ? 1 : image.stride(1), stride(2), stride(3)};
}

bool has_channels_side_by_side(const Tensor& image) { return image.size(1) == 1 || image.stride(1) == 1; }

int64_t packed_channels(const Tensor& like, int64_t channels, int64_t groups) {
  if (groups > 1 || channels % kFewChannels == 0) return channels;
  const int64_t vector = channels < kFewChannels ? kFewChannels : 16 / element_bytes(like);
  return ceil_div(channels, vector) * vector;
}

bool is_operand(const Tensor& image, int64_t groups) {
  return packed_channels(image, image.size(1), groups) == image.size(1) && fits_vectors(image, groups);
}

Tensor image_operand(Device& device, const Tensor& image, int64_t groups) {
  const int64_t channels = packed_channels(image, image.size(1), groups);
  const bool can_fit = channels / groups % kFewChannels == 0;
  const bool is_wide = image.size(1) > kMostToPack;
  const Tensor found = is_wide || !can_fit ? side_by_side(image) : image;
  if (!can_fit || is_operand(found, groups)) return found;
  return packed(device, found, channels);
}

Tensor weight_operand(Device& device, const Tensor& weight, int64_t channels) {
  const Tensor dense = torch::stable::contiguous(weight, MemoryFormat::ChannelsLast);
  const bool can_fit = channels % kFewChannels == 0;
  if (channels == dense.size(1) && (!can_fit || is_aligned(dense.const_data_ptr()))) return dense;
  return packed(device, dense, channels);
}

ConvGradient gradient_operand(Device& device, const std::vector<Tensor>& grad_outputs,
                              const std::vector<Tensor>& outputs, Activation activation, int64_t groups,
                              std::array<bool, 3> mask) {
  const Tensor& like = grad_outputs[0];
  GradientParams params{};
  params.dtype = element_type(like);
  params.activation = activation;
  params.branches = static_cast<int>(grad_outputs.size());
  std::vector<Tensor> kept;
  kept.reserve(2 * grad_outputs.size());
  ConvGradient found;
  int64_t channels = 0;
  for (size_t i = 0; i < grad_outputs.size(); ++i) {
    GradientBranch& branch = params.branch[i];
    const Tensor& grad = kept.emplace_back(side_by_side(grad_outputs[i]));
    branch.grad = device.in(grad), branch.y = strides_of(grad);
    if (activation != Activation::kNone) {
      const Tensor& output = kept.emplace_back(side_by_side(outputs[i]));
      branch.output = device.in(output), branch.z = strides_of(output);
    }
    branch.k = branch.padded = extent("filters", grad.size(1));
    branch.first = static_cast<int>(channels);
    channels += branch.k;
    found.biases.push_back(mask[2] ? torch::stable::new_empty(like, IntList{grad.size(1)}) : empty_gradient(like));
    if (mask[2]) branch.grad_bias = device.out(found.biases[i]);
  }
  const int64_t all = packed_channels(like, channels, groups);
  params.branch[params.branches - 1].padded += static_cast<int>(all - channels);
  params.channels = extent("filters", all);
  params.pixels = extent("output pixels", like.size(0) * like.size(2) * like.size(3));
  params.by_pixels = Divider(static_cast<uint32_t>(like.size(2) * like.size(3)));
  params.by_columns = Divider(static_cast<uint32_t>(like.size(3)));
  const bool can_fit = all / groups % kFewChannels == 0;
  if (activation == Activation::kNone && grad_outputs.size() == 1 && all == channels &&
      (!can_fit || fits_vectors(kept[0], groups))) {
    found.tensor = kept[0];
  } else if (mask[0] || mask[1]) {
    found.tensor = empty_channels_last(like, {like.size(0), all, like.size(2), like.size(3)});
    params.prepared = device.scratch(found.tensor);
  }
  std::optional<Tensor> sums;
  if (mask[2]) {
    const IntList size{gradient_chunks(params, device.info()) * all};
    sums = torch::stable::empty(size, ScalarType::Float, std::nullopt, like.device());
    params.sums = device.scratch<float>(*sums);
  }
  if (params.prepared || params.sums) launch_gradient(params, device.info(), device.stream());
  return found;
}

}  // namespace fastconv::cuda
