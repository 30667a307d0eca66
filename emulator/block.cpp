// Running a block: its fibers in a random order, and what is said about them.
#include "block.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <new>

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

// ---- reports

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

}  // namespace fastconv::emulator
