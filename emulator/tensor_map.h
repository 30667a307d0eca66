// What a TensorMap of the emulator holds; tensor_map.cpp makes it, block_tma.cpp walks it.
#pragma once

#include <cstdint>

namespace fastconv::emulator {

struct TensorMapFields {
  static constexpr uint32_t kMagic = 0x70616d74;
  uint32_t magic = kMagic;
  bool im2col = false;
  uint8_t rank = 2;
  uint16_t box[2] = {1, 1};  // rows of 128 bytes; of an im2col map the first is its pixels
  uint8_t step_w = 1, step_h = 1;
  uintptr_t data = 0;
  int64_t size[4] = {1, 1, 1, 1};  // elements, the innermost dimension first
  int64_t stride[3] = {0, 0, 0};   // bytes, of the dimensions but the innermost
  int32_t first_w = 0, first_h = 0, last_w = 0, last_h = 0;
};

}  // namespace fastconv::emulator
