// Running a block: its fibers in a random order, and what is said about them.
#include "block.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <new>

#include "hopper.h"

namespace fastconv::emulator {
namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kMaxThreads = kMostWarps * 32;
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

Block::Block(dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster)
    : grid(grid),
      block(block),
      shared(allocate_shared((shared_bytes + 255) / 256 * 256 * cluster)),
      shared_bytes(shared_bytes),
      block_threads_(block.x * block.y * block.z),
      thread_pitch_(cluster == 1 ? block_threads_ : (block_threads_ + 127) / 128 * 128),
      shared_pitch_(static_cast<uint32_t>((shared_bytes + 255) / 256 * 256)),
      threads_(thread_pitch_ * cluster),
      members_(cluster),
      fibers_(threads_),
      warps_((threads_ + 31) / 32),
      cells_(size_t{shared_pitch_} * cluster / 2) {
  for (Fiber& fiber : fibers_) fiber.done = true;
  stacks_begin_ = reinterpret_cast<uintptr_t>(stacks());
  stacks_bytes_ = kStackBytes * kMaxThreads;
  shared_begin_ = reinterpret_cast<uintptr_t>(shared) - kSharedGuard;
  shared_reach_ = size_t{shared_pitch_} * cluster + 2 * kSharedGuard;
}

Hopper& Block::hopper() {
  if (!has_hopper_) {
    if (!hopper_) hopper_ = std::make_unique<Hopper>(*this);
    hopper_->begin();
    has_hopper_ = true;
  }
  return *hopper_;
}

Block::~Block() { std::free(shared - kSharedGuard - 128); }

// ---- running

bool Block::run(uint64_t index_of_block, uint64_t seed, void (*call)(void*, const void*), void* kernel,
                const void* params) {
  call_ = call;
  kernel_ = kernel;
  params_ = params;
  params_begin_ = reinterpret_cast<uintptr_t>(params);
  for (uint64_t flat = index_of_block; Member& member : members_) {
    member.index = {static_cast<unsigned>(flat % grid.x), static_cast<unsigned>(flat / grid.x % grid.y),
                    static_cast<unsigned>(flat / grid.x / grid.y)};
    member.flat_index = flat++;
    member.live = block_threads_;
    member.at_barrier = 0;
  }
  random_ = (seed * 0x9e3779b97f4a7c15) ^ ((index_of_block + 1) * 0xd1b54a32d192ed03);
  random_ |= 1;
  for (int i = 0; i < 4; ++i) random();
  // How likely a warp goes on rather than another one: runs far ahead of the others, mostly, or hardly ever.
  constexpr int kSticky[] = {256, 240, 240, 0};
  sticky_ = kSticky[random() % 4];

  std::memset(shared, 0xff, shared_pitch_ * members_.size());  // NaN in every floating type
  first_epoch_ = ++epoch_;
  live_ = block_threads_ * static_cast<uint32_t>(members_.size());
  ready_warps_ = 0;
  for (size_t w = 0; w < warps_.size(); ++w) {
    Warp& warp = warps_[w];
    const uint32_t first = static_cast<uint32_t>(w) * 32 % thread_pitch_;
    const uint32_t count = std::min<uint32_t>(32, block_threads_ - std::min(first, block_threads_));
    warp.lanes = count == 32 ? 0xffffffff : (1u << count) - 1;
    warp.ready = warp.at_barrier = warp.done = 0;
    warp.clocks.reset();
    for (Collective& collective : warp.collectives) collective.op = nullptr;
    make_ready(static_cast<int>(w), warp.lanes);
  }
  for (uint32_t t = 0; t < threads_; ++t) {
    Fiber& fiber = fibers_[t];
    const uint32_t in_block = t % thread_pitch_;
    if (in_block >= block_threads_) continue;
    fiber.index = {in_block % block.x, in_block / block.x % block.y, in_block / block.x / block.y};
    fiber.id = static_cast<uint16_t>(t);
    fiber.rank = static_cast<uint8_t>(t / thread_pitch_);
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
  has_hopper_ = false;
  if (members_.size() > 1) hopper();
  running = this;
  self_ = &pick();
  Context::jump(main_, self_->context);
  running = nullptr;
  self_ = nullptr;
  statistics.blocks += members_.size();
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
  Member& member = members_[fiber.rank];
  if (member.at_barrier) {
    give_up("divergence", member.barrier_place, "__syncthreads waits for " + name(fiber.id) + ", which has ended");
  }
  if (has_hopper_) hopper_->check_end(fiber);
  fiber.done = true;
  warp.done |= 1u << fiber.lane;
  --live_;
  if (--member.live == 0 && has_hopper_) hopper_->check_end();
  if (live_ == 0) {
    Context::jump(fiber.context, main_);
  } else {
    if (has_hopper_) hopper_->end_cluster_sync();
    switch_to_next();
  }
  std::abort();  // nobody resumes a fiber that is done
}

int Block::random_bit(uint32_t mask) {
  const int turn = static_cast<int>(random() & 31);
  return (std::countr_zero(std::rotr(mask, turn)) + turn) & 31;
}

// random_bit prefers the bit after a gap, which would have some warpgroups always wait for others.
int Block::random_warp() {
  uint64_t left = ready_warps_;
  for (uint32_t before = random() % static_cast<uint32_t>(std::popcount(left)); before; --before) left &= left - 1;
  return std::countr_zero(left);
}

Fiber& Block::pick() {
  int w = self_ ? self_->warp : 0;
  const bool stay = (ready_warps_ >> w & 1) && static_cast<int>(random() & 255) < sticky_;
  if (!stay) w = has_hopper_ ? random_warp() : random_bit(static_cast<uint32_t>(ready_warps_));
  const int lane = random_bit(warps_[w].ready);
  warps_[w].ready &= ~(1u << lane);
  if (warps_[w].ready == 0) ready_warps_ &= ~(uint64_t{1} << w);
  return fibers_[w * 32 + lane];
}

void Block::make_ready(int warp, uint32_t lanes) {
  if (lanes == 0) return;
  warps_[warp].ready |= lanes;
  ready_warps_ |= uint64_t{1} << warp;
}

void Block::switch_to_next() {
  if (has_hopper_) hopper_->land_some();
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

void Block::yield() {
  make_ready(self_->warp, 1u << self_->lane);
  switch_to_next();
}

// One thread for each place where threads of a block wait
void Block::deadlock() {
  std::string list;
  std::vector<std::pair<int, Place>> places;
  for (const Fiber& fiber : fibers_) {
    const std::pair<int, Place> place{fiber.rank, fiber.waits_at};
    if (fiber.done || places.size() == 4 * members_.size()) continue;
    if (std::find(places.begin(), places.end(), place) != places.end()) continue;
    places.push_back(place);
    list += (list.empty() ? "" : "; ") + name(fiber.id) + " waits in " + (fiber.waits_in ? fiber.waits_in : "nothing") +
            " at " + describe(fiber.waits_at) + (has_hopper_ ? hopper_->waits_for(fiber) : "");
  }
  give_up("deadlock", places.front().second, "no thread can go on: " + list);
}

// ---- reports

bool Block::is_reported(const char* kind, const Place& place) {
  for (Report& report : reports) {
    if (report.kind != kind || report.place != place) continue;
    ++report.hits;
    return true;
  }
  return false;
}

void Block::report(const char* kind, const Place& place, const std::string& text) {
  if (is_reported(kind, place)) return;
  reports.push_back({kind, place, "block " + emulator::text(index()) + ": " + text});
}

void Block::give_up(const char* kind, const Place& place, const std::string& text) {
  report(kind, place, text);
  given_up_ = true;
  // The other fibers are never resumed. Nothing is lost: kernels own nothing that has a destructor.
  Context::jump(self_->context, main_);
  std::abort();
}

std::string Block::name(uint32_t thread) const {
  const std::string warp = block_threads_ > 32 ? " of warp " + std::to_string(thread % thread_pitch_ / 32) : "";
  return "thread " + text(fibers_[thread].index) + warp + of_block(thread / thread_pitch_);
}

// Where there are several
std::string Block::of_block(uint32_t rank) const {
  return members_.size() > 1 ? " of block " + text(members_[rank].index) : "";
}

}  // namespace fastconv::emulator
