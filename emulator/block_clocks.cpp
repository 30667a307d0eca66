// Who knows what of whom in a block with mbarriers: a full vector clock for each thread, over threads and over what
// else has a time. Of an mbarrier that is its phases; of a warpgroup's products, and of a thread's stores, their
// groups.
#include <algorithm>
#include <bit>
#include <numeric>

#include "hopper.h"

namespace fastconv::emulator {

void Hopper::begin() {
  threads_ = block_.threads_;
  const auto blocks = static_cast<uint32_t>(block_.members_.size());
  columns_ = (threads_ + kMostAgents * blocks + 15) / 16 * 16;
  const Clock epoch = block_.epoch_;
  clocks_.assign(size_t{threads_} * columns_, 0);
  for (uint32_t t = 0; t < threads_; ++t) {
    for (uint32_t other = 0; other < threads_; ++other) {
      const bool same_warp = t / 32 == other / 32;
      known(t)[other] = epoch + (same_warp ? block_.warps_[t / 32].clocks.known[t % 32][other % 32] : 0);
    }
  }
  agents_.clear();
  fences_.assign(threads_, {});

  // What came before the last barrier of the block all threads know of.
  chunks_.assign((block_.cells_.size() + 7) / 8, {});
  elements_.assign(chunks_.size() * 8, {});
  for (size_t c = 0; c < block_.cells_.size(); ++c) {
    const Cell& cell = block_.cells_[c];
    if (cell.write_epoch < block_.first_epoch_ && cell.read_epoch < epoch) continue;
    Element& element = elements_[c];
    chunks_[c / 8].touched = true;
    if (cell.write_epoch >= block_.first_epoch_) {
      element.state = cell.state == Cell::kInFlight ? Element::kInFlight : Element::kWritten;
      element.writer = cell.writer;
      element.write_clock = cell.write_epoch < epoch ? 0 : epoch + cell.write_clock;
    }
    if (cell.read_epoch != epoch) continue;
    element.reads[0] = {cell.read_lanes, epoch + cell.read_clock, cell.read_warp};
    if (cell.other_read_warp != Cell::kNobody) {
      element.reads[1] = {1u << cell.other_read_lane, epoch + 1, cell.other_read_warp};
    }
  }

  barriers_.clear();
  barrier_at_.assign(block_.shared_pitch_ * blocks / 8, -1);
  members_.assign(blocks, {});
  at_cluster_barrier_.clear();
  waits_for_.assign(threads_, -1);

  loads_.clear();
  constexpr int kEager[] = {0, 2, 16, 96};
  eager_ = kEager[block_.random() % 4];
  storer_of_.assign(threads_, -1);
  storers_.clear();

  groups_ = std::vector<Warpgroup>(threads_ / 128);
  // What the compiler may give a thread when the block is to fit
  const int registers = std::min(65536 / static_cast<int>(block_.block_threads_) / 8 * 8, 256);
  for (Warpgroup& group : groups_) group.registers = registers;
}

void Hopper::check_end(const Fiber& fiber) {
  if (const int number = storer_of_[fiber.id]; number >= 0) {
    const Storer& storer = storers_[static_cast<size_t>(number)];
    const auto check = [&](const std::vector<Box>& stores) {
      for (const Box& store : stores) {
        block_.report("store never waited for", store.place,
                      block_.name(fiber.id) + " ends before this store has read its shared memory");
      }
    };
    for (const std::vector<Box>& group : storer.groups) check(group);
    check(storer.open);
  }
  for (const uint32_t t : at_cluster_barrier_) {
    if (t / 32 != fiber.warp) continue;
    block_.give_up("divergence", block_.fibers_[t].waits_at,
                   block_.name(fiber.id) + " ends while threads of its warp are in a barrier of the cluster");
  }
  if (!in_warpgroup(fiber)) return;
  Warpgroup& group = groups_[fiber.id / 128];
  if (group.op) {
    block_.give_up("divergence", group.place,
                   std::string(group.op) + " waits for " + block_.name(fiber.id) + ", which has ended");
  }
  for (const auto& accumulators : group.accumulators) {
    if (accumulators->pending == 0) continue;
    block_.report("product never waited for", accumulators->place,
                  block_.name(fiber.id) + " ends before this product is done");
  }
}

void Hopper::check_end() {
  const uint32_t rank = block_.self_->rank;
  for (const Mbarrier& barrier : barriers_) {
    if (barrier.offset / block_.shared_pitch_ != rank) continue;
    if (barrier.box_phase > barrier.waited) {
      block_.report("copy never waited for", barrier.place,
                    "nobody has waited for the last box of " + describe(barrier));
    } else if (barrier.bytes > 0) {
      block_.report(
          "misuse", barrier.place,
          "the block ends while " + describe(barrier) + " expects " + std::to_string(barrier.bytes) + " bytes more");
    }
  }
  if (block_.members_.size() > 1) check_others(rank);
}

uint32_t Hopper::add_agent(const std::string& name, const Place& place) {
  if (agents_.size() == kMostAgents * members_.size()) {
    block_.give_up("misuse", place, "the emulator has no room for " + name + ": too many mbarriers and the like");
  }
  agents_.push_back(name);
  return threads_ + static_cast<uint32_t>(agents_.size()) - 1;
}

uint32_t Hopper::add_reader(const std::string& name, const Place& place) {
  std::vector<uint32_t>& readers = own().readers;
  if (readers.size() == Chunk::kMostReaders) {
    block_.give_up("misuse", place, "the emulator has no room for " + name + ": too many readers of shared memory");
  }
  readers.push_back(add_agent(name, place));
  return static_cast<uint32_t>(readers.size()) - 1;
}

// ---- clocks

void Hopper::join(Clock* clocks, const Clock* more) const {
  for (uint32_t c = 0; c < columns_; ++c) clocks[c] = std::max(clocks[c], more[c]);
}

void Hopper::meet(const std::vector<uint16_t>& threads) {
  std::vector<Clock> all(columns_, 0);
  for (const uint32_t t : threads) join(all.data(), known(t));
  for (const uint32_t t : threads) {
    std::copy(all.begin(), all.end(), known(t));
    ++known(t)[t];
  }
}

void Hopper::sync_block() {
  std::vector<uint16_t> everyone(block_.block_threads_);
  std::iota(everyone.begin(), everyone.end(), static_cast<uint16_t>(block_.self_->rank * block_.thread_pitch_));
  meet(everyone);
}

void Hopper::sync_lanes(int warp, uint32_t mask) {
  std::vector<uint16_t> lanes;
  for (; mask; mask &= mask - 1) lanes.push_back(static_cast<uint16_t>(warp * 32 + std::countr_zero(mask)));
  meet(lanes);
}

void Hopper::fence_proxy_async() {
  const uint32_t t = block_.self_->id;
  fences_[t].push_back(now(t));
  ++known(t)[t];
}

// When `writer` first fenced what it wrote then; later than all times where it never did
Clock Hopper::fence_after(uint32_t writer, Clock write) const {
  const std::vector<Clock>& fences = fences_[writer];
  const auto fence = std::lower_bound(fences.begin(), fences.end(), write);
  return fence != fences.end() ? *fence : ~Clock{0};
}

// At least what all threads of the group know. It only grows: what was found before serves while it is enough.
Clock Hopper::known_by_all(Warpgroup& group, uint32_t other, Clock wanted) {
  group.known.resize(columns_);
  Clock& least = group.known[other];
  if (least >= wanted) return least;
  const uint32_t first = static_cast<uint32_t>(&group - groups_.data()) * 128;
  least = known(first)[other];
  for (uint32_t t = first + 1; t < first + 128; ++t) least = std::min(least, known(t)[other]);
  return least;
}

// ---- reads and writes of threads

// Of those that have read, one of which `thread` does not know; kNobody where there is none
uint32_t Hopper::unknown_reader(const Element::Reads& reads, uint32_t thread) const {
  for (uint32_t lanes = reads.lanes; lanes; lanes &= lanes - 1) {
    const uint32_t reader = reads.warp * 32u + static_cast<uint32_t>(std::countr_zero(lanes));
    if (reader != thread && !knows(thread, reader, reads.clock)) return reader;
  }
  return kNobody;
}

void Hopper::note_read(Element& element, const Fiber& fiber) {
  const Clock clock = now(fiber.id);
  Element::Reads* to = nullptr;
  for (Element::Reads& reads : element.reads) {
    if (unknown_reader(reads, fiber.id) == kNobody) {
      if (to) {
        reads.lanes = 0;
      } else {
        to = &reads;
        *to = {1u << fiber.lane, clock, fiber.warp};
      }
    } else if (to == nullptr && reads.warp == fiber.warp) {
      reads.lanes |= 1u << fiber.lane;
      reads.clock = std::min(reads.clock, clock);
      to = &reads;
    }
  }
  // Of readers in more than two warps the first is forgotten.
  if (to == nullptr) element.reads[0] = {1u << fiber.lane, clock, fiber.warp};
}

std::string Hopper::whose(uint32_t column) const {
  return column < threads_ ? block_.name(column) : agents_[column - threads_];
}

// An access ("read") to an element by a thread or agent is wrong, because of another where there is one.
void Hopper::say(const char* kind, const Place& place, const char* access, uint32_t by, uint32_t e, const char* what,
                 uint32_t other) {
  if (block_.is_reported(kind, place)) return;
  block_.report(kind, place,
                std::string(access) + " of " + block_.shared_place(e) + " by " + whose(by) + ", " + what +
                    (other == kNobody ? "" : whose(other)));
}

// Boxes that came to 16 bytes, and what else reads them, against a write of the thread or in its name
void Hopper::check_chunk(uint32_t c, uint32_t thread, const char* access, const Place& place) {
  const Chunk& chunk = chunks_[c];
  if (chunk.in_flight) {
    say("copy overtaken", place, access, thread, c * 8, "where a box is under way for ", chunk.barrier);
  } else if (chunk.phase && !knows(thread, chunk.barrier, chunk.phase)) {
    say("race", place, access, thread, c * 8, "without a wait for the box that came there, at ", chunk.barrier);
  }
  for (uint32_t readers = chunk.readers; readers; readers &= readers - 1) {
    const int reader = std::countr_zero(readers);
    const uint32_t agent = members_[c * 16 / block_.shared_pitch_].readers[static_cast<size_t>(reader)];
    if (knows(thread, agent, chunk.reads[reader])) continue;
    say("race", place, access, thread, c * 8, "which may still be read by ", agent);
  }
}

// Whether an element may be read. known(other, wanted): until when the reader knows of another, at least where that is
// not `wanted`
template <class Known>
void Hopper::check_read(uint32_t e, uint32_t by, const Place& place, Known&& known) {
  const Element& element = elements_[e];
  const Chunk& chunk = chunks_[e / 8];
  switch (element.state) {
    case Element::kUnwritten:
      if (chunk.phase == 0) {
        say("uninitialised", place, "read", by, e, "which nobody has written");
      } else if (chunk.in_flight) {
        say("copy not waited for", place, "read", by, e, "where a box is under way for ", chunk.barrier);
      } else if (known(chunk.barrier, chunk.phase) < chunk.phase) {
        say("race", place, "read", by, e, "without a wait for the box that came there, at ", chunk.barrier);
      }
      break;
    case Element::kInFlight:
      say("copy not waited for", place, "read", by, e, "where a copy is under way, of ", element.writer);
      break;
    case Element::kBarrier:
      say("misuse", place, "read", by, e, "where an mbarrier is");
      break;
    case Element::kWritten:
      if (known(element.writer, element.write_clock) < element.write_clock) {
        say("race", place, "read", by, e, "not ordered after the write of ", element.writer);
      }
  }
}

void Hopper::read(const Fiber& fiber, uint32_t offset, uint32_t bytes, const Place& place) {
  for (uint32_t e = offset / 2; e <= (offset + bytes - 1) / 2; ++e) {
    Element& element = elements_[e];
    Chunk& chunk = chunks_[e / 8];
    check_read(e, fiber.id, place, [&](uint32_t other, Clock) { return known(fiber.id)[other]; });
    chunk.touched = true;
    note_read(element, fiber);
  }
}

void Hopper::read_by_warp(uint32_t offset, uint32_t bytes, const Place& place) {
  for (uint32_t lanes = block_.warp().lanes; lanes; lanes &= lanes - 1) {
    read(block_.fiber_of_lane(std::countr_zero(lanes)), offset, bytes, place);
  }
}

void Hopper::write(const Fiber& fiber, uint32_t offset, uint32_t bytes, bool asynchronous, const Place& place) {
  const uint32_t thread = fiber.id;
  for (uint32_t e = offset / 2; e <= (offset + bytes - 1) / 2; ++e) {
    Element& element = elements_[e];
    Chunk& chunk = chunks_[e / 8];
    if (chunk.phase || chunk.readers) check_chunk(e / 8, thread, "write", place);
    check_write(e, thread, "write", place);
    element = {now(thread), static_cast<uint16_t>(thread), asynchronous ? Element::kInFlight : Element::kWritten, {}};
    chunk.touched = true;
  }
}

// What threads did with an element, against a write of the thread or in its name
void Hopper::check_write(uint32_t e, uint32_t thread, const char* access, const Place& place) {
  const Element& element = elements_[e];
  if (element.state == Element::kInFlight) {
    say("copy overtaken", place, access, thread, e, "where a copy is under way, of ", element.writer);
  } else if (element.state == Element::kBarrier) {
    say("misuse", place, access, thread, e, "where an mbarrier is");
  } else if (element.state == Element::kWritten && !knows(thread, element.writer, element.write_clock)) {
    say("race", place, access, thread, e, "not ordered after the write of ", element.writer);
  }
  for (const Element::Reads& reads : element.reads) {
    const uint32_t reader = unknown_reader(reads, thread);
    if (reader != kNobody) say("race", place, access, thread, e, "not ordered after the read of ", reader);
  }
}

void Hopper::landed(const Fiber& fiber, uint32_t offset, uint32_t bytes) {
  for (uint32_t e = offset / 2; e <= (offset + bytes - 1) / 2; ++e) {
    elements_[e].state = Element::kWritten;
    elements_[e].writer = fiber.id;
    elements_[e].write_clock = now(fiber.id);
  }
}

// ---- boxes and products

// Whether what a thread has written to an element is seen by boxes and products
template <class Known>
void Hopper::check_fence(uint32_t e, uint32_t by, const char* access, const Place& place, Known&& known) {
  const Element& element = elements_[e];
  if (element.state != Element::kWritten || known(element.writer, element.write_clock) < element.write_clock) return;
  const Clock fence = fence_after(element.writer, element.write_clock);
  if (known(element.writer, fence) >= fence) return;
  say("missing proxy fence", place, access, by, e, "written without a fence_proxy_async before it was told, by ",
      element.writer);
}

void Hopper::read_chunk(uint32_t offset, const Reader& reader) {
  Chunk& chunk = chunks_[offset / 16];
  const auto known_to_it = [&](uint32_t other, Clock wanted) {
    return reader.group ? known_by_all(*reader.group, other, wanted) : known(reader.thread)[other];
  };
  const bool is_box = !chunk.touched && chunk.phase && !chunk.in_flight;
  if (!is_box || known_to_it(chunk.barrier, chunk.phase) < chunk.phase) {
    // Where threads did nothing, one element is like the others.
    const uint32_t first = offset / 2, end = first + (chunk.touched ? 8 : 1);
    for (uint32_t e = first; e < end; ++e) {
      check_read(e, own().readers[reader.number], reader.place, known_to_it);
      check_fence(e, own().readers[reader.number], "read", reader.place, known_to_it);
    }
  }
  chunk.readers |= static_cast<uint16_t>(1u << reader.number);
  chunk.reads[reader.number] = reader.clock;
}

void Hopper::write_chunk(uint32_t offset, const Mbarrier& barrier, const Place& place) {
  const uint32_t thread = block_.self_->id;
  Chunk& chunk = chunks_[offset / 16];
  check_chunk(offset / 16, thread, "overwriting by a box", place);
  if (chunk.touched) {
    for (uint32_t e = offset / 2; e < offset / 2 + 8; ++e) {
      check_write(e, thread, "overwriting by a box", place);
      check_fence(e, thread, "overwriting by a box", place,
                  [&](uint32_t other, Clock) { return known(thread)[other]; });
      elements_[e] = {};
    }
  }
  chunk = {};
  chunk.phase = barrier.phase + 1;
  chunk.barrier = static_cast<uint16_t>(barrier.agent);
  chunk.in_flight = true;
}

}  // namespace fastconv::emulator
