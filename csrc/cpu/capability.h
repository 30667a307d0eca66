// Which build of the kernels in cpu/kernels this machine runs.
#pragma once

namespace fastconv::cpu {

enum class Capability { kDefault, kAvx2, kAvx512 };

// The best that both the processor and this build have; FASTCONV_CPU_CAPABILITY=default|avx2|avx512
// in the environment lowers it. Asked once, when the library loads.
extern const Capability kCapability;

const char* capability_name();

}  // namespace fastconv::cpu

#if defined(FASTCONV_HAVE_AVX512)
#define FASTCONV_KERNEL(name)                                                                     \
  (fastconv::cpu::kCapability == fastconv::cpu::Capability::kAvx512 ? &fastconv::cpu_avx512::name \
   : fastconv::cpu::kCapability == fastconv::cpu::Capability::kAvx2 ? &fastconv::cpu_avx2::name   \
                                                                    : &fastconv::cpu_default::name)
#else
#define FASTCONV_KERNEL(name) (&fastconv::cpu_default::name)
#endif
