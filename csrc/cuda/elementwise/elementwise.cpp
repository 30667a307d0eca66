#include "cuda/elementwise/elementwise.h"

#include "common/layout.h"
#include "cuda/elementwise/plan.h"
#include "cuda/runtime/device.h"

namespace fastconv::cuda {
namespace {

// The strides of both inputs, in as few dimensions as they need; false if those are too many
bool set_strides(ElementwiseParams& params, const Tensor& output, const Tensor& input, const Tensor& other) {
  if (input.strides().equals(output.strides()) && other.strides().equals(output.strides())) return true;
  // The output's dimensions from the outermost to the innermost
  std::vector<int> order;
  for (int d = 0; d < output.dim(); ++d) {
    if (output.size(d) != 1) order.push_back(d);
  }
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return output.stride(a) > output.stride(b); });
  int dims = 0;
  for (const int d : order) {
    const int64_t size = output.size(d), input_stride = input.stride(d), other_stride = other.stride(d);
    // A dimension that continues the one before it in all tensors is one with it.
    if (dims > 0 && params.input_strides[dims - 1] == size * input_stride &&
        params.other_strides[dims - 1] == size * other_stride) {
      params.sizes[dims - 1] *= size;
      params.input_strides[dims - 1] = input_stride;
      params.other_strides[dims - 1] = other_stride;
      continue;
    }
    if (dims == kMaxElementwiseDims) return false;
    params.sizes[dims] = size;
    params.input_strides[dims] = input_stride;
    params.other_strides[dims] = other_stride;
    ++dims;
  }
  const bool flat = dims == 0 || (dims == 1 && params.input_strides[0] == 1 && params.other_strides[0] == 1);
  params.dims = flat ? 0 : dims;
  return true;
}

}  // namespace

void elementwise(Elementwise operation, const Tensor& input, const Tensor& other, const Tensor& output,
                 Activation activation) {
  if (output.numel() == 0) return;
  ElementwiseParams params{};
  if (!set_strides(params, output, input, other)) {
    return elementwise(operation, with_layout_of(output, input), with_layout_of(output, other), output, activation);
  }
  Device device(output);
  const void* const data = output.const_data_ptr();
  if (input.const_data_ptr() == data) {
    params.output = device.inout(output);
    params.input = params.output;
  } else {
    params.output = device.out(output);
    params.input = device.in(input);
  }
  if (operation != Elementwise::kActivate) params.other = device.in(other);
  params.numel = output.numel();
  params.activation = activation;
  params.dtype = element_type(output);
  launch_elementwise(operation, params, device.info(), device.stream());
}

}  // namespace fastconv::cuda
