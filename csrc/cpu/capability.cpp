#include "cpu/capability.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <string_view>

namespace fastconv::cpu {
namespace {

constexpr std::string_view kNames[] = {"default", "avx2", "avx512"};

Capability supported() {
#if defined(FASTCONV_HAVE_AVX512)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
               ? Capability::kAvx512
               : Capability::kAvx2;
  }
#endif
  return Capability::kDefault;
}

Capability chosen() {
  const char* wish = std::getenv("FASTCONV_CPU_CAPABILITY");
  const auto* name = std::find(std::begin(kNames), std::end(kNames), wish ? wish : "");
  if (name == std::end(kNames)) return supported();
  return std::min(supported(), static_cast<Capability>(name - std::begin(kNames)));
}

}  // namespace

const Capability kCapability = chosen();

const char* capability_name() { return kNames[static_cast<int>(kCapability)].data(); }

}  // namespace fastconv::cpu
