// What the sources of kernels with planted bugs share: memory that the kernels may touch, and what the emulator said.
#pragma once

#include <cstdint>
#include <exception>
#include <string>

#include "memory.h"

#define API extern "C" __attribute__((visibility("default")))

namespace fastconv::cuda {

// Of each `pitch` bytes the kernels may touch so many; all of them where these are equal.
inline void name(const char* name, const void* begin, int64_t bytes, bool writable, int64_t run = 1,
                 int64_t pitch = 1) {
  const auto at = reinterpret_cast<uintptr_t>(begin);
  emulator::global_ranges().push_back({at,
                                       at + static_cast<uintptr_t>(bytes),
                                       writable,
                                       static_cast<size_t>(run),
                                       static_cast<size_t>(pitch),
                                       name,
                                       {}});
}

// What the emulator says; "" when it has nothing to say.
const char* attempt(auto&& run) {
  static std::string said;
  said.clear();
  try {
    run();
  } catch (const std::exception& error) {
    said = error.what();
  }
  emulator::global_ranges().clear();
  return said.c_str();
}

}  // namespace fastconv::cuda
