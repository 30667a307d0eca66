// What the choice among kernels knows of the device that they would run on.
#pragma once

#include <cstdint>

namespace fastconv::cuda {

struct DeviceInfo {
  int arch;  // 80 for compute capability 8.0
  int multiprocessors;
  int threads_per_multiprocessor;
  int shared_per_block;           // bytes of dynamic shared memory, at most
  int shared_per_multiprocessor;  // bytes
  int64_t l2_bytes;
};

}  // namespace fastconv::cuda
