#include "control.h"

#include "memory.h"

namespace fastconv::emulator {

void Control::add(const Statistics& more) {
  statistics.blocks += more.blocks;
  statistics.switches += more.switches;
  statistics.mma += more.mma;
  statistics.ldmatrix += more.ldmatrix;
  statistics.ldmatrix_conflicts += more.ldmatrix_conflicts;
  statistics.cp_async += more.cp_async;
  statistics.tma += more.tma;
  statistics.wgmma += more.wgmma;
  statistics.stmatrix += more.stmatrix;
  statistics.stmatrix_conflicts += more.stmatrix_conflicts;
}

Control& control() {
  static Control state;
  return state;
}

}  // namespace fastconv::emulator

using fastconv::emulator::control;

void fastconv_emulator_seed(uint64_t seed) { control().seed = seed; }

void fastconv_emulator_multiprocessors(int count) { control().device.multiprocessors = count; }

void fastconv_emulator_shared_per_block(int bytes) { control().device.shared_per_block = bytes; }

void fastconv_emulator_device(int arch, int multiprocessors, int threads_per_multiprocessor, int shared_per_block,
                              int shared_per_multiprocessor, int64_t l2_bytes) {
  control().device = {arch,    multiprocessors, threads_per_multiprocessor, shared_per_block, shared_per_multiprocessor,
                      l2_bytes};
}

void fastconv_emulator_reset_device() { control().device = fastconv::emulator::Control{}.device; }

int fastconv_emulator_checks_plain_accesses() {
#ifdef FASTCONV_EMULATOR_HOOKS
  return 1;
#else
  return 0;
#endif
}

void fastconv_emulator_name_memory(const char* name, const void* begin, uint64_t bytes, int writable) {
  const auto at = reinterpret_cast<uintptr_t>(begin);
  fastconv::emulator::global_ranges().push_back({at, at + bytes, writable != 0, 1, 1, name, {}});
}

void fastconv_emulator_forget_memory() { fastconv::emulator::global_ranges().clear(); }

const char* fastconv_emulator_statistics() {
  static std::string json;
  const std::lock_guard<std::mutex> lock(control().mutex);
  const auto& counts = control().statistics;
  json = "{\"launches\": {";
  for (const auto& [kernel, count] : control().launches) {
    json += (json.back() == '{' ? "\"" : ", \"") + kernel + "\": " + std::to_string(count);
  }
  json += "}, \"instructions\": {";
  for (const auto& [kernel, instructions] : control().instructions) {
    json += (json.back() == '{' ? "\"" : ", \"") + kernel + "\": " + fastconv::cuda::names_as_json(instructions);
  }
  json += "}, \"blocks\": " + std::to_string(counts.blocks) + ", \"switches\": " + std::to_string(counts.switches) +
          ", \"mma\": " + std::to_string(counts.mma) + ", \"ldmatrix\": " + std::to_string(counts.ldmatrix) +
          ", \"ldmatrix_conflicts\": " + std::to_string(counts.ldmatrix_conflicts) +
          ", \"cp_async\": " + std::to_string(counts.cp_async) + ", \"tma\": " + std::to_string(counts.tma) +
          ", \"wgmma\": " + std::to_string(counts.wgmma) + ", \"stmatrix\": " + std::to_string(counts.stmatrix) +
          ", \"stmatrix_conflicts\": " + std::to_string(counts.stmatrix_conflicts) + "}";
  return json.c_str();
}

void fastconv_emulator_reset_statistics() {
  const std::lock_guard<std::mutex> lock(control().mutex);
  control().launches.clear();
  control().instructions.clear();
  control().statistics = {};
}

void fastconv_emulator_plan_only(int on) {
  const std::lock_guard<std::mutex> lock(control().mutex);
  control().plans_only = on != 0;
  control().planned.clear();
}

const char* fastconv_emulator_planned() {
  static std::string json;
  const std::lock_guard<std::mutex> lock(control().mutex);
  json = "[" + control().planned + "]";
  control().planned.clear();
  return json.c_str();
}
