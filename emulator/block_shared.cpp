// Shared memory: bounds, races, reads of what nobody has written; and the asynchronous copies into it.
#include <algorithm>
#include <bit>
#include <cstring>

#include "block.h"
#include "hopper.h"

namespace fastconv::emulator {

// An address names the same place in every block: that of the thread's own is meant.
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
  return own_begin() + offset;
}

std::string Block::shared_place(uint32_t cell) const {
  return "shared byte " + std::to_string(cell * 2 % shared_pitch_) + of_block(cell * 2 / shared_pitch_);
}

void Block::check_shared_bounds(uintptr_t offset, size_t bytes, bool write, const Place& place) {
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
  if (has_hopper_) return hopper_->read(*self_, offset, bytes, place);
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
  if (has_hopper_) return hopper_->read_by_warp(offset, bytes, place);
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
  if (has_hopper_) return hopper_->write(*self_, offset, bytes, asynchronous, place);
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
  const uint32_t offset = own_begin() + copy.destination - kSharedBase;
  if (copy.predicate) {
    std::memcpy(shared + offset, copy.source, copy.bytes);
  } else {
    std::memset(shared + offset, 0, copy.bytes);
  }
  if (has_hopper_) return hopper_->landed(*self_, offset, copy.bytes);
  for (uint32_t c = offset / 2; c <= (offset + copy.bytes - 1) / 2; ++c) {
    Cell& cell = cells_[c];
    // Who had overtaken it was reported then.
    cell.state = Cell::kWritten;
    cell.writer = self_->id;
    cell.write_epoch = epoch_;
    cell.write_clock = warp().clocks.known[self_->lane][self_->lane];
  }
}

}  // namespace fastconv::emulator
