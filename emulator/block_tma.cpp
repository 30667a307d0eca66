// Boxes of tensors that the TMA brings to shared memory and stores from there.
#include <algorithm>
#include <bit>
#include <cstring>

#include "hopper.h"

namespace fastconv::emulator {
namespace {

constexpr uint32_t kRowBytes = 128;
constexpr int kRowElements = 64;

uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// One row of a box: 64 elements of the innermost dimension
struct Row {
  uintptr_t data;   // of its first element; 0 where the row is outside of the tensor
  int first, last;  // of its elements those that exist
};

// f(row) for each row of the box
template <class F>
void for_rows(const Box& box, F&& f) {
  const TensorMapFields& map = box.map;
  const auto [at, offset] = box.position;
  const int64_t exist = std::clamp<int64_t>(map.size[0] - at[0], 0, kRowElements);
  const int first = static_cast<int>(std::clamp<int64_t>(-int64_t{at[0]}, 0, kRowElements));
  const int last = std::max(first, static_cast<int>(exist));
  const auto row = [&](std::initializer_list<int64_t> coordinates) {
    uintptr_t data = map.data + static_cast<uintptr_t>(int64_t{at[0]} * 2);
    int i = 0;
    for (const int64_t c : coordinates) {
      if (c < 0 || c >= map.size[i + 1]) return f(Row{0, first, last});
      data += static_cast<uintptr_t>(c * map.stride[i++]);
    }
    f(Row{data, first, last});
  };
  if (!map.im2col) {
    for (int outer = 0; outer < map.box[1]; ++outer) {
      for (int inner = 0; inner < map.box[0]; ++inner) {
        if (map.rank == 2) row({int64_t{at[1]} + inner});
        if (map.rank == 3) row({int64_t{at[1]} + inner, int64_t{at[2]} + outer});
      }
    }
    return;
  }
  int64_t w = at[1], h = at[2], n = at[3];
  for (int pixel = 0; pixel < map.box[0]; ++pixel) {
    row({w + offset[0], h + offset[1], n});
    if ((w += map.step_w) <= map.last_w) continue;
    w = map.first_w;
    if ((h += map.step_h) <= map.last_h) continue;
    h = map.first_h;
    ++n;
  }
}

}  // namespace

Box Hopper::box(const unsigned char* map, uint32_t address, int rank, bool im2col, const BoxPosition& position,
                const char* op, const Place& place) {
  Box box{{}, position, address, block_.own_begin(), 0, 0, block_.self_->id, place};
  std::memcpy(&box.map, map, sizeof(box.map));
  if (box.map.magic != TensorMapFields::kMagic || box.map.rank != rank || box.map.im2col != im2col) {
    block_.give_up("misuse", place, std::string(op) + " by something that is no tensor map of its kind");
  }
  box.bytes = box.map.box[0] * box.map.box[1] * kRowBytes;
  const uint32_t offset = address - kSharedBase;
  if (address < kSharedBase || offset + box.bytes > block_.shared_bytes) {
    block_.give_up("out of bounds", place,
                   std::string(op) + " of " + std::to_string(box.bytes) + " bytes at byte " +
                       std::to_string(static_cast<int>(offset)) + " of " + std::to_string(block_.shared_bytes) +
                       " of shared memory");
  }
  if (address % 1024) {
    block_.give_up(
        "misaligned", place,
        std::string(op) + " at address " + std::to_string(address) + " of shared memory, not a multiple of 1024");
  }
  if (im2col) {
    const auto is_on = [](int at, int first, int last) { return at >= first && at <= last; };
    if (!is_on(position.at[1], box.map.first_w, box.map.last_w) ||
        !is_on(position.at[2], box.map.first_h, box.map.last_h)) {
      block_.give_up("out of bounds", place,
                     std::string(op) + " from column " + std::to_string(position.at[1]) + ", row " +
                         std::to_string(position.at[2]) + ", outside of the map's bounds");
    }
    for (const int by : position.offset) {
      if (by < 0 || by > 255) block_.give_up("misuse", place, std::string(op) + " with offset " + std::to_string(by));
    }
  }
  return box;
}

void Hopper::tma_prefetch(const unsigned char* map, const Place& place) {
  uint32_t magic;
  std::memcpy(&magic, map, sizeof(magic));
  if (magic != TensorMapFields::kMagic) block_.give_up("misuse", place, "a prefetch of what is no tensor map");
}

// ---- loads

void Hopper::tma_load(uint32_t destination, const unsigned char* map, uint32_t barrier, uint32_t blocks, int rank,
                      bool im2col, const BoxPosition& position, const Place& place) {
  ++block_.statistics.tma;
  Box load = box(map, destination, rank, im2col, position, "a load by the TMA", place);
  for_rows(load, [&](const Row& row) {
    if (row.data == 0 || row.first == row.last) return;
    block_.check_global(row.data + static_cast<uintptr_t>(row.first) * 2, static_cast<size_t>(row.last - row.first) * 2,
                        false, "a load by the TMA", place);
  });
  for (; blocks; blocks &= blocks - 1) {
    const auto to = static_cast<uint32_t>(std::countr_zero(blocks));
    check_member(to, "a load by the TMA", place);
    Mbarrier& told = mbarrier(barrier, to, "a load by the TMA", true, place);
    load.begin = to * block_.shared_pitch_;
    load.barrier = static_cast<uint32_t>(&told - barriers_.data());
    const uint32_t offset = load.begin + destination - kSharedBase;
    for (uint32_t at = offset; at < offset + load.bytes; at += 16) write_chunk(at, told, place);
    std::memset(block_.shared + offset, 0xff, load.bytes);
    told.box_phase = told.phase + 1;
    told.place = place;
    loads_.push_back(load);
  }
}

void Hopper::land_some() {
  while (!loads_.empty() && (block_.ready_warps_ == 0 || static_cast<int>(block_.random() % 256) < eager_)) {
    std::swap(loads_[block_.random() % loads_.size()], loads_.back());
    const Box load = loads_.back();
    loads_.pop_back();
    land(load);
  }
}

void Hopper::land(const Box& load) {
  uint32_t address = load.address;
  for_rows(load, [&](const Row& row) {
    alignas(16) unsigned char bytes[kRowBytes] = {};
    if (row.data && row.first < row.last) {
      std::memcpy(bytes + row.first * 2,
                  reinterpret_cast<const void*>(row.data + static_cast<uintptr_t>(row.first) * 2),
                  static_cast<size_t>(row.last - row.first) * 2);
    }
    for (uint32_t i = 0; i < kRowBytes; i += 16) {
      std::memcpy(block_.shared + load.begin + (swizzled(address + i) - kSharedBase), bytes + i, 16);
    }
    address += kRowBytes;
  });
  Mbarrier& barrier = barriers_[load.barrier];
  const uint32_t first = (load.begin + load.address - kSharedBase) / 16;
  for (uint32_t c = first; c < first + load.bytes / 16; ++c) chunks_[c].in_flight = false;
  // Bytes may come before they are expected, in a phase that is still to expect them.
  if (barrier.pending == 0 && barrier.bytes < load.bytes) {
    block_.give_up("misuse", load.place,
                   std::to_string(load.bytes) + " bytes arrive at " + describe(barrier) + ", which expects " +
                       std::to_string(barrier.bytes));
  }
  barrier.bytes -= load.bytes;
  end_phase(barrier);
}

// ---- stores

void Hopper::tma_store(const unsigned char* map, uint32_t source, int rank, const BoxPosition& position,
                       const Place& place) {
  ++block_.statistics.tma;
  const uint32_t thread = block_.self_->id;
  const Box store = box(map, source, rank, false, position, "a store by the TMA", place);
  int& number = storer_of_[thread];
  if (number < 0) {
    number = static_cast<int>(storers_.size());
    Storer& added = storers_.emplace_back();
    added.reader = add_reader("the stores of " + block_.name(thread), place);
    added.agent = own().readers[added.reader];
  }
  Storer& storer = storers_[static_cast<size_t>(number)];
  for_rows(store, [&](const Row& row) {
    if (row.data == 0 || row.first == row.last) return;
    block_.check_global(row.data + static_cast<uintptr_t>(row.first) * 2, static_cast<size_t>(row.last - row.first) * 2,
                        true, "a store by the TMA", place);
  });
  const uint32_t offset = store.begin + source - kSharedBase;
  const Reader reader{storer.reader, storer.committed + 1, thread, nullptr, place};
  for (uint32_t at = offset; at < offset + store.bytes; at += 16) read_chunk(at, reader);
  storer.open.push_back(store);
}

void Hopper::tma_store_commit() {
  const int number = storer_of_[block_.self_->id];
  if (number < 0) return;
  Storer& storer = storers_[static_cast<size_t>(number)];
  storer.groups.push_back(std::move(storer.open));
  storer.open.clear();
  ++storer.committed;
}

// Shared memory is read now and no sooner.
void Hopper::tma_store_wait(size_t pending) {
  const uint32_t thread = block_.self_->id;
  const int number = storer_of_[thread];
  if (number < 0) return;
  Storer& storer = storers_[static_cast<size_t>(number)];
  while (storer.groups.size() > pending) {
    for (const Box& store : storer.groups.front()) read_stored(store);
    storer.groups.pop_front();
  }
  known(thread)[storer.agent] = storer.committed - static_cast<Clock>(storer.groups.size());
}

void Hopper::read_stored(const Box& store) {
  uint32_t address = store.address;
  for_rows(store, [&](const Row& row) {
    for (int i = row.first; row.data && i < row.last; ++i) {
      std::memcpy(reinterpret_cast<void*>(row.data + static_cast<uintptr_t>(i) * 2),
                  block_.shared + store.begin + (swizzled(address + static_cast<uint32_t>(i) * 2) - kSharedBase), 2);
    }
    address += kRowBytes;
  });
}

}  // namespace fastconv::emulator
