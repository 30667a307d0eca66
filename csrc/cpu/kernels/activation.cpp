// ReLU, ReLU6 and their masks, alone and behind an addition: bound by memory, one pass each.
#include "cpu/kernels/activation.h"

#include "cpu/kernels/vec.h"

namespace fastconv::FASTCONV_KERNEL_NAMESPACE {
namespace {

// f(bounds, input, other, Whole or Tail) for all vectors of begin ... end - 1
template <class F>
FASTCONV_INLINE void for_elements(const ActivationParams& params, int64_t begin, int64_t end, F&& f) {
  for_dtype(params.dtype, [&](auto element) {
    using T = decltype(element);
    const T* input = static_cast<const T*>(params.input) + begin;
    const T* other = static_cast<const T*>(params.other) + begin;
    T* output = static_cast<T*>(params.output) + begin;
    const Bounds<Compute<T>> bounds(params.activation);
    for_each_vector<Compute<T>>(
        end - begin, [&](int64_t i, auto part) { store(output + i, f(bounds, input + i, other + i, part), part); });
  });
}

}  // namespace

void activation_fprop(const ActivationParams& params, int64_t begin, int64_t end) {
  for_elements(params, begin, end,
               [](const auto& bounds, auto* input, auto*, auto part) { return bounds.clamp(load(input, part)); });
}

void add_activation_fprop(const ActivationParams& params, int64_t begin, int64_t end) {
  // Eager rounds the sum before the activation, this after it. The result is the same: rounding is
  // monotone, and 0 and 6 are numbers of every type.
  for_elements(params, begin, end, [](const auto& bounds, auto* input, auto* other, auto part) {
    return bounds.clamp(load(input, part) + load(other, part));
  });
}

void activation_dgrad(const ActivationParams& params, int64_t begin, int64_t end) {
  for_elements(params, begin, end, [](const auto& bounds, auto* grad, auto* output, auto part) {
    return bounds.mask(load(grad, part), load(output, part));
  });
}

}  // namespace fastconv::FASTCONV_KERNEL_NAMESPACE
