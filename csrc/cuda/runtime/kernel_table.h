// Every CUDA kernel of the library, as data: Python shows it, tests go through it.
#pragma once

#include <string>
#include <vector>

#include "cuda/runtime/arch.h"
#include "cuda/runtime/instructions.h"

namespace fastconv::cuda {

struct KernelInfo {
  std::string name;   // <op>_<pass>_<what discriminates>; a launch is reported and counted under it
  const char* op;     // those among which a choice is made have the same
  Arch arch;          // of the folder that it is built in
  int tile[3];        // what a block owns, M x N x K for GEMMs; 0 where it means nothing
  int stages;         // depth of the asynchronous pipeline, 0 without one
  int threads;        // of a block, at most
  int shared_bytes;   // dynamic shared memory of a block; -1 where the launch decides
  const char* needs;  // what it asks of its tensors, in words; "" when nothing
  Instructions uses;  // for some call, by what its launches run
};

// Adds a kernel, which is never moved or destroyed. `is_chosen`: whether it is a variant among which a choice is made,
// and which can be forced.
void list_kernel(const KernelInfo& kernel, bool is_chosen);

// Among the variants of `op`, the kernel of this name; null where there is none.
const KernelInfo* find_variant(const std::string& op, const std::string& name);

// Its number, which is quicker to look up; -1 where there is none.
int variant_number(const std::string& op, const std::string& name);

// Null where no variant has this number.
const KernelInfo* variant_of_number(int number);

// A kernel that is no variant of a choice, at namespace scope of its file
struct ListedKernel {
  explicit ListedKernel(const KernelInfo& kernel) : info(kernel) { list_kernel(info, false); }
  const KernelInfo info;
};

// All kernels, those of an op together, in the order in which they were added.
std::vector<const KernelInfo*> kernel_table();

}  // namespace fastconv::cuda

extern "C" {
// As JSON: a list of objects with the fields of KernelInfo.
__attribute__((visibility("default"))) const char* fastconv_cuda_kernel_table();
}
