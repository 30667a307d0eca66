// The functions of device_api.h.
#include <dlfcn.h>

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string_view>

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "block.h"
#include "control.h"
#include "cuda/runtime/json.h"
#include "cuda/runtime/kernel_table.h"

namespace fastconv::emulator {
namespace {

Block& block() { return *current_block(); }

}  // namespace

void note(cuda::Instructions instructions) {
  if (Block* b = current_block()) b->statistics.instructions |= instructions;
}

uint3 thread_index() { return block().self().index; }
uint3 block_index() { return block().index; }
dim3 block_size() { return block().block; }
dim3 grid_size() { return block().grid; }
void* shared_memory() { return block().shared; }

uint32_t shared_address(const void* pointer, Where where) {
  Block& b = block();
  note(cuda::uses::kSmemAddress);
  const auto offset = static_cast<const unsigned char*>(pointer) - b.shared;
  if (!b.is_shared(reinterpret_cast<uintptr_t>(pointer))) {
    b.give_up("out of bounds", where, "the address of something that is not in shared memory is asked for");
  }
  return static_cast<uint32_t>(offset) + kSharedBase;
}

// ---- synchronisation

void sync_block(Where where) { block().sync_block(where); }

void sync_warp(uint32_t mask, Where where) {
  block().collective("__syncwarp", mask, {}, where,
                     [](Block& b, const Collective& all) { b.warp().clocks.sync(all.mask); });
}

uint32_t shuffle(Shuffle kind, uint32_t mask, uint32_t value, int operand, int width, Where where) {
  Block& b = block();
  note(cuda::uses::kShuffle);
  if (width < 1 || width > 32 || (width & (width - 1))) b.give_up("misuse", where, "a shuffle of an odd width");
  const int lane = b.self().lane;
  const int first = lane & ~(width - 1);
  int from = lane;
  if (kind == Shuffle::kIndex) from = first + (operand & (width - 1));
  if (kind == Shuffle::kXor) from = lane ^ operand;
  if (kind == Shuffle::kUp) from = lane - operand;
  if (kind == Shuffle::kDown) from = lane + operand;
  // Outside of its segment a lane gets its own value back.
  if (from < first || (from >= first + width)) from = lane;
  Contribution mine{};
  mine.d.v[0] = value;
  mine.d.v[1] = static_cast<uint32_t>(from);
  constexpr const char* kNames[] = {"__shfl_sync", "__shfl_xor_sync", "__shfl_up_sync", "__shfl_down_sync"};
  return b
      .collective(kNames[static_cast<int>(kind)], mask, mine, where,
                  [](Block& b, const Collective& all) {
                    for (int lane = 0; lane < 32; ++lane) {
                      if (!(all.mask >> lane & 1)) continue;
                      const uint32_t from = all.from[lane].d.v[1];
                      if (!(all.mask >> from & 1)) {
                        b.give_up(
                            "misuse", all.place,
                            std::string(all.op) + " reads lane " + std::to_string(from) + ", which takes no part");
                      }
                      b.fiber_of_lane(lane).result = all.from[from].d;
                    }
                  })
      .v[0];
}

uint32_t ballot(uint32_t mask, bool predicate, Where where) {
  note(cuda::uses::kShuffle);
  Contribution mine{};
  mine.d.v[0] = predicate;
  return block()
      .collective("a vote", mask, mine, where,
                  [](Block& b, const Collective& all) {
                    uint32_t votes = 0;
                    for (int lane = 0; lane < 32; ++lane) {
                      if (all.mask >> lane & 1) votes |= all.from[lane].d.v[0] << lane;
                    }
                    for (int lane = 0; lane < 32; ++lane) {
                      if (all.mask >> lane & 1) b.fiber_of_lane(lane).result = {{votes}};
                    }
                  })
      .v[0];
}

// ---- loads, stores, copies

Quad load(const void* source, int bytes, Where where) {
  note(cuda::uses::kLoadStore);
  if (Block* b = current_block()) b->access(source, static_cast<size_t>(bytes), false, true, where);
  Quad value{};
  std::memcpy(&value, source, static_cast<size_t>(bytes));
  return value;
}

void store(void* destination, Quad value, int bytes, Where where) {
  note(cuda::uses::kLoadStore);
  if (Block* b = current_block()) b->access(destination, static_cast<size_t>(bytes), true, true, where);
  std::memcpy(destination, &value, static_cast<size_t>(bytes));
}

void cp_async(int bytes, uint32_t destination, const void* source, bool predicate, Where where) {
  note(cuda::uses::kCpAsync);
  block().cp_async({source, destination, static_cast<uint8_t>(bytes), predicate, where});
}

void cp_async_commit() { block().cp_async_commit(); }
void cp_async_wait(int pending) { block().cp_async_wait(static_cast<size_t>(pending)); }

// ---- tensor cores

namespace {

template <int kMatrices, bool kTransposed>
void run_ldmatrix(Block& b, const Collective& all) {
  ++b.statistics.ldmatrix;
  for (int m = 0; m < kMatrices; ++m) {
    const unsigned char* rows[8];
    uint32_t address[8];
    for (int i = 0; i < 8; ++i) {
      address[i] = all.from[m * 8 + i].d.v[0];
      const uint32_t offset = b.shared_offset(address[i], 16, "ldmatrix", all.place);
      b.shared_read_by_warp(offset, 16, all.place);
      rows[i] = b.shared + offset;
    }
    // Eight rows come in one pass when they lie in different groups of four banks.
    int passes = 1;
    for (int i = 0; i < 8; ++i) {
      int same_banks = 1;
      for (int j = 0; j < i; ++j) same_banks += address[j] / 16 % 8 == address[i] / 16 % 8 && address[j] != address[i];
      passes = std::max(passes, same_banks);
    }
    b.statistics.ldmatrix_conflicts += static_cast<uint64_t>(passes - 1);
    for (int lane = 0; lane < 32; ++lane) {
      uint32_t& fragment = b.fiber_of_lane(lane).result.v[m];
      if constexpr (!kTransposed) {
        std::memcpy(&fragment, rows[lane / 4] + lane % 4 * 4, 4);
      } else {
        uint16_t low, high;
        std::memcpy(&low, rows[lane % 4 * 2] + lane / 4 * 2, 2);
        std::memcpy(&high, rows[lane % 4 * 2 + 1] + lane / 4 * 2, 2);
        fragment = low | static_cast<uint32_t>(high) << 16;
      }
    }
  }
}

float half_value(uint16_t bits) {
#ifdef __F16C__
  return _cvtsh_ss(bits);
#else
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t rest = static_cast<uint32_t>(bits & 0x7fff) << 13;
  if (rest >= 0x0f800000) return std::bit_cast<float>(sign | 0x70000000 | rest);
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(std::bit_cast<float>(rest) * 0x1p112f));
#endif
}

template <Mma kKind>
float element(uint32_t pair, int which) {
  const uint16_t bits = static_cast<uint16_t>(pair >> 16 * which);
  if constexpr (kKind == Mma::kHalf) return half_value(bits);
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

template <Mma kKind>
void run_mma(Block& b, const Collective& all) {
  constexpr int kDepth = kKind == Mma::kTf32 ? 8 : 16;
  ++b.statistics.mma;
  float left[16][kDepth], right[kDepth][8], sum[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Contribution& from = all.from[lane];
    const int g = lane / 4, t = lane % 4;
    if constexpr (kKind == Mma::kTf32) {
      // The 13 low bits do not count.
      for (int i = 0; i < 4; ++i) left[g + 8 * (i % 2)][t + 4 * (i / 2)] = std::bit_cast<float>(from.a.v[i] & ~0x1fffu);
      for (int i = 0; i < 2; ++i) right[t + 4 * i][g] = std::bit_cast<float>(from.b.v[i] & ~0x1fffu);
    } else {
      for (int e = 0; e < 2; ++e) {
        for (int i = 0; i < 4; ++i) left[g + 8 * (i % 2)][2 * t + e + 8 * (i / 2)] = element<kKind>(from.a.v[i], e);
        for (int i = 0; i < 2; ++i) right[2 * t + e + 8 * i][g] = element<kKind>(from.b.v[i], e);
      }
    }
    for (int i = 0; i < 4; ++i) sum[g + 8 * (i / 2)][2 * t + i % 2] = std::bit_cast<float>(from.d.v[i]);
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < kDepth; ++k) {
      for (int column = 0; column < 8; ++column) sum[row][column] += left[row][k] * right[k][column];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    Quad& result = b.fiber_of_lane(lane).result;
    for (int i = 0; i < 4; ++i) {
      result.v[i] = std::bit_cast<uint32_t>(sum[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2]);
    }
  }
}

}  // namespace

Quad ldmatrix(int matrices, bool transposed, uint32_t address, Where where) {
  note(cuda::uses::kLdmatrix);
  Contribution mine{};
  mine.d.v[0] = address;
  if (matrices == 4) {
    return transposed ? block().collective("ldmatrix.x4.trans", ~0u, mine, where, &run_ldmatrix<4, true>)
                      : block().collective("ldmatrix.x4", ~0u, mine, where, &run_ldmatrix<4, false>);
  }
  return transposed ? block().collective("ldmatrix.x2.trans", ~0u, mine, where, &run_ldmatrix<2, true>)
                    : block().collective("ldmatrix.x2", ~0u, mine, where, &run_ldmatrix<2, false>);
}

Quad mma(Mma kind, Quad d, Quad a, Pair b, Where where) {
  constexpr cuda::Instructions kInstructions[] = {cuda::uses::kMmaHalf, cuda::uses::kMmaBFloat16, cuda::uses::kMmaTf32};
  note(kInstructions[static_cast<int>(kind)]);
  const Contribution mine{d, a, b};
  switch (kind) {
    case Mma::kHalf:
      return block().collective("mma.m16n8k16.f16", ~0u, mine, where, &run_mma<Mma::kHalf>);
    case Mma::kBFloat16:
      return block().collective("mma.m16n8k16.bf16", ~0u, mine, where, &run_mma<Mma::kBFloat16>);
    default:
      return block().collective("mma.m16n8k8.tf32", ~0u, mine, where, &run_mma<Mma::kTf32>);
  }
}

// ---- launches

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

void check_limits(const cuda::KernelInfo& info, dim3 grid, dim3 block, size_t shared_bytes) {
  const auto refuse = [&](const std::string& what) {
    throw std::runtime_error("fastconv emulator: " + info.name + ": launched with " + what);
  };
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64) refuse(std::to_string(threads) + " threads to a block");
  if (grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) {
    refuse("a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " + std::to_string(grid.z));
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
            dim3 block, size_t shared_bytes, Where) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  check_limits(info, grid, block, shared_bytes);
  const std::lock_guard<std::mutex> lock(control().mutex);
  Control& state = control();
  ++state.launches[info.name];
  if (state.plans_only) {
    note_planned(info, kernel, grid, block, shared_bytes);
    return;
  }
  for (Range& range : global_ranges()) range.writers.clear();

  Block running(grid, block, shared_bytes);
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  // Some order that is not the obvious one: blocks may not rely on each other.
  uint64_t at = state.seed % blocks;
  const bool backwards = state.seed & 1;
  for (uint64_t i = 0; i < blocks; ++i) {
    if (!running.run(at, state.seed, call, kernel, params)) break;
    at = backwards ? (at + blocks - 1) % blocks : (at + 1) % blocks;
  }
  state.add(running.statistics);
  state.instructions[info.name] |= running.statistics.instructions;
  if (!running.reports.empty()) throw std::runtime_error(summary(info.name, running.reports));
}

}  // namespace fastconv::emulator
