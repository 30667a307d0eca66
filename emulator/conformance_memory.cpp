#include "conformance_memory.h"

#include "memory.h"

using fastconv::emulator::global_ranges;

ConformanceMemory::ConformanceMemory(const uint32_t* in, int in_words, uint32_t* out, int out_words)
    : in_(const_cast<uint32_t*>(in)), out_(out), target_(out), out_words_(out_words) {
  const auto name = [](const char* name, const uint32_t* begin, int words, bool writable) {
    const auto at = reinterpret_cast<uintptr_t>(begin);
    global_ranges().push_back({at, at + static_cast<uintptr_t>(words) * 4, writable, 1, 1, name, {}});
  };
  name("in", in, in_words, false);
  name("out", out, out_words, true);
}

ConformanceMemory::~ConformanceMemory() { global_ranges().clear(); }

void ConformanceMemory::fetch() const {}
