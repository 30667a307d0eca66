#include "fingerprint.h"

#include <array>
#include <cstring>

namespace fastconv {
namespace {

constexpr uint64_t kStretch = 64;  // bytes: a cache line costs as much as a part of it
constexpr uint64_t kStretches = 64;
constexpr uint64_t kPrime = 0x9e3779b97f4a7c15;

// Eight hashes side by side: their multiplications overlap.
class Hash {
 public:
  void add(const unsigned char* data, uint64_t bytes = kStretch) {
    std::array<uint64_t, 8> words{};
    std::memcpy(words.data(), data, bytes);
    for (int i = 0; i < 8; ++i) lanes_[i] = mix(lanes_[i] ^ words[i]);
  }

  uint64_t value() const {
    uint64_t hash = 0;
    for (const uint64_t lane : lanes_) hash = mix(hash ^ lane);
    return hash;
  }

 private:
  static uint64_t mix(uint64_t v) {
    v *= kPrime;
    return v ^ (v >> 32);
  }

  std::array<uint64_t, 8> lanes_{1, 2, 3, 4, 5, 6, 7, 8};
};

}  // namespace

uint64_t fingerprint(const std::vector<uintptr_t>& addresses, const std::vector<uint64_t>& sizes) {
  Hash hash;
  for (size_t i = 0; i < addresses.size(); ++i) {
    const auto* data = reinterpret_cast<const unsigned char*>(addresses[i]);
    const uint64_t size = sizes[i];
    if (size <= kStretch * kStretches) {
      uint64_t at = 0;
      for (; at + kStretch <= size; at += kStretch) hash.add(data + at);
      hash.add(data + at, size - at);
    } else {
      const auto at = [=](uint64_t j) { return data + (size - kStretch) * j / (kStretches - 1); };
      // The misses overlap: what costs time here is the way to memory and back.
      for (uint64_t j = 0; j < kStretches; ++j) __builtin_prefetch(at(j));
      for (uint64_t j = 0; j < kStretches; ++j) hash.add(at(j));
    }
  }
  return hash.value();
}

}  // namespace fastconv
