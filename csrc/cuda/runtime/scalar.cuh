// The arithmetic of the kernels that do without tensor cores: 16-bit types and float32 in float32, float64 in float64.
#pragma once

#include "cuda/runtime/launch.cuh"

namespace fastconv::cuda {

template <class T>
struct ComputeOf {
  using Type = float;
};
template <>
struct ComputeOf<double> {
  using Type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::Type;

// Neighbours in 16 bytes
template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

template <class T>
FASTCONV_DEVICE Compute<T> widen(T v) {
  if constexpr (sizeof(T) == 8) {
    return v;
  } else {
    return to_float(v);
  }
}

template <class T>
FASTCONV_DEVICE T narrow(Compute<T> v) {
  if constexpr (sizeof(T) == 8) {
    return v;
  } else {
    return from_float<T>(v);
  }
}

FASTCONV_DEVICE double activate(double v, Activation activation) {
  if (activation == Activation::kNone) return v;
  v = v < 0.0 ? 0.0 : v;
  return activation == Activation::kRelu6 && v > 6.0 ? 6.0 : v;
}

FASTCONV_DEVICE bool passes_gradient(double output, Activation activation) {
  if (activation == Activation::kNone) return true;
  return !(output <= 0.0) && !(activation == Activation::kRelu6 && output >= 6.0);
}

FASTCONV_DEVICE float fused_multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
FASTCONV_DEVICE double fused_multiply_add(double a, double b, double c) { return fma(a, b, c); }

template <class A, int kWidth>
FASTCONV_DEVICE void copy(const A* from, A (&to)[kWidth]) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) to[i] = from[i];
}

// N neighbours in the type of computation
template <class T, int N>
FASTCONV_DEVICE void load_wide(const T* source, Compute<T> (&values)[N]) {
  const Vec<T, N> vec = load<N>(source);
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = widen(vec.v[i]);
}

// The same, or zeros where there is nothing to load. A predicate of the load rather than a branch around what follows
// lets the loads of a loop go ahead together.
template <class T, int N>
FASTCONV_DEVICE void load_wide_if(bool exists, const T* source, Compute<T> (&values)[N]) {
  Vec<T, N> vec{};
  if (exists) vec = load<N>(source);
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = widen(vec.v[i]);
}

template <class T, int N>
FASTCONV_DEVICE void store_narrow(T* destination, const Compute<T> (&values)[N]) {
  Vec<T, N> vec;
#pragma unroll
  for (int i = 0; i < N; ++i) vec.v[i] = narrow<T>(values[i]);
  store(destination, vec);
}

template <class T>
struct ElementType {
  using Type = T;
};

// f(ElementType<T>{}) for the C++ type of `dtype`, on the host
template <class F>
void for_element_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat16:
      return f(ElementType<Half>{});
    case DType::kBFloat16:
      return f(ElementType<BFloat16>{});
    case DType::kFloat32:
      return f(ElementType<float>{});
    case DType::kFloat64:
      return f(ElementType<double>{});
  }
}

}  // namespace fastconv::cuda
