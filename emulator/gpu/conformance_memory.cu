#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "conformance_memory.h"

namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

}  // namespace

ConformanceMemory::ConformanceMemory(const uint32_t* in, int in_words, uint32_t* out, int out_words)
    : target_(out), out_words_(out_words) {
  check(cudaMalloc(&in_, static_cast<size_t>(in_words) * 4));
  check(cudaMalloc(&out_, static_cast<size_t>(out_words) * 4));
  check(cudaMemcpy(in_, in, static_cast<size_t>(in_words) * 4, cudaMemcpyHostToDevice));
  // What the caller put there shows where the kernel wrote nothing.
  check(cudaMemcpy(out_, out, static_cast<size_t>(out_words) * 4, cudaMemcpyHostToDevice));
}

ConformanceMemory::~ConformanceMemory() {
  cudaFree(in_);
  cudaFree(out_);
}

void ConformanceMemory::fetch() const {
  check(cudaDeviceSynchronize());
  check(cudaMemcpy(target_, out_, static_cast<size_t>(out_words_) * 4, cudaMemcpyDeviceToHost));
}
