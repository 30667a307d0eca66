// add_relu and its backward on CUDA, in one pass over memory each, for any pair of layouts.
#include "common/add_relu_operators.h"
#include "common/layout.h"
#include "cuda/elementwise/activation.h"
#include "cuda/elementwise/elementwise.h"
#include "cuda/runtime/register.h"

namespace fastconv::cuda {
namespace {

bool is_channels_last(const Tensor& tensor) {
  const auto format = tensor.dim() == 4   ? std::optional(MemoryFormat::ChannelsLast)
                      : tensor.dim() == 5 ? std::optional(MemoryFormat::ChannelsLast3d)
                                          : std::nullopt;
  if (!format) return false;
  // The stable ABI asks for contiguity alone: strides of dimensions of one element do not count.
  int64_t expected = 1;
  for (int i = 0; i < tensor.dim(); ++i) {
    const int64_t d = i == 0 ? 1 : i + 1 == tensor.dim() ? 0 : tensor.dim() - i;
    if (tensor.size(d) != 1 && tensor.stride(d) != expected) return false;
    expected *= tensor.size(d);
  }
  return true;
}

// What input + other allocates. torch's TensorIterator orders the dimensions by the strides of the first operand that
// tells them apart.
Tensor allocate_sum(const Tensor& input, const Tensor& other) {
  if (input.is_contiguous() && other.is_contiguous()) return torch::stable::new_empty(input, input.sizes());
  if (input.strides().equals(other.strides()) && is_dense(input)) return torch::stable::empty_like(input);
  const int dims = static_cast<int>(input.dim());
  const auto empty = [&](MemoryFormat format) {
    return torch::stable::empty(input.sizes(), input.scalar_type(), std::nullopt, input.device(), std::nullopt, format);
  };
  if (is_channels_last(input) && is_channels_last(other)) {
    return empty(dims == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d);
  }
  // 1: `a` belongs outside of `b`, -1: inside, 0: no operand tells
  const auto compare = [&](int a, int b) {
    for (const Tensor* operand : {&input, &other}) {
      const int64_t stride_a = operand->stride(a), stride_b = operand->stride(b);
      if (stride_a == 0 || stride_b == 0) continue;
      if (stride_a != stride_b) return stride_a < stride_b ? -1 : 1;
      if (input.size(a) > input.size(b)) return 1;
    }
    return 0;
  };
  std::vector<int> order(dims);  // from the innermost
  for (int i = 0; i < dims; ++i) order[i] = dims - 1 - i;
  for (int i = 1; i < dims; ++i) {
    int at = i;
    for (int before = i - 1; before >= 0; --before) {
      const int found = compare(order[before], order[at]);
      if (found > 0) {
        std::swap(order[before], order[at]);
        at = before;
      } else if (found < 0) {
        break;
      }
    }
  }
  IntList outer_sizes(dims), back(dims);
  for (int i = 0; i < dims; ++i) {
    outer_sizes[i] = input.size(order[dims - 1 - i]);
    back[order[dims - 1 - i]] = i;
  }
  const Tensor dense = torch::stable::new_empty(input, outer_sizes);
  return call<Tensor>("aten::permute", "", dense, back);
}

Tensor sum(const Tensor& input, const Tensor& other, Activation activation) {
  const Tensor output = allocate_sum(input, other);
  elementwise(Elementwise::kAdd, input, other, output, activation);
  return output;
}

}  // namespace
}  // namespace fastconv::cuda

FASTCONV_CUDA_LIBRARY(m) {
  fastconv::AddReluOperators<fastconv::cuda::sum, fastconv::cuda::activation_backward>::implement(m);
}
