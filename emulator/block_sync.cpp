// Where threads of a block wait for each other: barriers, and the collectives of a warp.
#include "block.h"
#include "hopper.h"

namespace fastconv::emulator {

void Block::sync_block(const Place& place) {
  Member& member = members_[self_->rank];
  if (member.at_barrier == 0) {
    member.barrier_place = place;
  } else if (member.barrier_place != place) {
    give_up("divergence", place,
            name(self_->id) + " is at this __syncthreads while others are at " + describe(member.barrier_place));
  }
  if (member.live != block_threads_) {
    give_up("divergence", place, name(self_->id) + " is at a __syncthreads that threads which have ended never reach");
  }
  if (++member.at_barrier < block_threads_) {
    warps_[self_->warp].at_barrier |= 1u << self_->lane;
    wait("__syncthreads", place);
    return;
  }
  member.at_barrier = 0;
  ++epoch_;
  if (has_hopper_) hopper_->sync_block();
  const size_t first = self_->rank * thread_pitch_ / 32;
  for (size_t w = first; w < first + (block_threads_ + 31) / 32; ++w) {
    make_ready(static_cast<int>(w), warps_[w].at_barrier);
    warps_[w].at_barrier = 0;
  }
  // The last one to come has no right to be the first one to go.
  yield();
}

void Block::sync_lanes(uint32_t mask) {
  has_hopper_ ? hopper_->sync_lanes(self_->warp, mask) : warp().clocks.sync(mask);
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

}  // namespace fastconv::emulator
