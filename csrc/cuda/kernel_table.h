// Every CUDA kernel of the library, as data: heuristics choose from it, Python shows it, tests go through it.
#pragma once

#include <string>
#include <vector>

namespace fastconv::cuda {

struct KernelInfo {
  const char* name;   // <op>_<pass>_<what discriminates>_<arch>; a launch is reported and counted under it
  const char* op;     // the stem of its file: the families among which a choice is made
  int arch;           // 80: runs on sm_80 and later
  int tile[3];        // what a block owns, M x N x K for GEMMs; 0 where it means nothing
  int stages;         // depth of the asynchronous pipeline, 0 without one
  int threads;        // of a block, at most
  int shared_bytes;   // dynamic shared memory of a block; -1 where the launch decides
  const char* needs;  // what it asks of its tensors, in words; "" when nothing
};

// All kernels, in the order of their files.
const std::vector<const KernelInfo*>& kernel_table();

// As JSON: a list of objects with the fields of KernelInfo.
const std::string& kernel_table_json();

// The name of the kernel that was forced upon `op`, or null when the heuristics are free. A launcher that is forced to
// a kernel which cannot take these tensors throws, it does not choose another.
const char* forced_kernel(const char* op);

// The entry `name` of `kernels`; throws std::runtime_error when there is none.
const KernelInfo& find_kernel(const std::vector<KernelInfo>& kernels, const char* name);

}  // namespace fastconv::cuda

extern "C" {
__attribute__((visibility("default"))) const char* fastconv_cuda_kernel_table();
// name null: back to the heuristics. Returns 0, or 1 when `op` has no kernel of that name.
__attribute__((visibility("default"))) int fastconv_cuda_force_kernel(const char* op, const char* name);
}
