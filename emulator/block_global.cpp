// Global memory: which tensor an address belongs to, whether it may be written, races. And the plain loads and stores,
// of which the address says whether they mean global or shared memory.
#include <algorithm>

#include "block.h"
#include "hopper.h"

namespace fastconv::emulator {
namespace {

// Who wrote two bytes in this launch: block + 1, thread, epoch or its own clock.
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
  const uint32_t first = self_->rank * thread_pitch_;
  const GlobalAccess now(members_[self_->rank].flat_index, self_->id - first,
                         has_hopper_ ? hopper_->now(self_->id) : epoch_);
  const auto is_known = [&](const GlobalAccess& then) {
    return has_hopper_ ? hopper_->knows(self_->id, first + then.thread(), then.epoch()) : then.epoch() != now.epoch();
  };
  for (size_t c = (address - found->begin) / 2; c <= (address + bytes - 1 - found->begin) / 2; ++c) {
    uint64_t& writer = found->writers[c];
    if (writer != 0 && writer != now.bits) {
      const GlobalAccess then(writer);
      const char* verb = write ? " writes " : " reads ";
      if (then.block() != now.block()) {
        report("race between blocks", place,
               name(self_->id) + verb + "byte " + std::to_string(c * 2) + " of " + found->name +
                   ", which block number " + std::to_string(then.block()) + " has written in this launch");
      } else if (then.thread() / 32 != now.thread() / 32 && !is_known(then)) {
        report("race", place,
               name(self_->id) + verb + "byte " + std::to_string(c * 2) + " of " + found->name +
                   ", not ordered after the write of " + name(first + then.thread()));
      }
    }
    if (write) writer = now.bits;
  }
}

// ---- plain loads and stores

void Block::access(const void* pointer, size_t bytes, bool write, bool aligned, const Place& place) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  if (owns_stack(address)) return;
  if (aligned && address % bytes) {
    give_up("misaligned", place,
            name(self_->id) + (write ? " writes " : " reads ") + std::to_string(bytes) +
                " bytes at an address that is " + std::to_string(address % bytes) + " past a multiple of that");
  }
  if (is_shared(address)) {
    check_shared_bounds(address - reinterpret_cast<uintptr_t>(own_shared()), bytes, write, place);
    const uint32_t offset = static_cast<uint32_t>(address - reinterpret_cast<uintptr_t>(shared));
    write ? shared_write(offset, static_cast<uint32_t>(bytes), false, place)
          : shared_read(offset, static_cast<uint32_t>(bytes), place);
    return;
  }
  if (!write && is_parameter(address)) return;
  check_global(address, bytes, write, write ? "store" : "load", place);
}

}  // namespace fastconv::emulator
