#pragma once

#include <cstdint>
#include <vector>

namespace fastconv {

// A hash of the data at these addresses: of all bytes of a block of up to 8 KiB, and of a larger
// one of 128 stretches of 64 bytes, evenly spread from its first to its last byte. Tells, at next
// to no cost, that tensors were overwritten behind torch's back.
uint64_t fingerprint(const std::vector<uintptr_t>& addresses, const std::vector<uint64_t>& sizes);

}  // namespace fastconv
