// Launches: their checks, the blocks one after another, and what is said of what was found.
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string_view>

#include "block.h"
#include "control.h"
#include "cuda/runtime/json.h"
#include "cuda/runtime/kernel_table.h"

namespace fastconv::emulator {
namespace {

// The source line of an instruction, by the debug information: the innermost one that is not in a twin.
std::string source_line(const void* pc) {
  Dl_info info{};
  if (!dladdr(pc, &info) || info.dli_fname == nullptr) return "?";
  const auto offset = reinterpret_cast<uintptr_t>(pc) - 1 - reinterpret_cast<uintptr_t>(info.dli_fbase);
  char command[1200];
  std::snprintf(command, sizeof(command), "addr2line -i -e '%s' 0x%lx 2>/dev/null", info.dli_fname,
                static_cast<unsigned long>(offset));
  std::string line;
  if (FILE* pipe = popen(command, "r")) {
    char buffer[1024];
    while (std::fgets(buffer, sizeof(buffer), pipe)) {
      line = buffer;
      line = line.substr(0, line.find_first_of(" \n"));
      if (line.find("emulator/include/") == std::string::npos) break;
    }
    pclose(pipe);
  }
  if (line.empty() || line[0] == '?') return "offset " + std::to_string(offset) + " of " + info.dli_fname;
  // As __FILE__ reads, in which the compiler leaves this out
  constexpr std::string_view kRoot = FASTCONV_EMULATOR_ROOT;
  return line.starts_with(kRoot) ? line.substr(kRoot.size()) : line;
}

// What a report is about; of one kernel these are few.
std::string summary(const std::string& kernel, const std::vector<Report>& reports) {
  constexpr size_t kMost = 20;
  std::string text = "fastconv emulator: " + std::string(kernel) + ": " + std::to_string(reports.size()) +
                     (reports.size() == 1 ? " problem" : " problems");
  for (size_t i = 0; i < std::min(kMost, reports.size()); ++i) {
    const Report& report = reports[i];
    text += "\n  " + describe(report.place) + ": " + report.kind + ": " + report.text;
    if (report.hits > 1) text += " (" + std::to_string(report.hits) + " times)";
  }
  return text;
}

void check_limits(const cuda::KernelInfo& info, dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster) {
  const auto refuse = [&](const std::string& what) {
    throw std::runtime_error("fastconv emulator: " + info.name + ": launched with " + what);
  };
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64) refuse(std::to_string(threads) + " threads to a block");
  if (grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) {
    refuse("a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " + std::to_string(grid.z));
  }
  if (cluster < 1 || cluster > 8 || grid.x % cluster) {
    refuse("clusters of " + std::to_string(cluster) + " blocks in a grid of " + std::to_string(grid.x) + " along x");
  }
  if (cluster > 1 && (threads + 127) / 128 * 4 * cluster > kMostWarps) {
    refuse("clusters of " + std::to_string(threads * cluster) + " threads, for which the emulator has no room");
  }
  if (shared_bytes > static_cast<size_t>(control().device.shared_per_block)) {
    refuse(std::to_string(shared_bytes) + " bytes of shared memory");
  }
  if (threads > static_cast<uint64_t>(info.threads)) {
    refuse(std::to_string(threads) + " threads to a block, but the kernel table says at most " +
           std::to_string(info.threads));
  }
  if (info.shared_bytes >= 0 && shared_bytes != static_cast<size_t>(info.shared_bytes)) {
    refuse(std::to_string(shared_bytes) + " bytes of shared memory, but the kernel table says " +
           std::to_string(info.shared_bytes));
  }
}

void note_planned(const cuda::KernelInfo& info, const void* kernel, dim3 grid, dim3 block, size_t shared_bytes) {
  Dl_info library{};
  dladdr(kernel, &library);
  const auto code = reinterpret_cast<uintptr_t>(kernel) - reinterpret_cast<uintptr_t>(library.dli_fbase);
  std::string& text = control().planned;
  text += text.empty() ? "{" : ", {";
  text += "\"kernel\": " + cuda::quoted(info.name) + ", \"code\": " + std::to_string(code) + ", \"grid\": [" +
          std::to_string(grid.x) + ", " + std::to_string(grid.y) + ", " + std::to_string(grid.z) +
          "], \"threads\": " + std::to_string(block.x * block.y * block.z) +
          ", \"shared_bytes\": " + std::to_string(shared_bytes) + "}";
}

}  // namespace

std::string describe(const Place& place) {
  if (place.file) return std::string(place.file) + ":" + std::to_string(place.line);
  return place.pc ? source_line(place.pc) : "?";
}

void launch(const cuda::KernelInfo& info, void (*call)(void*, const void*), void* kernel, const void* params, dim3 grid,
            dim3 block, size_t shared_bytes, unsigned cluster, Where) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  check_limits(info, grid, block, shared_bytes, cluster);
  const std::lock_guard<std::mutex> lock(control().mutex);
  Control& state = control();
  ++state.launches[info.name];
  if (state.plans_only) {
    note_planned(info, kernel, grid, block, shared_bytes);
    return;
  }
  for (Range& range : global_ranges()) range.writers.clear();

  Block running(grid, block, shared_bytes, cluster);
  const uint64_t clusters = uint64_t{grid.x} * grid.y * grid.z / cluster;
  // Some order that is not the obvious one: blocks may not rely on each other, but for those of a cluster.
  uint64_t at = state.seed % clusters;
  const bool backwards = state.seed & 1;
  for (uint64_t i = 0; i < clusters; ++i) {
    if (!running.run(at * cluster, state.seed, call, kernel, params)) break;
    at = backwards ? (at + clusters - 1) % clusters : (at + 1) % clusters;
  }
  state.add(running.statistics);
  state.instructions[info.name] |= running.statistics.instructions;
  if (!running.reports.empty()) throw std::runtime_error(summary(info.name, running.reports));
}

}  // namespace fastconv::emulator
