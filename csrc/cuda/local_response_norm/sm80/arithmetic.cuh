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
//   lanes.cuh    NHWC and size 5
//   rows.cuh     NHWC
//   planes.cuh   NCHW and size 5
//   wide.cuh     any layout and size
//
// All are bound by memory: x once and y, or x, g and dx. Chosen among in ../plan.cpp.
#pragma once

#include "cuda/local_response_norm/params.h"
#include "cuda/ptx/sm80.cuh"
#include "cuda/runtime/packed.cuh"

namespace fastconv::cuda::inline sm80::lrn {

constexpr int kThreads = kLrnThreads;
constexpr int kWindow = kLrnWindow;
constexpr int kReach = kWindow / 2;

FASTCONV_DEVICE float square_root(float v) { return sqrtf(v); }
FASTCONV_DEVICE double square_root(double v) { return sqrt(v); }
FASTCONV_DEVICE float power(float base, float exponent) { return powf(base, exponent); }
FASTCONV_DEVICE double power(double base, double exponent) { return pow(base, exponent); }

template <class A>
FASTCONV_DEVICE const LrnCoefficients<A>& coefficients(const LocalResponseNormParams& p) {
  if constexpr (sizeof(A) == 8) {
    return p.coefficients;
  } else {
    return p.coefficients32;
  }
}

// d, of a sum of squares
template <class A>
FASTCONV_DEVICE A denominator(A squares, const LocalResponseNormParams& p) {
  return fused_multiply_add(coefficients<A>(p).scale, squares, coefficients<A>(p).k);
}

// v / d^beta, and that times x / d
template <class A>
struct Quotients {
  A scaled, term;
};

// For 16-bit results approximations do; float32 takes exact roots, and divides.
template <LrnPower kPower, class T, class A>
FASTCONV_DEVICE Quotients<A> quotients(A v, A x, A d, const LocalResponseNormParams& p) {
  const A beta = coefficients<A>(p).beta;
  if constexpr (kPower == LrnPower::kAny) {
    const A scaled = v / power(d, beta);
    return {scaled, scaled * x / d};
  } else if constexpr (sizeof(T) > 2) {
    const A root = square_root(d);
    const A scaled =
        v / (root * square_root(root));  // unlike sqrt(d * d * d), this overflows only where the result does
    return {scaled, scaled * x / d};
  } else {
    A factor, inverse_root;
    if constexpr (kPower == LrnPower::kRoots) {
      inverse_root = ptx::rsqrt_approx(d);
      factor = inverse_root * ptx::sqrt_approx(inverse_root);
    } else {
      const A logarithm = ptx::log2_approx(d);
      inverse_root = ptx::exp2_approx(A(-0.5) * logarithm);
      factor = ptx::exp2_approx(-beta * logarithm);
    }
    const A scaled = v * factor;
    return {scaled, scaled * (x * (inverse_root * inverse_root))};
  }
}

template <LrnPower kPower>
struct PowerTag {
  static constexpr LrnPower kValue = kPower;
};

// f(PowerTag<how this call has it>{}): one branch for all elements of a thread
template <class T, class F>
FASTCONV_DEVICE void with_power(const LocalResponseNormParams& p, F&& f) {
  if (p.power == LrnPower::kRoots) {
    f(PowerTag<LrnPower::kRoots>{});
  } else if (sizeof(T) == 2 && p.power == LrnPower::kExp2) {
    if constexpr (sizeof(T) == 2) f(PowerTag<LrnPower::kExp2>{});
  } else {
    f(PowerTag<LrnPower::kAny>{});
  }
}

// x to y, of the sums of squares
template <class T, class A, int kWidth>
FASTCONV_DEVICE void normalize(A (&values)[kWidth], const A (&squares)[kWidth], const LocalResponseNormParams& p) {
  with_power<T>(p, [&](auto tag) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      values[i] = quotients<decltype(tag)::kValue, T>(values[i], A(0), denominator(squares[i], p), p).scaled;
    }
  });
}

// g to g / d^beta, and the sums of squares to t
template <class T, class A, int kWidth>
FASTCONV_DEVICE void make_terms(A (&grads)[kWidth], const A (&x)[kWidth], A (&sums)[kWidth],
                                const LocalResponseNormParams& p) {
  with_power<T>(p, [&](auto tag) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const Quotients<A> found = quotients<decltype(tag)::kValue, T>(grads[i], x[i], denominator(sums[i], p), p);
      grads[i] = found.scaled;
      sums[i] = found.term;
    }
  });
}

// dx from its two terms, of which the second lacks a factor
template <bool kActivated, class A, int kWidth>
FASTCONV_DEVICE void make_gradients(A (&scaled)[kWidth], const A (&x)[kWidth], const A (&sums)[kWidth],
                                    const LocalResponseNormParams& p) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const A gradient = fused_multiply_add(-coefficients<A>(p).slope * x[i], sums[i], scaled[i]);
    scaled[i] = !kActivated || passes_gradient(x[i], p.activation) ? gradient : A(0);
  }
}

// The sums of kWindow neighbours (or of their squares) from each of the first kWidth on: of pairs, which two sums
// share.
template <bool kSquares, class A, int kWidth, int kLength>
FASTCONV_DEVICE void sum_windows(const A (&values)[kLength], A (&sums)[kWidth]) {
  static_assert(kWindow == 5 && kLength == kWidth + kWindow - 1 && kWidth % 2 == 0);
  const auto plus = [](A sum, A v) { return kSquares ? fused_multiply_add(v, v, sum) : sum + v; };
  A pairs[kLength / 2];
#pragma unroll
  for (int i = 0; i < kLength / 2; ++i) {
    const A v = values[2 * i];
    pairs[i] = plus(kSquares ? v * v : v, values[2 * i + 1]);
  }
#pragma unroll
  for (int i = 0; i + 1 < kLength / 2; ++i) {
    const A four = pairs[i] + pairs[i + 1];
    if (2 * i < kWidth) sums[2 * i] = plus(four, values[2 * i + 4]);
    if (i > 0) sums[2 * i - 1] = plus(four, values[2 * i - 1]);
  }
}

}  // namespace fastconv::cuda::inline sm80::lrn
