// Tiny kernels, one or more for each instruction, words in, words out: whether a device does what the kernels were
// proved with. fastconv/qualification makes their words, and knows what should come out.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <vector>

#include "cuda/runtime/arch.h"
#include "cuda/runtime/instructions.h"
#include "cuda/runtime/launcher.h"

namespace fastconv::cuda {

struct ConformanceCase {
  const char* name;
  Instructions uses;  // what it tries
  const char* input;  // the kind of its words
  int in_words, out_words;
  bool exact;  // else the last bits are the hardware's own
  Arch arch;   // of the folder that it is built in
  void (*run)(const ConformanceCase& self, const uint32_t* in, uint32_t* out, Stream stream);
};

// At namespace scope of a file with cases: makes them known.
struct RegisterCases {
  RegisterCases(std::initializer_list<ConformanceCase> list);
};

}  // namespace fastconv::cuda

extern "C" {
// As JSON: a list of objects with the fields of ConformanceCase.
__attribute__((visibility("default"))) const char* fastconv_cuda_conformance_cases();
// Runs a case, by its place in the list, on the current device: `in` and `out` are memory of that, and as many words as
// the case says. Waits for nothing. Returns "", or what went wrong; valid until the thread's next call.
__attribute__((visibility("default"))) const char* fastconv_cuda_conformance_run(int index, const uint32_t* in,
                                                                                 uint32_t* out, void* stream);
}
