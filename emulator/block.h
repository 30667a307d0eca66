// The block that runs now, or the blocks of a cluster together: fibers (block.cpp), barriers and collectives
// (block_sync.cpp), memory (block_shared.cpp, block_global.cpp).
#pragma once

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "device_api.h"
#include "fiber.h"
#include "memory.h"

namespace fastconv::emulator {

// Where dynamic shared memory begins in the shared window: aligned to what launch.cuh promises and to no more.
constexpr uint32_t kSharedBase = 1024 + 128;
// Of the blocks of a cluster together
constexpr uint32_t kMostWarps = 64;

// Where in the kernel's source: known at once, or through the debug information of the instruction at `pc`.
struct Place {
  const char* file = nullptr;
  unsigned line = 0;
  const void* pc = nullptr;

  Place() = default;
  Place(const Where& where) : file(where.file_name()), line(where.line()) {}
  explicit Place(const void* pc) : pc(pc) {}
  bool operator==(const Place&) const = default;
};

struct Report {
  const char* kind;
  Place place;
  std::string text;
  uint64_t hits = 1;
};

struct Statistics {
  uint64_t blocks = 0, switches = 0, mma = 0, ldmatrix = 0, ldmatrix_conflicts = 0, cp_async = 0;
  uint64_t tma = 0, wgmma = 0, stmatrix = 0, stmatrix_conflicts = 0;
  cuda::Instructions instructions = 0;
};

struct Copy {
  const void* source;
  uint32_t destination;
  uint8_t bytes;
  bool predicate;
  Place place;
};

// What a lane brings to a collective of its warp
struct Contribution {
  Quad d, a;
  Pair b;
};

struct Fiber {
  Context context;
  uint3 index;
  uint16_t id;   // the threads of a cluster are numbered through
  uint8_t rank;  // of its block in the cluster
  uint8_t warp, lane;
  bool done;
  const char* waits_in;  // null while it can run
  Place waits_at;
  Quad result;  // of the last collective
  // Copies in order of issue, those from `landed` on still under way; `groups` are the ends of those that were
  // committed.
  std::vector<Copy> copies;
  size_t landed;
  std::vector<size_t> groups;
  size_t groups_landed;
};

struct Collective {
  const char* op = nullptr;  // null: free
  Place place;
  uint32_t mask = 0, arrived = 0;
  Contribution from[32];
};

struct Warp {
  uint32_t lanes = 0;  // that exist: the last warp of a block may be cut short
  uint32_t ready = 0, at_barrier = 0, done = 0;
  WarpClocks clocks;
  // Several at once, for disjoint masks
  std::array<Collective, 4> collectives;
};

// What each block of a cluster has for itself
struct Member {
  uint3 index;
  uint64_t flat_index;
  uint32_t live, at_barrier;
  Place barrier_place;
};

class Hopper;

class Block {
 public:
  Block(dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster);
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  // From the block of that index on those of a cluster. False when they were given up because of what the last report
  // says.
  bool run(uint64_t index, uint64_t seed, void (*call)(void*, const void*), void* kernel, const void* params);

  Fiber& self() { return *self_; }
  Warp& warp() { return warps_[self_->warp]; }
  // From the first call on in a block it also keeps the clocks and the shadow of shared memory.
  Hopper& hopper();
  bool owns_stack(uintptr_t address) const { return address - stacks_begin_ < stacks_bytes_; }
  uint3 index() const { return members_[self_->rank].index; }
  // Shared memory of the thread that runs. Other blocks' lies before and behind it, with offsets that go through.
  uint32_t own_begin() const { return self_->rank * shared_pitch_; }
  unsigned char* own_shared() const { return shared + own_begin(); }
  bool is_shared(uintptr_t address) const { return address - shared_begin_ < shared_reach_; }
  bool is_parameter(uintptr_t address) const { return address - params_begin_ < params_bytes_; }

  void report(const char* kind, const Place& place, const std::string& text);
  // Whether the same was reported there before, which then counts once more: to be asked where the text takes time.
  bool is_reported(const char* kind, const Place& place);
  [[noreturn]] void give_up(const char* kind, const Place& place, const std::string& text);

  // ---- memory; all of these check, and give up before harm is done. Offsets go through all blocks.
  void shared_read(uint32_t offset, uint32_t bytes, const Place& place);
  void shared_write(uint32_t offset, uint32_t bytes, bool asynchronous, const Place& place);
  void shared_read_by_warp(uint32_t offset, uint32_t bytes, const Place& place);
  uint32_t shared_offset(uint32_t address, uint32_t bytes, const char* op, const Place& place);
  void check_global(uintptr_t address, size_t bytes, bool write, const char* op, const Place& place);
  void access(const void* pointer, size_t bytes, bool write, bool aligned, const Place& place);

  // ---- synchronisation
  void sync_block(const Place& place);
  void sync_lanes(uint32_t mask);
  // Waits for the lanes of `mask`; the last one to come runs run(), which sets everyone's result.
  Quad collective(const char* op, uint32_t mask, const Contribution& mine, const Place& place,
                  void (*run)(Block&, const Collective&));
  Fiber& fiber_of_lane(int lane) { return fibers_[self_->warp * 32 + lane]; }

  // ---- asynchronous copies
  void cp_async(const Copy& copy);
  void cp_async_commit();
  void cp_async_wait(size_t pending);

  // What the kernel sees
  const dim3 grid, block;
  unsigned char* const shared;  // of the first block
  const size_t shared_bytes;
  const size_t params_bytes_ = 4096;

  std::vector<Report> reports;
  Statistics statistics;

 private:
  friend class Hopper;

  static void fiber_main();
  void finish();
  void switch_to_next();
  void wait(const char* op, const Place& place);
  Fiber& pick();
  uint32_t random() {
    random_ ^= random_ << 13;
    random_ ^= random_ >> 7;
    random_ ^= random_ << 17;
    return static_cast<uint32_t>(random_ >> 16);
  }
  int random_bit(uint32_t mask);
  int random_warp();
  void make_ready(int warp, uint32_t lanes);
  void land(const Copy& copy);
  std::string name(uint32_t thread) const;
  std::string of_block(uint32_t rank) const;
  std::string shared_place(uint32_t cell) const;
  bool ordered(uint32_t thread, uint32_t epoch, uint32_t clock);
  void check_shared_bounds(uintptr_t offset, size_t bytes, bool write, const Place& place);
  [[noreturn]] void deadlock();
  void yield();

  const uint32_t block_threads_;
  const uint32_t thread_pitch_, shared_pitch_;  // from one block of a cluster to the next, which begins a warpgroup
  const uint32_t threads_;                      // of all blocks, with those that only fill warpgroups
  std::vector<Member> members_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  Fiber* self_ = nullptr;
  Context main_;
  uint64_t ready_warps_ = 0;
  uint32_t live_ = 0;
  int sticky_ = 0;
  uint64_t random_ = 1;
  bool given_up_ = false;

  uint32_t epoch_ = 1, first_epoch_ = 1;
  std::vector<Cell> cells_;
  std::unique_ptr<Hopper> hopper_;
  bool has_hopper_ = false;  // whether it is in use

  void (*call_)(void*, const void*) = nullptr;
  void* kernel_ = nullptr;
  const void* params_ = nullptr;
  size_t last_range_ = 0;

  uintptr_t stacks_begin_ = 0, shared_begin_ = 0, params_begin_ = 0;
  size_t stacks_bytes_ = 0, shared_reach_ = 0;
};

// Null outside a kernel.
Block* current_block();

std::string describe(const Place& place);

}  // namespace fastconv::emulator
