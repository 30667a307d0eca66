// What the kernels of local response normalisation across channels share (Krizhevsky, Sutskever, Hinton 2012, section
// 3.3):
//
//   s_c = sum of x_j^2 over the window of c      d_c = k + alpha / size * s_c      y_c = x_c / d_c^beta
//   dx_i = g_i / d_i^beta - 2 alpha beta / size * x_i * sum over {j: i in the window of j} of t_j
//   t_j = g_j x_j / (d_j^beta d_j)
//
// x is the input, or what an activation makes of it while it is loaded; dx is then 0 where x lets no gradient pass.
// Nothing but the input is needed for the gradient. Every sum is taken afresh from its own terms: a running one would
// let a NaN or a cancellation leak out of its window.
//
//   planes.cuh   NCHW and size 5
//   rows.cuh     NHWC
//   wide.cuh     any layout and size
//
// All are bound by memory: x once and y, or x, g and dx. Chosen among in ../plan.cpp.
#pragma once

#include "cuda/local_response_norm/params.h"
#include "cuda/runtime/scalar.cuh"

namespace fastconv::cuda::inline sm80::lrn {

constexpr int kThreads = kLrnThreads;
constexpr int kWindow = kLrnWindow;

FASTCONV_DEVICE float square_root(float v) { return sqrtf(v); }
FASTCONV_DEVICE double square_root(double v) { return sqrt(v); }
FASTCONV_DEVICE float power(float base, float exponent) { return powf(base, exponent); }
FASTCONV_DEVICE double power(double base, double exponent) { return pow(base, exponent); }

template <class A>
struct Coefficients {
  FASTCONV_DEVICE explicit Coefficients(const LocalResponseNormParams& p)
      : scale(static_cast<A>(p.scale)),
        k(static_cast<A>(p.k)),
        beta(static_cast<A>(p.beta)),
        slope(static_cast<A>(2 * p.scale * p.beta)),
        three_quarters(p.beta == 0.75),
        activation(p.activation) {}
  A scale, k, beta, slope;
  bool three_quarters;
  Activation activation;
};

// dx from its two terms, of which the second lacks a factor
template <class A>
FASTCONV_DEVICE A gradient(A scaled, A x, A sum, const Coefficients<A>& of) {
  return passes_gradient(x, of.activation) ? scaled - of.slope * x * sum : A(0);
}

// v / d^beta for any d as pow() has it. For 16-bit results two approximate roots do; float32 takes exact ones, and
// divides.
template <class T, class A>
FASTCONV_DEVICE A over_power(A v, A d, const Coefficients<A>& of) {
  if (!of.three_quarters) return v / power(d, of.beta);
  if constexpr (sizeof(T) == 2) {
    const float inverse_root = rsqrtf(d);
    return v * (inverse_root * sqrtf(inverse_root));
  } else {
    const A root = square_root(d);
    return v / (root * square_root(root));  // unlike sqrt(d * d * d), this overflows only where the result does
  }
}

}  // namespace fastconv::cuda::inline sm80::lrn
