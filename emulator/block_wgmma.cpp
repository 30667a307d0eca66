// Products of warpgroups: they are done when the program must have them, and no sooner.
#include <algorithm>
#include <cstring>

#include "hopper.h"
#include "numbers.h"

namespace fastconv::emulator {
namespace {

constexpr int kRows = 64, kDepth = 16, kMostColumns = 256;
constexpr uint32_t kSwizzle128 = 1;

// f(extent, depth, address) for each 16 bytes of an operand: of the eight elements that begin with this row or column
// at this place of the depth
template <class F>
void for_chunks(uint64_t descriptor, bool is_extent, int count, F&& f) {
  const auto field = [&](int shift) { return static_cast<uint32_t>(descriptor >> shift & 0x3fff) * 16; };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  const auto swizzled = [](uint32_t address) { return address ^ (address >> 7 & 7) << 4; };
  if (is_extent) {
    for (int k = 0; k < kDepth; ++k) {
      const uint32_t row = start + static_cast<uint32_t>(k / 8) * stride + static_cast<uint32_t>(k % 8) * 128;
      for (int i = 0; i < count; i += 8) {
        f(i, k, swizzled(row + static_cast<uint32_t>(i / 64) * leading + static_cast<uint32_t>(i % 64) * 2));
      }
    }
    return;
  }
  for (int i = 0; i < count; ++i) {
    const uint32_t row = start + static_cast<uint32_t>(i / 8) * stride + static_cast<uint32_t>(i % 8) * 128;
    for (int k = 0; k < kDepth; k += 8) f(i, k, swizzled(row + static_cast<uint32_t>(k) * 2));
  }
}

void convert(Mma kind, const unsigned char* from, float (&to)[8]) {
  uint16_t bits[8];
  std::memcpy(bits, from, sizeof(bits));
#ifdef __F16C__
  if (kind == Mma::kHalf) {
    _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bits))));
    return;
  }
#endif
  for (int i = 0; i < 8; ++i) to[i] = kind == Mma::kHalf ? half_value(bits[i]) : bfloat16_value(bits[i]);
}

// An operand as numbers, by the depth
template <int kPitch>
void fetch(const unsigned char* shared, Mma kind, uint64_t descriptor, bool is_extent, int count,
           float (&to)[kDepth][kPitch]) {
  for_chunks(descriptor, is_extent, count, [&](int i, int k, uint32_t address) {
    float values[8];
    convert(kind, shared + (address - kSharedBase), values);
    if (is_extent) {
      std::memcpy(&to[k][i], values, sizeof(values));
    } else {
      for (int e = 0; e < 8; ++e) to[k + e][i] = values[e];
    }
  });
}

// Where element i of a thread's registers lies in the sums
size_t place_of(int thread, int columns, int i) {
  const int row = thread / 32 * 16 + thread % 32 / 4 + 8 * (i / 2 % 2);
  return static_cast<size_t>(row * columns + 8 * (i / 4) + 2 * (thread % 4) + i % 2);
}

// No arithmetic brings it forth.
constexpr uint32_t kUnderWay = 0xffffffff;

}  // namespace

// All threads of the warpgroup meet; the last one to come runs run(group).
void Hopper::collective(const char* op, const WarpgroupProduct& mine, const Place& place,
                        const std::function<void(Warpgroup&)>& run) {
  const Fiber& fiber = *block_.self_;
  if (!in_warpgroup(fiber)) {
    block_.give_up("divergence", place, std::string(op) + " of " + block_.name(fiber.id) + ", in no whole warpgroup");
  }
  Warpgroup& group = this->group();
  const uint32_t first = fiber.id / 128 * 128;
  for (uint32_t w = first / 32; w < first / 32 + 4; ++w) {
    if (block_.warps_[w].done) {
      block_.give_up("divergence", place,
                     std::string(op) + " of " + block_.name(fiber.id) + ", in a warpgroup of which threads have ended");
    }
  }
  if (group.op == nullptr) {
    group.op = op;
    group.place = place;
  } else if (group.op != op || group.place != place) {
    block_.give_up("divergence", place,
                   block_.name(fiber.id) + " is at this " + op + " while threads of its warpgroup are in " + group.op +
                       " at " + emulator::describe(group.place));
  }
  group.from[fiber.id % 128] = mine;
  if (++group.arrived < 128) {
    block_.wait(op, place);
    return;
  }
  run(group);
  group.op = nullptr;
  group.arrived = 0;
  for (uint32_t w = first / 32; w < first / 32 + 4; ++w) block_.make_ready(static_cast<int>(w), ~0u);
  block_.switch_to_next();
}

void Hopper::wgmma_fence(const Place& place) {
  collective("wgmma.fence", {}, place, [](Warpgroup& group) { group.fenced = true; });
}

