#include "block.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

namespace fastconv::emulator {
namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kMaxThreads = 1024;
// Around shared memory, so that an access near to it is recognised as what it is.
constexpr size_t kSharedGuard = 64 * 1024;

// The first page of each stack is out of bounds, so that an overflow ends the process instead of spoiling a neighbour.
std::byte* stacks() {
  static std::byte* const memory = [] {
    void* pages = mmap(nullptr, kStackBytes * kMaxThreads, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED) throw std::bad_alloc();
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    for (size_t i = 0; i < kMaxThreads; ++i) mprotect(static_cast<char*>(pages) + i * kStackBytes, page, PROT_NONE);
    return static_cast<std::byte*>(pages);
  }();
  return memory;
}

unsigned char* allocate_shared(size_t bytes) {
  const size_t whole = (bytes + 2 * kSharedGuard + 128 + 255) / 256 * 256;
  auto* memory = static_cast<unsigned char*>(std::aligned_alloc(256, whole));
  if (memory == nullptr) throw std::bad_alloc();
  // 128 bytes are what launch.cuh promises, so no more than that.
  return memory + kSharedGuard + 128;
}

thread_local Block* running __attribute__((tls_model("initial-exec"))) = nullptr;

std::string text(const uint3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

}  // namespace

Block* current_block() { return running; }

Block::Block(dim3 grid, dim3 block, size_t shared_bytes)
    : grid(grid),
      block(block),
      shared(allocate_shared(shared_bytes)),
      shared_bytes(shared_bytes),
      threads_(block.x * block.y * block.z),
      fibers_(threads_),
      warps_((threads_ + 31) / 32),
      cells_((shared_bytes + 1) / 2) {
  stacks_begin_ = reinterpret_cast<uintptr_t>(stacks());
  stacks_bytes_ = kStackBytes * kMaxThreads;
  shared_begin_ = reinterpret_cast<uintptr_t>(shared) - kSharedGuard;
  shared_reach_ = shared_bytes + 2 * kSharedGuard;
}

Block::~Block() { std::free(shared - kSharedGuard - 128); }

// ---- running

bool Block::run(uint64_t index_of_block, uint64_t seed, void (*call)(void*, const void*), void* kernel,
                const void* params) {
  call_ = call;
  kernel_ = kernel;
  params_ = params;
  params_begin_ = reinterpret_cast<uintptr_t>(params);
  flat_index_ = index_of_block;
  index = {static_cast<unsigned>(index_of_block % grid.x), static_cast<unsigned>(index_of_block / grid.x % grid.y),
           static_cast<unsigned>(index_of_block / grid.x / grid.y)};
  random_ = (seed * 0x9e3779b97f4a7c15) ^ ((index_of_block + 1) * 0xd1b54a32d192ed03);
  random_ |= 1;
  for (int i = 0; i < 4; ++i) random();
  // How likely a warp goes on rather than another one: runs far ahead of the others, mostly, or hardly ever.
  constexpr int kSticky[] = {256, 240, 240, 0};
  sticky_ = kSticky[random() % 4];

  std::memset(shared, 0xff, shared_bytes);  // NaN in every floating type
  first_epoch_ = ++epoch_;
  at_barrier_ = 0;
  live_ = threads_;
  ready_warps_ = 0;
  for (size_t w = 0; w < warps_.size(); ++w) {
    Warp& warp = warps_[w];
    const uint32_t count = std::min<uint32_t>(32, threads_ - static_cast<uint32_t>(w) * 32);
    warp.lanes = count == 32 ? 0xffffffff : (1u << count) - 1;
    warp.ready = warp.at_barrier = warp.done = 0;
    warp.clocks.reset();
    for (Collective& collective : warp.collectives) collective.op = nullptr;
    make_ready(static_cast<int>(w), warp.lanes);
  }
  for (uint32_t t = 0; t < threads_; ++t) {
    Fiber& fiber = fibers_[t];
    fiber.index = {t % block.x, t / block.x % block.y, t / block.x / block.y};
    fiber.id = static_cast<uint16_t>(t);
    fiber.warp = static_cast<uint8_t>(t / 32);
    fiber.lane = static_cast<uint8_t>(t % 32);
    fiber.done = false;
    fiber.waits_in = nullptr;
    fiber.copies.clear();
    fiber.groups.clear();
    fiber.landed = fiber.groups_landed = 0;
    // Tops at different places of a page: all at the same one would share a few lines of the cache.
    const size_t colour = t * 192 % 4096;
    fiber.context.start_at(&fiber_main, stacks() + t * kStackBytes, kStackBytes - colour);
  }
  given_up_ = false;
  running = this;
  self_ = &pick();
  Context::jump(main_, self_->context);
  running = nullptr;
  self_ = nullptr;
  ++statistics.blocks;
  return !given_up_;
}

void Block::fiber_main() {
  Block& block = *running;
  block.call_(block.kernel_, block.params_);
  block.finish();
}

void Block::finish() {
  Fiber& fiber = *self_;
  if (fiber.landed != fiber.copies.size()) {
    report("copy never waited for", fiber.copies[fiber.landed].place,
           name(fiber.id) + " ends before this copy has landed");
  }
  Warp& warp = warps_[fiber.warp];
  for (const Collective& collective : warp.collectives) {
    if (collective.op && collective.mask >> fiber.lane & 1) {
      give_up("divergence", collective.place,
              std::string(collective.op) + " waits for " + name(fiber.id) + ", which has ended");
    }
  }
  if (at_barrier_) {
    give_up("divergence", barrier_place_, "__syncthreads waits for " + name(fiber.id) + ", which has ended");
  }
  fiber.done = true;
  warp.done |= 1u << fiber.lane;
  if (--live_ == 0) {
    Context::jump(fiber.context, main_);
  } else {
    switch_to_next();
  }
  std::abort();  // nobody resumes a fiber that is done
}

int Block::random_bit(uint32_t mask) {
  const int turn = static_cast<int>(random() & 31);
  return (std::countr_zero(std::rotr(mask, turn)) + turn) & 31;
}

Fiber& Block::pick() {
  int w = self_ ? self_->warp : 0;
  const bool stay = (ready_warps_ >> w & 1) && static_cast<int>(random() & 255) < sticky_;
  if (!stay) w = random_bit(ready_warps_);
  const int lane = random_bit(warps_[w].ready);
  warps_[w].ready &= ~(1u << lane);
  if (warps_[w].ready == 0) ready_warps_ &= ~(1u << w);
  return fibers_[w * 32 + lane];
}

void Block::make_ready(int warp, uint32_t lanes) {
  if (lanes == 0) return;
  warps_[warp].ready |= lanes;
  ready_warps_ |= 1u << warp;
}

void Block::switch_to_next() {
  if (ready_warps_ == 0) deadlock();
  Fiber& from = *self_;
  self_ = &pick();
  if (self_ == &from) return;
  ++statistics.switches;
  Context::jump(from.context, self_->context);
}

void Block::wait(const char* op, const Place& place) {
  Fiber& fiber = *self_;
  fiber.waits_in = op;
  fiber.waits_at = place;
  switch_to_next();
  fiber.waits_in = nullptr;
}

void Block::deadlock() {
  std::string list;
  int shown = 0;
  Place place;
  for (const Fiber& fiber : fibers_) {
    if (fiber.done || shown == 4) continue;
    if (shown++ == 0) place = fiber.waits_at;
    list += (list.empty() ? "" : "; ") + name(fiber.id) + " waits in " + (fiber.waits_in ? fiber.waits_in : "nothing") +
            " at " + describe(fiber.waits_at);
  }
  give_up("deadlock", place, "no thread can go on: " + list);
}

void Block::report(const char* kind, const Place& place, const std::string& text) {
  for (Report& report : reports) {
    if (report.kind == kind && report.place == place) {
      ++report.hits;
      return;
    }
  }
  reports.push_back({kind, place, "block " + emulator::text(index) + ": " + text});
}

void Block::give_up(const char* kind, const Place& place, const std::string& text) {
  report(kind, place, text);
  given_up_ = true;
  // The other fibers are never resumed. Nothing is lost: kernels own nothing that has a destructor.
  Context::jump(self_->context, main_);
  std::abort();
}

std::string Block::name(uint32_t thread) const {
  return "thread " + text(fibers_[thread].index) + (threads_ > 32 ? " of warp " + std::to_string(thread / 32) : "");
}

// ---- synchronisation

void Block::sync_block(const Place& place) {
  if (at_barrier_ == 0) {
    barrier_place_ = place;
  } else if (barrier_place_ != place) {
    give_up("divergence", place,
            name(self_->id) + " is at this __syncthreads while others are at " + describe(barrier_place_));
  }
  if (live_ != threads_) {
    give_up("divergence", place, name(self_->id) + " is at a __syncthreads that threads which have ended never reach");
  }
  if (++at_barrier_ < threads_) {
    warps_[self_->warp].at_barrier |= 1u << self_->lane;
    wait("__syncthreads", place);
    return;
  }
  at_barrier_ = 0;
  ++epoch_;
  for (size_t w = 0; w < warps_.size(); ++w) {
    make_ready(static_cast<int>(w), warps_[w].at_barrier);
    warps_[w].at_barrier = 0;
  }
  // The last one to come has no right to be the first one to go.
  make_ready(self_->warp, 1u << self_->lane);
  switch_to_next();
}

Quad Block::collective(const char* op, uint32_t mask, const Contribution& mine, const Place& place,
                       void (*run)(Block&, const Collective&)) {
  Fiber& fiber = *self_;
  Warp& warp = warps_[fiber.warp];
  if (!(mask >> fiber.lane & 1)) {
    give_up("divergence", place, name(fiber.id) + " is not in the mask of its own " + op);
  }
  if (mask & ~warp.lanes) {
    give_up("divergence", place, std::string(op) + " names lanes that the block does not have");
  }
  if (mask & warp.done) {
    give_up("divergence", place, std::string(op) + " in " + name(fiber.id) + " names lanes that have ended");
  }
  Collective* joined = nullptr;
  for (Collective& other : warp.collectives) {
    if (other.op == nullptr) {
      if (joined == nullptr) joined = &other;
    } else if (other.mask == mask) {
      // Of lanes whose masks only overlap, some may still be on their way: if not, there is a deadlock.
      if (other.op != op || other.place != place) {
        give_up("divergence", place,
                name(fiber.id) + " is at this " + op + " while lanes of its warp are in " + other.op + " at " +
                    describe(other.place));
      }
      joined = &other;
      break;
    }
  }
  if (joined == nullptr) give_up("divergence", place, "more than four collectives at once in one warp");
  if (joined->op == nullptr) {
    joined->op = op;
    joined->place = place;
    joined->mask = mask;
    joined->arrived = 0;
  }
  joined->from[fiber.lane] = mine;
  joined->arrived |= 1u << fiber.lane;
  if (joined->arrived != mask) {
    wait(op, place);
    return fiber.result;
  }
  run(*this, *joined);
  joined->op = nullptr;
  make_ready(fiber.warp, mask);
  switch_to_next();
  return fiber.result;
}

// ---- shared memory

uint32_t Block::shared_offset(uint32_t address, uint32_t bytes, const char* op, const Place& place) {
  const uint32_t offset = address - kSharedBase;
  if (address < kSharedBase || offset + bytes > shared_bytes) {
    give_up("out of bounds", place,
            std::string(op) + " of " + name(self_->id) + " at byte " + std::to_string(static_cast<int>(offset)) +
                " of " + std::to_string(shared_bytes) + " of shared memory");
  }
  if (address % bytes) {
    give_up("misaligned", place,
            std::string(op) + " of " + name(self_->id) + " at byte " + std::to_string(offset) +
                " of shared memory, not a multiple of " + std::to_string(bytes));
  }
  return offset;
}

std::string Block::shared_place(uint32_t cell) const { return "shared byte " + std::to_string(cell * 2); }

void Block::check_shared_bounds(uint32_t offset, uint32_t bytes, bool write, const Place& place) {
  // An offset below 0 is a large one here.
  if (offset < shared_bytes && offset + bytes <= shared_bytes) return;
  give_up("out of bounds", place,
          name(self_->id) + (write ? " writes " : " reads ") + std::to_string(bytes) + " bytes at byte " +
              std::to_string(static_cast<int>(offset)) + " of " + std::to_string(shared_bytes) + " of shared memory");
}

// Whether what `thread` did then is ordered before what runs now.
bool Block::ordered(uint32_t thread, uint32_t epoch, uint32_t clock) {
  if (epoch < epoch_ || thread == self_->id) return true;
  return thread / 32 == self_->warp && warp().clocks.known[self_->lane][thread % 32] >= clock;
}

void Block::shared_read(uint32_t offset, uint32_t bytes, const Place& place) {
  check_shared_bounds(offset, bytes, false, place);
  const Fiber& fiber = *self_;
  const auto& known = warp().clocks.known[fiber.lane];
  for (uint32_t c = offset / 2; c <= (offset + bytes - 1) / 2; ++c) {
    Cell& cell = cells_[c];
    if (cell.write_epoch < first_epoch_) {
      report("uninitialised", place, name(fiber.id) + " reads " + shared_place(c) + ", which nobody has written");
    } else if (cell.state == Cell::kInFlight) {
      report(
          "copy not waited for", place,
          name(fiber.id) + " reads " + shared_place(c) + ", to which a copy of " + name(cell.writer) + " is under way");
    } else if (!ordered(cell.writer, cell.write_epoch, cell.write_clock)) {
      report("race", place,
             name(fiber.id) + " reads " + shared_place(c) + ", not ordered after the write of " + name(cell.writer));
    }
    const uint32_t bit = 1u << fiber.lane;
    if (cell.read_epoch != epoch_) {
      cell.read_epoch = epoch_;
      cell.read_warp = fiber.warp;
      cell.other_read_warp = Cell::kNobody;
      cell.read_lanes = bit;
      cell.read_clock = known[fiber.lane];
    } else if (cell.read_warp != fiber.warp) {
      cell.other_read_warp = fiber.warp;
      cell.other_read_lane = fiber.lane;
    } else {
      bool all_known = true;
      for (uint32_t lanes = cell.read_lanes; lanes; lanes &= lanes - 1) {
        const int lane = std::countr_zero(lanes);
        all_known = all_known && (lane == fiber.lane || known[lane] >= cell.read_clock);
      }
      cell.read_clock = all_known ? known[fiber.lane] : std::min(cell.read_clock, known[fiber.lane]);
      cell.read_lanes = all_known ? bit : cell.read_lanes | bit;
    }
  }
}

void Block::shared_read_by_warp(uint32_t offset, uint32_t bytes, const Place& place) {
  const Fiber& fiber = *self_;
  const WarpClocks& clocks = warp().clocks;
  for (uint32_t c = offset / 2; c <= (offset + bytes - 1) / 2; ++c) {
    Cell& cell = cells_[c];
    if (cell.write_epoch < first_epoch_) {
      report("uninitialised", place,
             "warp " + std::to_string(fiber.warp) + " reads " + shared_place(c) + ", which nobody has written");
    } else if (cell.state == Cell::kInFlight) {
      report("copy not waited for", place,
             "warp " + std::to_string(fiber.warp) + " reads " + shared_place(c) + ", to which a copy of " +
                 name(cell.writer) + " is under way");
    } else if (cell.write_epoch == epoch_ &&
               (cell.writer / 32 != fiber.warp || clocks.everyone[cell.writer % 32] < cell.write_clock)) {
      report("race", place,
             "warp " + std::to_string(fiber.warp) + " reads " + shared_place(c) + ", not ordered after the write of " +
                 name(cell.writer));
    }
    if (cell.read_epoch != epoch_) {
      cell.read_epoch = epoch_;
      cell.read_warp = fiber.warp;
      cell.other_read_warp = Cell::kNobody;
    } else if (cell.read_warp != fiber.warp) {
      cell.other_read_warp = fiber.warp;
      cell.other_read_lane = fiber.lane;
      continue;
    }
    cell.read_lanes = warp().lanes;
    cell.read_clock = clocks.least;
  }
}

void Block::shared_write(uint32_t offset, uint32_t bytes, bool asynchronous, const Place& place) {
  check_shared_bounds(offset, bytes, true, place);
  const Fiber& fiber = *self_;
  const auto& known = warp().clocks.known[fiber.lane];
  for (uint32_t c = offset / 2; c <= (offset + bytes - 1) / 2; ++c) {
    Cell& cell = cells_[c];
    if (cell.write_epoch >= first_epoch_) {
      if (cell.state == Cell::kInFlight) {
        report("copy overtaken", place,
               name(fiber.id) + " writes " + shared_place(c) + ", to which a copy of " + name(cell.writer) +
                   " is under way");
      } else if (!ordered(cell.writer, cell.write_epoch, cell.write_clock)) {
        report("race", place,
               name(fiber.id) + " writes " + shared_place(c) + ", not ordered after the write of " + name(cell.writer));
      }
    }
    if (cell.read_epoch == epoch_) {
      int reader = -1;
      if (cell.read_warp != fiber.warp) {
        reader = cell.read_warp * 32 + std::countr_zero(cell.read_lanes);
      } else if (cell.other_read_warp != Cell::kNobody) {
        reader = cell.other_read_warp * 32 + cell.other_read_lane;
      } else {
        for (uint32_t lanes = cell.read_lanes & ~(1u << fiber.lane); lanes; lanes &= lanes - 1) {
          const int lane = std::countr_zero(lanes);
          if (known[lane] < cell.read_clock) reader = fiber.warp * 32 + lane;
        }
      }
      if (reader >= 0) {
        report("race", place,
               name(fiber.id) + " writes " + shared_place(c) + ", not ordered after the read of " +
                   name(static_cast<uint32_t>(reader)));
      }
      cell.read_epoch = 0;
    }
    cell.write_epoch = epoch_;
    cell.write_clock = known[fiber.lane];
    cell.writer = fiber.id;
    cell.state = asynchronous ? Cell::kInFlight : Cell::kWritten;
  }
}

// ---- asynchronous copies

void Block::cp_async(const Copy& copy) {
  const uint32_t offset = shared_offset(copy.destination, copy.bytes, "cp.async", copy.place);
  const uintptr_t source = reinterpret_cast<uintptr_t>(copy.source);
  if (source % copy.bytes) {
    give_up(
        "misaligned", copy.place,
        "cp.async of " + name(self_->id) + " from an address that is not a multiple of " + std::to_string(copy.bytes));
  }
  if (copy.predicate) check_global(source, copy.bytes, false, "cp.async", copy.place);
  shared_write(offset, copy.bytes, true, copy.place);
  // Neither the old nor the new value until it lands, and it lands when the program must have it: never sooner.
  std::memset(shared + offset, 0xff, copy.bytes);
  self_->copies.push_back(copy);
  ++statistics.cp_async;
}

void Block::cp_async_commit() { self_->groups.push_back(self_->copies.size()); }

void Block::cp_async_wait(size_t pending) {
  Fiber& fiber = *self_;
  while (fiber.groups.size() - fiber.groups_landed > pending) {
    const size_t end = fiber.groups[fiber.groups_landed++];
    for (; fiber.landed < end; ++fiber.landed) land(fiber.copies[fiber.landed]);
  }
  if (fiber.groups_landed == fiber.groups.size() && fiber.landed == fiber.copies.size()) {
    fiber.copies.clear();
    fiber.groups.clear();
    fiber.landed = fiber.groups_landed = 0;
  }
}

void Block::land(const Copy& copy) {
  const uint32_t offset = copy.destination - kSharedBase;
  if (copy.predicate) {
    std::memcpy(shared + offset, copy.source, copy.bytes);
  } else {
    std::memset(shared + offset, 0, copy.bytes);
  }
  for (uint32_t c = offset / 2; c <= (offset + copy.bytes - 1) / 2; ++c) {
    Cell& cell = cells_[c];
    // Who had overtaken it was reported then.
    cell.state = Cell::kWritten;
    cell.writer = self_->id;
    cell.write_epoch = epoch_;
    cell.write_clock = warp().clocks.known[self_->lane][self_->lane];
  }
}

// ---- global memory

namespace {

// Who wrote two bytes in this launch: block + 1, thread, epoch.
struct GlobalAccess {
  uint64_t bits;
  GlobalAccess(uint64_t block, uint32_t thread, uint32_t epoch)
      : bits((block + 1) << 32 | static_cast<uint64_t>(thread) << 22 | (epoch & 0x3fffff)) {}
  explicit GlobalAccess(uint64_t bits) : bits(bits) {}
  uint64_t block() const { return (bits >> 32) - 1; }
  uint32_t thread() const { return bits >> 22 & 0x3ff; }
  uint32_t epoch() const { return bits & 0x3fffff; }
};

}  // namespace

void Block::check_global(uintptr_t address, size_t bytes, bool write, const char* op, const Place& place) {
  std::vector<Range>& ranges = global_ranges();
  const auto inside = [&](const Range& range) {
    if (address < range.begin || address + bytes > range.end) return false;
    return range.run == range.pitch || (address - range.begin) % range.pitch + bytes <= range.run;
  };
  // Writable ranges win where two overlap, as a tensor that is read and its twin that is written in place do.
  Range* found = last_range_ < ranges.size() && inside(ranges[last_range_]) && (!write || ranges[last_range_].writable)
                     ? &ranges[last_range_]
                     : nullptr;
  if (found == nullptr) {
    for (size_t i = 0; i < ranges.size(); ++i) {
      if (!inside(ranges[i]) || (found && found->writable)) continue;
      found = &ranges[i];
      last_range_ = i;
    }
  }
  if (found == nullptr) {
    const Range* near = nullptr;
    int64_t best = INT64_MAX;
    bool gap = false;
    for (const Range& range : ranges) {
      const int64_t before = static_cast<int64_t>(range.begin) - static_cast<int64_t>(address);
      const int64_t past = static_cast<int64_t>(address + bytes) - static_cast<int64_t>(range.end);
      const int64_t distance = std::max({before, past, int64_t{0}});
      if (distance < best) {
        best = distance;
        near = &range;
        gap = distance == 0;
      }
    }
    std::string where = near == nullptr ? "outside of all tensors"
                        : gap           ? "between the rows of " + near->name
                                        : std::to_string(best) + " bytes " +
                                              (address < near->begin ? "before " : "past the end of ") + near->name;
    give_up("out of bounds", place,
            std::string(op) + " of " + std::to_string(bytes) + " bytes by " + name(self_->id) +
                (write ? ", written " : ", ") + where);
  }
  if (write && !found->writable) {
    give_up("write to an input", place, std::string(op) + " by " + name(self_->id) + " writes " + found->name);
  }
  if (!found->writable) return;

  if (found->writers.empty()) {
    if (!write) return;
    found->writers.assign((found->end - found->begin + 1) / 2, 0);
  }
  const GlobalAccess now(flat_index_, self_->id, epoch_);
  for (size_t c = (address - found->begin) / 2; c <= (address + bytes - 1 - found->begin) / 2; ++c) {
    uint64_t& writer = found->writers[c];
    if (writer != 0 && writer != now.bits) {
      const GlobalAccess then(writer);
      const char* verb = write ? " writes " : " reads ";
      if (then.block() != now.block()) {
        report("race between blocks", place,
               name(self_->id) + verb + "byte " + std::to_string(c * 2) + " of " + found->name +
                   ", which block number " + std::to_string(then.block()) + " has written in this launch");
      } else if (then.epoch() == now.epoch() && then.thread() / 32 != now.thread() / 32) {
        report("race", place,
               name(self_->id) + verb + "byte " + std::to_string(c * 2) + " of " + found->name +
                   ", not ordered after the write of " + name(then.thread()));
      }
    }
    if (write) writer = now.bits;
  }
}

void Block::access(const void* pointer, size_t bytes, bool write, bool aligned, const Place& place) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  if (owns_stack(address)) return;
  if (aligned && address % bytes) {
    give_up("misaligned", place,
            name(self_->id) + (write ? " writes " : " reads ") + std::to_string(bytes) +
                " bytes at an address that is " + std::to_string(address % bytes) + " past a multiple of that");
  }
  if (is_shared(address)) {
    const uint32_t offset = static_cast<uint32_t>(address - reinterpret_cast<uintptr_t>(shared));
    write ? shared_write(offset, static_cast<uint32_t>(bytes), false, place)
          : shared_read(offset, static_cast<uint32_t>(bytes), place);
    return;
  }
  if (!write && is_parameter(address)) return;
  check_global(address, bytes, write, write ? "store" : "load", place);
}

}  // namespace fastconv::emulator
