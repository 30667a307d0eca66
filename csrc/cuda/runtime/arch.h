// For which GPUs a kernel is. The build defines the macros from the folder's name (_build/sources.py): FASTCONV_ARCH is
// 90 for sm90 and sm90a, FASTCONV_ARCH_ONLY is 1 for the latter.
#pragma once

namespace fastconv::cuda {

struct Arch {
  int number;         // 80 for compute capability 8.0
  bool only = false;  // whether it is for that one alone, else for all from there on

  bool runs_on(int device) const { return only ? device == number : device >= number; }
};

#ifdef FASTCONV_ARCH
constexpr Arch kArch{FASTCONV_ARCH, FASTCONV_ARCH_ONLY != 0};
#endif

}  // namespace fastconv::cuda