void Hopper::wgmma(const WarpgroupProduct& product, const Place& place) {
  collective("wgmma.mma_async", product, place, [&](Warpgroup& group) {
    ++block_.statistics.wgmma;
    for (const WarpgroupProduct& other : group.from) {
      if (other.a != product.a || other.b != product.b || other.accumulate != product.accumulate) {
        block_.give_up("divergence", place, "the threads of a warpgroup do not give the same operands to wgmma");
      }
    }
    if (group.agent == 0) {
      const uint32_t id = block_.self_->id;
      group.reader = add_reader("the products of warpgroup " + std::to_string(id % block_.thread_pitch_ / 128) +
                                    block_.of_block(block_.self_->rank),
                                place);
      group.agent = own().readers[group.reader];
    }
    const Reader reader{group.reader, group.committed + 1, 0, &group, place};
    const auto read = [&](uint64_t descriptor, bool is_extent, int count) {
      if (descriptor >> 62 != kSwizzle128 || (descriptor >> 49 & 7)) {
        block_.give_up("misuse", place, "the emulator knows no descriptors but those with 128-byte swizzles");
      }
      for_chunks(descriptor, is_extent, count, [&](int, int, uint32_t address) {
        read_chunk(block_.shared_offset(address, 16, "wgmma", place), reader);
      });
    };
    read(product.a, product.extent_a, kRows);
    read(product.b, product.extent_b, product.columns);
    Accumulators& accumulators = take_accumulators(group, place);
    ++accumulators.pending;
    group.open.push_back({product, &accumulators, place});
  });
}

// The registers' sums, which from now on are those of the products under way
Accumulators& Hopper::take_accumulators(Warpgroup& group, const Place& place) {
  const WarpgroupProduct& first = group.from[0];
  Accumulators* free = nullptr;
  for (const auto& known : group.accumulators) {
    if (known->pending == 0) {
      free = known.get();
    } else if (known->of[0] == first.d && known->columns == first.columns) {
      return *known;
    } else if (first.d < known->of[0] + known->columns / 2 && known->of[0] < first.d + first.columns / 2) {
      block_.give_up("misuse", place, "wgmma with some of the registers of a product that is under way");
    }
  }
  if (!group.fenced) {
    block_.report("missing wgmma.fence", place,
                  "a product whose registers the threads had, without a wgmma.fence since");
  }
  if (free == nullptr) {
    group.accumulators.push_back(std::make_unique<Accumulators>());
    free = group.accumulators.back().get();
  }
  free->columns = first.columns;
  free->place = place;
  free->sums.resize(static_cast<size_t>(kRows * first.columns));
  for (int t = 0; t < 128; ++t) {
    free->of[t] = group.from[t].d;
    for (int i = 0; i < first.columns / 2; ++i) free->sums[place_of(t, first.columns, i)] = free->of[t][i];
    std::memset(free->of[t], 0xff, static_cast<size_t>(first.columns) * 2);
  }
  return *free;
}

void Hopper::wgmma_commit(const Place& place) {
  collective("wgmma.commit_group", {}, place, [](Warpgroup& group) {
    group.groups.push_back(std::move(group.open));
    group.open.clear();
    ++group.committed;
  });
}

void Hopper::wgmma_wait(size_t pending, const Place& place) {
  collective("wgmma.wait_group", {}, place, [&](Warpgroup& group) {
    while (group.groups.size() > pending) {
      for (const Product& product : group.groups.front()) {
        multiply(product);
        if (--product.accumulators->pending > 0) continue;
        give_back(*product.accumulators);
        group.fenced = false;
      }
      group.groups.pop_front();
    }
  });
  const Warpgroup& group = this->group();
  if (group.agent == 0) return;
  Clock& done = known(block_.self_->id)[group.agent];
  done = std::max(done, group.committed - static_cast<Clock>(group.groups.size()));
}

void Hopper::multiply(const Product& product) {
  const WarpgroupProduct& what = product.what;
  float a[kDepth][kRows], b[kDepth][kMostColumns];
  fetch(block_.own_shared(), what.kind, what.a, what.extent_a, kRows, a);
  fetch(block_.own_shared(), what.kind, what.b, what.extent_b, what.columns, b);
  float* const sums = product.accumulators->sums.data();
  constexpr int kAtOnce = 64;
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < what.columns; column += kAtOnce) {
      const int some = std::min(kAtOnce, what.columns - column);
      float* const to = sums + row * what.columns + column;
      float sum[kAtOnce] = {};
      if (what.accumulate) std::memcpy(sum, to, static_cast<size_t>(some) * 4);
      for (int k = 0; k < kDepth; ++k) {
        for (int c = 0; c < kAtOnce; ++c) sum[c] += a[k][row] * b[k][column + c];
      }
      std::memcpy(to, sum, static_cast<size_t>(some) * 4);
    }
  }
}

void Hopper::give_back(Accumulators& accumulators) {
  const int count = accumulators.columns / 2;
  for (int t = 0; t < 128; ++t) {
    for (int i = 0; i < count; ++i) {
      float& to = accumulators.of[t][i];
      uint32_t found;
      std::memcpy(&found, &to, 4);
      if (found != kUnderWay) {
        block_.report("accumulator touched", accumulators.place,
                      "a thread of the warpgroup has written the sums of this product before it was done");
      }
      to = accumulators.sums[place_of(t, accumulators.columns, i)];
    }
  }
}

}  // namespace fastconv::emulator
