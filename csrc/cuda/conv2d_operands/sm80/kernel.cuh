// What prepares the operands of conv2d:
//
//   pack      y[n,h,w,c] = x[n,c,h,w], 0 for the channels that x has not. A thread owns a pixel's vector.
//   gradient  dz = dy where the activation let z through, else 0, of several branches side by side, and sums of it over
//             chunks of the pixels. A block is x lanes of channels by y lanes of pixels; it adds up what its y lanes
//             have in shared memory.
//   bias      db[k] = sum of the chunks, always in the same order: y lanes share them.
//
// A thread's own sum is compensated, those of y lanes are added in pairs: rounding errors grow with the number of
// chunks, not with that of pixels.
//
// Bound by memory: every tensor once.
#pragma once

#include "cuda/conv2d_operands/params.h"
#include "cuda/runtime/divider.cuh"
#include "cuda/runtime/scalar.cuh"

namespace fastconv::cuda::inline sm80::operands {

template <class T, int kWidth>
FASTCONV_KERNEL(kPackThreads, 4)
pack(const PackParams p) {
  const int pixel = static_cast<int>(blockIdx.x) * kPackThreads + static_cast<int>(threadIdx.x);
  if (pixel >= p.pixels) return;
  const auto [n, h, w] = pixel_at(p.by_image, p.by_row, pixel);
  const T* const from = static_cast<const T*>(p.input) + (n * p.strides.n + h * p.strides.h + w * p.strides.w);
  T* const to = static_cast<T*>(p.packed) + int64_t{pixel} * p.packed_c;
  for (int first = static_cast<int>(blockIdx.y) * kWidth; first < p.packed_c;
       first += static_cast<int>(gridDim.y) * kWidth) {
    Vec<T, kWidth> values;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const int c = first + i;
      values.v[i] = from_float<T>(0.0f);
      if (c < p.c) values.v[i] = from[c * p.strides.c];
    }
    store(to + first, values);
  }
}

template <class T, int kWidth>
FASTCONV_KERNEL(kGradientThreads, 2)
gradient(const GradientParams p) {
  const GradientBranch& branch = p.branch[blockIdx.z];
  const int x = static_cast<int>(threadIdx.x), y = static_cast<int>(threadIdx.y);
  const int lanes = static_cast<int>(blockDim.x), rows = static_cast<int>(blockDim.y);
  const int channel = (static_cast<int>(blockIdx.y) * lanes + x) * kWidth;
  const bool is_real = channel < branch.k, is_written = channel < branch.padded && p.prepared != nullptr;
  const bool is_masked = p.activation != Activation::kNone;
  const int begin = static_cast<int>(blockIdx.x) * p.chunk, end = min(begin + p.chunk, p.pixels);
  const T* const grad = static_cast<const T*>(branch.grad) + channel;
  const T* const output = static_cast<const T*>(branch.output) + channel;
  T* const prepared = static_cast<T*>(p.prepared) + (branch.first + channel);
  float sums[kWidth] = {}, lost[kWidth] = {};  // Kahan's compensation

  for (int first = begin + y; first < end; first += rows * kGradientUnroll) {
    Vec<T, kWidth> dz[kGradientUnroll], z[kGradientUnroll];
#pragma unroll
    for (int u = 0; u < kGradientUnroll; ++u) {
      const int pixel = first + u * rows;
      const bool exists = pixel < end && is_real;
      const auto [n, row, column] = pixel_at(p.by_pixels, p.by_columns, pixel);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) dz[u].v[i] = from_float<T>(0.0f);
      if (exists) dz[u] = load<kWidth>(grad + (n * branch.y.n + row * branch.y.h + column * branch.y.w));
      z[u] = dz[u];
      if (exists && is_masked) z[u] = load<kWidth>(output + (n * branch.z.n + row * branch.z.h + column * branch.z.w));
    }
    float more[kWidth] = {};
#pragma unroll
    for (int u = 0; u < kGradientUnroll; ++u) {
      const int pixel = first + u * rows;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        if (!passes_gradient(to_float(z[u].v[i]), p.activation)) dz[u].v[i] = from_float<T>(0.0f);
        more[i] += to_float(dz[u].v[i]);
      }
      if (is_written && pixel < end) store(prepared + int64_t{pixel} * p.channels, dz[u]);
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float corrected = more[i] - lost[i], sum = sums[i] + corrected;
      lost[i] = (sum - sums[i]) - corrected;
      sums[i] = sum;
    }
  }
  if (p.sums == nullptr) return;

  float* const memory = dynamic_smem<float>();
  float* const own = memory + y * kWidth * lanes + x;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) own[i * lanes] = sums[i];
  __syncthreads();
  for (int half = rows / 2; half > 0; half /= 2) {  // rows: a power of two
    if (y < half) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) own[i * lanes] += own[(half * kWidth + i) * lanes];
    }
    __syncthreads();
  }
  if (y > 0 || !is_real) return;
  float* const to = p.sums + (int64_t{blockIdx.x} * p.channels + branch.first + channel);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) to[i] = own[i * lanes];
}

template <class T>
FASTCONV_KERNEL(kBiasX* kBiasY, 4)
bias(const GradientParams p) {
  const int x = static_cast<int>(threadIdx.x), y = static_cast<int>(threadIdx.y);
  const int channel = static_cast<int>(blockIdx.x) * kBiasX + x;
  int branch = 0;
  while (branch + 1 < p.branches && channel >= p.branch[branch + 1].first) ++branch;
  const GradientBranch& of = p.branch[branch];
  const bool is_real = channel - of.first < of.k;
  float sum = 0.0f;
  if (is_real) {
#pragma unroll 4
    for (int chunk = y; chunk < p.chunks; chunk += kBiasY) sum += p.sums[int64_t{chunk} * p.channels + channel];
  }
  float* const memory = dynamic_smem<float>();
  memory[y * kBiasX + x] = sum;
  __syncthreads();
  if (y > 0 || !is_real || of.grad_bias == nullptr) return;
  sum = 0.0f;
#pragma unroll
  for (int other = 0; other < kBiasY; ++other) sum += memory[other * kBiasX + x];
  static_cast<T*>(of.grad_bias)[channel - of.first] = from_float<T>(sum);
}

}  // namespace fastconv::cuda::inline sm80::operands
