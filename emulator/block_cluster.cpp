// Clusters: blocks that run at the same time, wait for each other, and reach each other's shared memory.
#include "hopper.h"

namespace fastconv::emulator {

void Hopper::cluster_sync(const Place& place) {
  at_cluster_barrier_.push_back(block_.self_->id);
  if (at_cluster_barrier_.size() < block_.live_) return block_.wait("barrier.cluster", place);
  end_cluster_sync();
  block_.switch_to_next();
}

// Who has ended tells nothing.
void Hopper::end_cluster_sync() {
  if (at_cluster_barrier_.empty() || at_cluster_barrier_.size() < block_.live_) return;
  meet(at_cluster_barrier_);
  for (const uint16_t t : at_cluster_barrier_) block_.make_ready(t / 32, 1u << t % 32);
  at_cluster_barrier_.clear();
}

// Gives up where a block has no shared memory that an operation could reach.
void Hopper::check_member(uint32_t rank, const char* op, const Place& place) {
  if (rank >= members_.size()) {
    block_.give_up("misuse", place,
                   std::string(op) + " of " + block_.name(block_.self_->id) + " in block " + std::to_string(rank) +
                       " of a cluster of " + std::to_string(members_.size()));
  }
  if (block_.members_[rank].live == 0) {
    block_.give_up(
        "the block has ended", place,
        std::string(op) + " of " + block_.name(block_.self_->id) + " in the shared memory" + block_.of_block(rank));
  }
}

void Hopper::mbarrier_arrive_at(uint32_t address, uint32_t rank, const Place& place) {
  const Fiber& fiber = *block_.self_;
  check_member(rank, "mbarrier.arrive", place);
  Mbarrier& barrier = mbarrier(address, rank, "mbarrier.arrive", false, place);
  if (rank != fiber.rank) members_[rank].arrivals[fiber.id] = {now(fiber.id), barrier.agent, place};
  arrive(barrier, 0, place);
}

// What other blocks do in a block's shared memory is done when it ends, and not by luck: one of its threads knows of
// it.
void Hopper::check_others(uint32_t rank) {
  for (const Box& load : loads_) {
    const uint32_t from = load.thread / block_.thread_pitch_;
    if (load.begin != rank * block_.shared_pitch_ || from == rank) continue;
    block_.report(
        "the block has ended", load.place,
        "a box that " + block_.name(load.thread) + " brings is under way to the shared memory" + block_.of_block(rank));
  }
  const uint32_t first = rank * block_.thread_pitch_;
  for (const auto& [thread, arrival] : members_[rank].arrivals) {
    bool is_known = false;
    for (uint32_t t = first; t < first + block_.block_threads_; ++t) is_known |= knows(t, thread, arrival.clock);
    if (is_known) continue;
    block_.report("the block has ended", arrival.place,
                  "nothing has the block wait for the arrival of " + block_.name(thread) + " at " +
                      whose(arrival.barrier) + " before it ends");
  }
}

}  // namespace fastconv::emulator
