// Barriers in shared memory, barriers of some warps, registers that warpgroups hand each other.
#include <algorithm>

#include "hopper.h"

namespace fastconv::emulator {

// ---- mbarriers

void Hopper::mbarrier_init(uint32_t address, int arrivals, const Place& place) {
  const uint32_t offset = block_.shared_offset(address, 8, "mbarrier.init", place);
  const Fiber& fiber = *block_.self_;
  if (arrivals < 1 || arrivals >= 1 << 20) {
    block_.give_up("misuse", place, "an mbarrier of " + std::to_string(arrivals) + " arrivals");
  }
  int16_t& number = barrier_at_[offset / 8];
  if (number >= 0) {
    Mbarrier& old = barriers_[static_cast<size_t>(number)];
    if (old.pending != old.arrivals || old.bytes != 0 || !old.waiting.empty()) {
      block_.give_up("misuse", place, block_.name(fiber.id) + " initialises " + describe(old) + ", in use");
    }
    for (uint32_t e = offset / 2; e < offset / 2 + 4; ++e) elements_[e].state = Element::kWritten;
  }
  write(fiber, offset, 8, false, place);
  for (uint32_t e = offset / 2; e < offset / 2 + 4; ++e) elements_[e].state = Element::kBarrier;

  Mbarrier barrier{};
  barrier.offset = offset;
  barrier.agent = number >= 0 ? barriers_[static_cast<size_t>(number)].agent
                              : add_agent("the mbarrier at " + block_.shared_place(offset / 2), place);
  // Boxes of a former life are known by its phases.
  barrier.first_phase = barrier.phase = number >= 0 ? (barriers_[static_cast<size_t>(number)].phase + 1) & ~1u : 0;
  barrier.arrivals = barrier.pending = arrivals;
  barrier.initialiser = fiber.id;
  barrier.initialised = now(fiber.id);
  barrier.place = place;
  barrier.gathering.assign(columns_, 0);
  barrier.released.assign(columns_, 0);
  if (number >= 0) {
    barriers_[static_cast<size_t>(number)] = std::move(barrier);
  } else {
    number = static_cast<int16_t>(barriers_.size());
    barriers_.push_back(std::move(barrier));
  }
}

void Hopper::mbarrier_init_fence() {
  for (Mbarrier& barrier : barriers_) barrier.fenced |= barrier.initialiser == block_.self_->id;
  fence_proxy_async();
}

// The barrier at an address in a block of the cluster, when it may be used there
Mbarrier& Hopper::mbarrier(uint32_t address, uint32_t rank, const char* op, bool asynchronous, const Place& place) {
  const uint32_t offset =
      block_.shared_offset(address, 8, op, place) - block_.own_begin() + rank * block_.shared_pitch_;
  const int number = barrier_at_[offset / 8];
  const uint32_t thread = block_.self_->id;
  if (number < 0) {
    block_.give_up("misuse", place,
                   std::string(op) + " of " + block_.name(thread) + " at " + block_.shared_place(offset / 2) +
                       ", where no mbarrier was initialised");
  }
  Mbarrier& barrier = barriers_[static_cast<size_t>(number)];
  if (!knows(thread, barrier.initialiser, barrier.initialised)) {
    block_.report("race", place,
                  std::string(op) + " of " + block_.name(thread) + ", not ordered after the initialisation of " +
                      describe(barrier));
  } else if (!barrier.fenced && (asynchronous || barrier.initialiser != thread)) {
    block_.report("missing proxy fence", place,
                  std::string(op) + " of " + block_.name(thread) + ", but no mbarrier_init_fence has followed the " +
                      "initialisation of " + describe(barrier));
  }
  return barrier;
}

void Hopper::mbarrier_arrive(uint32_t address, uint32_t expected_bytes, const Place& place) {
  arrive(mbarrier(address, block_.self_->rank, "mbarrier.arrive", false, place), expected_bytes, place);
}

void Hopper::arrive(Mbarrier& barrier, uint32_t expected_bytes, const Place& place) {
  const uint32_t thread = block_.self_->id;
  if (barrier.pending == 0) {
    block_.give_up("misuse", place,
                   block_.name(thread) + " arrives at " + describe(barrier) + ", where all " +
                       std::to_string(barrier.arrivals) + " have arrived in this phase");
  }
  barrier.bytes += expected_bytes;
  if (barrier.bytes >= 1 << 20) {
    block_.give_up("misuse", place,
                   describe(barrier) + " expects " + std::to_string(barrier.bytes) + " bytes, 2^20 or more");
  }
  if (--barrier.pending == 0 && barrier.bytes < 0) {
    block_.give_up("misuse", place,
                   std::to_string(-barrier.bytes) + " bytes more than are expected have come to " + describe(barrier));
  }
  join(barrier.gathering.data(), known(thread));
  ++known(thread)[thread];
  end_phase(barrier);
}

void Hopper::end_phase(Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.arrivals;
  ++barrier.phase;
  barrier.released.swap(barrier.gathering);
  barrier.released[barrier.agent] = barrier.phase;
  std::fill(barrier.gathering.begin(), barrier.gathering.end(), 0);
  for (const uint16_t t : barrier.waiting) block_.make_ready(t / 32, 1u << t % 32);
  barrier.waiting.clear();
}

void Hopper::mbarrier_wait(uint32_t address, uint32_t parity, const Place& place) {
  Mbarrier* barrier = &mbarrier(address, block_.self_->rank, "mbarrier.try_wait", false, place);
  const auto number = barrier - barriers_.data();
  const uint32_t thread = block_.self_->id;
  if (parity > 1) block_.give_up("misuse", place, "a parity of " + std::to_string(parity));
  if (block_.random() % 8 == 0) block_.yield();
  for (;;) {
    barrier = &barriers_[static_cast<size_t>(number)];  // others may have been added
    if ((barrier->phase & 1) != parity) break;
    barrier->waiting.push_back(static_cast<uint16_t>(thread));
    waits_for_[thread] = static_cast<int>(number * 2 + parity);
    block_.wait("mbarrier.try_wait", place);
    waits_for_[thread] = -1;
  }
  join(known(thread), barrier->released.data());
  barrier->waited = barrier->phase;
}

std::string Hopper::waits_for(const Fiber& fiber) const {
  const int waits = waits_for_[fiber.id];
  if (waits < 0) return "";
  const Mbarrier& barrier = barriers_[static_cast<size_t>(waits / 2)];
  return " (" + describe(barrier) + ", parity " + std::to_string(waits % 2) + ", in phase " +
         std::to_string(barrier.phase - barrier.first_phase) + " with " + std::to_string(barrier.pending) + " of " +
         std::to_string(barrier.arrivals) + " arrivals and " + std::to_string(barrier.bytes) + " bytes to come)";
}

// ---- barriers of some warps

void Hopper::named_barrier_sync(int number, int threads, const Place& place) {
  const uint32_t thread = block_.self_->id;
  if (number < 1 || number > 15 || threads < 32 || threads % 32 || threads > static_cast<int>(block_.block_threads_)) {
    block_.give_up("misuse", place,
                   "barrier " + std::to_string(number) + " for " + std::to_string(threads) + " threads");
  }
  NamedBarrier& barrier = own().named[number];
  if (barrier.waiting.empty()) {
    barrier.threads = threads;
    barrier.gathering.assign(columns_, 0);
  } else if (barrier.threads != threads) {
    block_.give_up("divergence", place,
                   block_.name(thread) + " takes barrier " + std::to_string(number) + " for one of " +
                       std::to_string(threads) + " threads, others for one of " + std::to_string(barrier.threads));
  }
  join(barrier.gathering.data(), known(thread));
  barrier.waiting.push_back(static_cast<uint16_t>(thread));
  if (static_cast<int>(barrier.waiting.size()) < threads) {
    block_.wait("bar.sync", place);
    return;
  }
  for (const uint16_t t : barrier.waiting) {
    std::copy(barrier.gathering.begin(), barrier.gathering.end(), known(t));
    ++known(t)[t];
    block_.make_ready(t / 32, 1u << t % 32);
  }
  barrier.waiting.clear();
  block_.switch_to_next();
}

// ---- registers

void Hopper::set_registers(int count, bool more, const Place& place) {
  if (count < 24 || count > 256 || count % 8) {
    block_.give_up("misuse", place, "setmaxnreg of " + std::to_string(count) + ", not a multiple of 8 in 24 ... 256");
  }
  WarpgroupProduct mine{};
  mine.columns = count;
  const char* const op = more ? "setmaxnreg.inc" : "setmaxnreg.dec";
  collective(op, mine, place, [&](Warpgroup& group) {
    if (more ? count < group.registers : count > group.registers) {
      block_.give_up(
          "misuse", place,
          std::string(op) + " from " + std::to_string(group.registers) + " registers to " + std::to_string(count));
    }
    if (!more) own().free_registers += 128 * (group.registers - count);
    if (!more) group.registers = count;
    if (more) group.registers_wanted = count;
    hand_out_registers();
  });
  Warpgroup& group = this->group();
  while (group.registers_wanted) {
    group.waiting.push_back(block_.self_->id);
    block_.wait("setmaxnreg.inc, for registers that nobody gives away,", place);
  }
}

void Hopper::hand_out_registers() {
  int& left = own().free_registers;
  const uint32_t first = block_.self_->rank * block_.thread_pitch_ / 128;
  for (uint32_t g = first; g < first + block_.block_threads_ / 128; ++g) {
    Warpgroup& group = groups_[g];
    const int more = 128 * (group.registers_wanted - group.registers);
    if (group.registers_wanted == 0 || more > left) continue;
    left -= more;
    group.registers = group.registers_wanted;
    group.registers_wanted = 0;
    for (const uint16_t t : group.waiting) block_.make_ready(t / 32, 1u << t % 32);
    group.waiting.clear();
  }
}

}  // namespace fastconv::emulator
