// What the cases for ptx/sm90a.cuh share: each is a kernel of one block, or of one cluster.
#pragma once

#include "cuda/conformance/conformance.h"
#include "cuda/ptx/sm90a.cuh"
#include "cuda/runtime/launch.cuh"

namespace fastconv::cuda::inline sm90a {
namespace conformance {

struct Params {
  const uint32_t* in;
  uint32_t* out;
  TensorMap map;  // of the case that has one
};

// Where boxes begin in shared memory, which begins elsewhere
constexpr unsigned kBoxAlignment = 1024;
constexpr int kRowWords = kBoxRowBytes / 4;

template <class Case>
FASTCONV_KERNEL(Case::kThreads, 1)
run(const __grid_constant__ Params p) {
  uint32_t* const shared = dynamic_smem<uint32_t>();
  Case::run(p, static_cast<int>(threadIdx.x), shared + (0 - ptx::smem_address(shared)) % kBoxAlignment / 4);
}

// Where a word of a box lies, its rows following each other
FASTCONV_DEVICE int swizzled(int word) { return word ^ word / kRowWords % 8 * 4; }

// One, or the cluster that the case asks for
template <class C>
constexpr unsigned blocks_of() {
  if constexpr (requires { C::kBlocks; }) return C::kBlocks;
  return 1;
}

template <class C>
void launch_case(const ConformanceCase& self, const uint32_t* in, uint32_t* out, Stream stream) {
  constexpr int kSharedBytes = C::kSharedBytes + static_cast<int>(kBoxAlignment);
  const KernelInfo info{self.name, "conformance", kArch, {0, 0, 0}, 0, C::kThreads, kSharedBytes, "", self.uses};
  Params params{in, out, {}};
  if constexpr (requires { C::map(in, out); }) params.map = C::map(in, out);
  constexpr unsigned kBlocks = blocks_of<C>();
  launch(info, &run<C>, {{kBlocks}, {C::kThreads}, kSharedBytes, kBlocks}, stream, params);
}

template <class C>
ConformanceCase make(const char* name, Instructions uses, const char* input = "bits", bool exact = true) {
  return {name, uses, input, C::kIn, C::kOut, exact, kArch, &launch_case<C>};
}

}  // namespace conformance
}  // namespace fastconv::cuda::inline sm90a
