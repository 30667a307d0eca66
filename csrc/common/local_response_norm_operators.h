// local_response_norm and its backward: arguments checked and brought into one form, for the kernels of any backend.
// These take any dense tensor as it lies in memory.
#pragma once

#include "common/checks.h"
#include "common/layout.h"

namespace fastconv {

struct LocalResponseNormSettings {
  int64_t size;
  double alpha, beta, k;
  Activation activation;
};

// The functions of a backend, for dense tensors of one layout that are not empty:
//   void kForward(op, input, output, settings)
//   void kBackward(op, grad_output, input, grad_input, settings)
template <auto kForward, auto kBackward>
struct LocalResponseNormOperators {
  static Tensor local_response_norm(const Tensor& input, int64_t size, double alpha, double beta, double k,
                                    std::string activation) {
    constexpr auto kOp = "fastconv::local_response_norm";
    const Activation kind = check_local_response_norm(kOp, input, size, activation);
    const Tensor x = to_dense(input);
    const Tensor output = x.is_contiguous() ? torch::stable::new_empty(x, x.sizes()) : torch::stable::empty_like(x);
    if (x.numel() > 0) kForward(kOp, x, output, LocalResponseNormSettings{size, alpha, beta, k, kind});
    return output;
  }

  static Tensor local_response_norm_backward(const Tensor& grad_output, const Tensor& input, int64_t size, double alpha,
                                             double beta, double k, std::string activation) {
    constexpr auto kOp = "fastconv::local_response_norm_backward";
    const Activation kind = check_local_response_norm(kOp, input, size, activation);
    check_like_input(kOp, input, "grad_output", grad_output);
    check_same_shape(kOp, input, "grad_output", grad_output);
    const Tensor x = to_dense(input);
    const Tensor grad_input = torch::stable::empty_like(x);
    if (x.numel() > 0) {
      const LocalResponseNormSettings settings{size, alpha, beta, k, kind};
      kBackward(kOp, with_layout_of(x, grad_output), x, grad_input, settings);
    }
    return grad_input;
  }

  template <class Library>
  static void implement(Library& m) {
    m.impl("local_response_norm", TORCH_BOX(&local_response_norm));
    m.impl("local_response_norm_backward", TORCH_BOX(&local_response_norm_backward));
  }
};

}  // namespace fastconv
