// What a kernel is made of. The files of this folder know nothing of torch: pointers and plain
// structs come in.
//
// Each kernels/*.cpp is compiled once for every CPU capability (default, avx2, avx512), with that
// capability's instructions allowed throughout, and cpu/capability.h picks one at load time.
// Everything in this folder therefore lives in the namespace of its capability. Anything shared (an
// inline function of another header, a template of the standard library) would exist once for all
// of them, and the linker might keep the copy that an older CPU cannot run.
#pragma once

#include <cstdint>

#include "common/activation.h"

// The parameters of the kernels are the same for all capabilities; the functions are declared in
// each of them.
#define FASTCONV_DECLARE_KERNEL(Return, name, ...) \
  namespace cpu_default {                          \
  Return name(__VA_ARGS__);                        \
  }                                                \
  namespace cpu_avx2 {                             \
  Return name(__VA_ARGS__);                        \
  }                                                \
  namespace cpu_avx512 {                           \
  Return name(__VA_ARGS__);                        \
  }

namespace fastconv {

enum class DType { kFloat32, kFloat64, kBFloat16, kFloat16 };

}  // namespace fastconv
