// What tests set and ask.
#pragma once

#include <map>
#include <mutex>
#include <string>

#include "block.h"
#include "cuda/runtime/device_info.h"

namespace fastconv::emulator {

struct Control {
  std::mutex mutex;  // one launch at a time
  uint64_t seed = 1;
  // Compute capability 8.6, which has the least shared memory of those that the kernels are for; few multiprocessors,
  // so that small tensors fill them
  cuda::DeviceInfo device{86, 4, 1536, 99 * 1024, 100 * 1024, 2 << 20};
  std::map<std::string, uint64_t> launches;                // by kernel
  Statistics statistics;                                   // of all kernels together
  std::map<std::string, cuda::Instructions> instructions;  // by kernel
  bool plans_only = false;  // launches are checked and noted, but no block runs, and no tensor is touched
  std::string planned;      // these launches, as JSON

  void add(const Statistics& more);
};

Control& control();

}  // namespace fastconv::emulator

#define FASTCONV_EMULATOR_API extern "C" __attribute__((visibility("default")))

FASTCONV_EMULATOR_API void fastconv_emulator_seed(uint64_t seed);
FASTCONV_EMULATOR_API void fastconv_emulator_multiprocessors(int count);
FASTCONV_EMULATOR_API void fastconv_emulator_shared_per_block(int bytes);
// The emulated GPU, all of it
FASTCONV_EMULATOR_API void fastconv_emulator_device(int arch, int multiprocessors, int threads_per_multiprocessor,
                                                    int shared_per_block, int shared_per_multiprocessor,
                                                    int64_t l2_bytes);
// Back to what it was at first
FASTCONV_EMULATOR_API void fastconv_emulator_reset_device();
// 1 when the kernels' plain loads and stores are seen
FASTCONV_EMULATOR_API int fastconv_emulator_checks_plain_accesses();
// Until they are forgotten, this thread's launches may touch these bytes, besides what tensors of an op are.
FASTCONV_EMULATOR_API void fastconv_emulator_name_memory(const char* name, const void* begin, uint64_t bytes,
                                                         int writable);
FASTCONV_EMULATOR_API void fastconv_emulator_forget_memory();
// Launches and instructions by kernel and other counts since the last reset, as JSON; valid until the next call
FASTCONV_EMULATOR_API const char* fastconv_emulator_statistics();
FASTCONV_EMULATOR_API void fastconv_emulator_reset_statistics();
// Whether from now on launches are checked and noted, but no block runs, and no tensor is touched, whatever its size;
// forgets what was noted
FASTCONV_EMULATOR_API void fastconv_emulator_plan_only(int on);
// The launches that were noted, as JSON, a list of {"kernel", "code", "grid", "threads", "shared_bytes"}, of which
// `code` is where the kernel lies in this library; forgets them. Valid until the next call
FASTCONV_EMULATOR_API const char* fastconv_emulator_planned();
