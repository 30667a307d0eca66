// Neighbours on their way between memory and the type of computation: pairs of a 16-bit type stay together in a
// register, so that zeros, loads and selections cost one instruction for both.
#pragma once

#include <type_traits>

#include "cuda/runtime/scalar.cuh"

namespace fastconv::cuda {

template <class T, int N>
constexpr bool kInPairs = sizeof(T) == 2 && N % 2 == 0;

// N neighbours as they lie in memory
template <class T, int N>
using Packed = std::conditional_t<kInPairs<T, N>, Vec<uint32_t, (N + 1) / 2>, Vec<T, N>>;

// Zeros where there is nothing to load
template <int N, class T>
FASTCONV_DEVICE Packed<T, N> load_packed_if(bool exists, const T* source) {
  Packed<T, N> packed{};
  if constexpr (kInPairs<T, N>) {
    if (exists) packed = load<N / 2>(reinterpret_cast<const uint32_t*>(source));
  } else {
    if (exists) packed = load<N>(source);
  }
  return packed;
}

template <class T, int N>
FASTCONV_DEVICE void unpack(const Packed<T, N>& packed, Compute<T>* values) {
  if constexpr (kInPairs<T, N>) {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      const float2 pair = unpack2<T>(packed.v[i / 2]);
      values[i] = pair.x;
      values[i + 1] = pair.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = widen(packed.v[i]);
  }
}

template <class T, int N>
FASTCONV_DEVICE void store_packed(T* destination, const Compute<T> (&values)[N]) {
  if constexpr (kInPairs<T, N>) {
    Vec<uint32_t, N / 2> packed;
#pragma unroll
    for (int i = 0; i < N; i += 2) packed.v[i / 2] = pack2<T>(values[i], values[i + 1]);
    store(reinterpret_cast<uint32_t*>(destination), packed);
  } else {
    store_narrow(destination, values);
  }
}

}  // namespace fastconv::cuda
