// The words of one case where its kernel can reach them: in GPU memory (gpu/conformance_memory.cu), or known to the
// emulator (conformance_memory.cpp).
#pragma once

#include <cstdint>

class ConformanceMemory {
 public:
  ConformanceMemory(const uint32_t* in, int in_words, uint32_t* out, int out_words);
  ~ConformanceMemory();
  ConformanceMemory(const ConformanceMemory&) = delete;
  ConformanceMemory& operator=(const ConformanceMemory&) = delete;

  const uint32_t* in() const { return in_; }
  uint32_t* out() const { return out_; }
  // Waits for the kernel; afterwards the caller's `out` holds its words. Throws when the GPU reports an error.
  void fetch() const;

 private:
  uint32_t* in_ = nullptr;
  uint32_t* out_ = nullptr;
  uint32_t* target_;
  int out_words_;
};
