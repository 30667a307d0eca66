// How tensors lie in memory, and the layouts that eager gives to results.
#pragma once

#include "common/stable.h"

namespace fastconv {

// Whether the elements fill one stretch of memory, each once, in any order of the dimensions
inline bool is_dense(const Tensor& tensor) {
  if (tensor.is_contiguous()) return true;
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  const int64_t numel = tensor.numel();
  for (int64_t stride = 1; stride < numel;) {
    size_t axis = 0;
    while (axis < sizes.size() && !(sizes[axis] > 1 && strides[axis] == stride)) ++axis;
    if (axis == sizes.size()) return false;
    stride *= sizes[axis];
  }
  return true;
}

// `tensor` itself where its elements lie in memory as those of the dense `like`, else a copy that
// does
inline Tensor with_layout_of(const Tensor& like, const Tensor& tensor) {
  if (tensor.strides().equals(like.strides())) return tensor;
  Tensor copy = torch::stable::empty_like(like);
  torch::stable::copy_(copy, tensor);
  return copy;
}

// A dense tensor: `tensor` itself, or a copy with its dimensions in the same order
inline Tensor to_dense(const Tensor& tensor) {
  if (is_dense(tensor)) return tensor;
  Tensor copy = torch::stable::empty_like(tensor);
  torch::stable::copy_(copy, tensor);
  return copy;
}

// A result where the caller wants it: in `out` if there is one
inline Tensor stored(const Tensor& result, const std::optional<Tensor>& out) {
  if (!out) return result;
  Tensor destination = *out;
  torch::stable::copy_(destination, result);
  return destination;
}

// c10's is_channels_last_strides_2d
inline bool has_channels_last_strides(const Tensor& tensor) {
  int64_t least = 0;
  for (const int axis : {1, 3, 2, 0}) {
    const int64_t size = tensor.size(axis), stride = tensor.stride(axis);
    if (size == 0 || stride < least || (axis == 1 && stride == 0)) return false;
    // [N, 1, H, 1] and the like: torch takes an ambiguous layout for contiguous.
    if (axis == 0 && least == tensor.stride(1)) return false;
    least = stride * std::max<int64_t>(size, 1);
  }
  return true;
}

// Whether the output of a convolution is channels_last, as torch decides it
inline bool output_is_channels_last(const Tensor& input, const Tensor& weight) {
  // cuDNN has no channels_last in float64.
  if (input.is_cuda() && input.scalar_type() == ScalarType::Double) return false;
  return has_channels_last_strides(input) || has_channels_last_strides(weight);
}

inline Tensor empty_channels_last(const Tensor& like, const IntList& size) {
  return torch::stable::empty(size, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              MemoryFormat::ChannelsLast);
}

// A contiguous tensor with the strides of one also in dimensions of one element, from which ops that follow read the
// layout. So eager's ReLU and its sums, ops of their own, leave what is both contiguous and channels_last; ReLU6 does
// not. No view, which autograd would not let the caller overwrite.
inline Tensor with_plain_strides(const Tensor& tensor) {
  if (!tensor.is_contiguous()) return tensor;
  IntList sizes(tensor.sizes().begin(), tensor.sizes().end()), strides(sizes.size());
  int64_t stride = 1;
  for (size_t axis = sizes.size(); axis-- > 0; stride *= std::max<int64_t>(sizes[axis], 1)) strides[axis] = stride;
  if (tensor.strides().equals(strides)) return tensor;
  return call<Tensor>("aten::set_", "source_Tensor_storage_offset", torch::stable::new_empty(tensor, IntList{0}),
                      tensor, tensor.storage_offset(), sizes, strides);
}

// What an operator returns for a gradient that nobody wants
inline Tensor empty_gradient(const Tensor& like) { return torch::stable::new_empty(like, IntList{0}); }

}  // namespace fastconv
