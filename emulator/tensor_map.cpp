// The twin of csrc/cuda/runtime/tensor_map.cpp: refuses what the driver refuses.
#include "tensor_map.h"

#include <cstring>
#include <stdexcept>
#include <string>

#include "cuda/runtime/tensor_map.h"

namespace fastconv::cuda {
namespace {

using emulator::TensorMapFields;
static_assert(sizeof(TensorMapFields) <= sizeof(TensorMap));

constexpr int64_t kElementBytes = 2;

void require(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error("fastconv emulator: a tensor map with " + what);
}

void require_between(const char* what, int64_t value, int64_t least, int64_t most) {
  require(value >= least && value <= most, std::string(what) + " " + std::to_string(value));
}

TensorMap checked(const TensorMapFields& fields, DType dtype) {
  require(dtype == DType::kFloat16 || dtype == DType::kBFloat16, "elements that do not have 16 bits");
  require(fields.data % 16 == 0, "data that is not 16-byte aligned");
  for (int i = 0; i < fields.rank; ++i) require_between("a size of", fields.size[i], 1, int64_t{1} << 32);
  for (int i = 0; i + 1 < fields.rank; ++i) {
    require_between("a stride in bytes of", fields.stride[i], 0, kMostStrideBytes);
    const int64_t inner = i ? fields.stride[i - 1] : 16;
    require(inner && fields.stride[i] % inner == 0, "a stride that is no multiple of 16 bytes, or of the one before");
  }
  TensorMap map{};
  std::memcpy(map.bytes, &fields, sizeof(fields));
  return map;
}

}  // namespace

TensorMap tiled_map(const TiledMap& of) {
  require_between("a rank of", of.rank, 2, 3);
  TensorMapFields fields;
  fields.rank = static_cast<uint8_t>(of.rank);
  fields.data = reinterpret_cast<uintptr_t>(of.data);
  for (int i = 0; i < of.rank; ++i) fields.size[i] = of.size[i];
  for (int i = 0; i + 1 < of.rank; ++i) {
    require_between("a box of", of.box[i], 1, 256);
    fields.stride[i] = of.stride[i] * kElementBytes;
    fields.box[i] = static_cast<uint16_t>(of.box[i]);
  }
  return checked(fields, of.dtype);
}

TensorMap im2col_map(const Im2colMap& of) {
  require_between("pixels of", of.pixels, 1, 256);
  require_between("a step of", of.step_w, 1, kMostStep);
  require_between("a step of", of.step_h, 1, kMostStep);
  TensorMapFields fields;
  fields.im2col = true;
  fields.rank = 4;
  fields.data = reinterpret_cast<uintptr_t>(of.data);
  const int64_t size[] = {of.c, of.w, of.h, of.n}, stride[] = {of.stride_w, of.stride_h, of.stride_n};
  for (int i = 0; i < 4; ++i) fields.size[i] = size[i];
  for (int i = 0; i < 3; ++i) fields.stride[i] = stride[i] * kElementBytes;
  fields.box[0] = static_cast<uint16_t>(of.pixels);
  fields.step_w = static_cast<uint8_t>(of.step_w);
  fields.step_h = static_cast<uint8_t>(of.step_h);
  fields.first_w = of.first_w;
  fields.first_h = of.first_h;
  fields.last_w = of.first_w + (of.count_w - 1) * of.step_w;
  fields.last_h = of.first_h + (of.count_h - 1) * of.step_h;
  require(of.count_w >= 1 && of.count_h >= 1, "no pixels along an axis");
  for (const int corner : {of.first_w, of.first_h, fields.last_w - (of.w - 1), fields.last_h - (of.h - 1)}) {
    require_between("a corner of", corner, -kMostCorner - 1, kMostCorner);
  }
  return checked(fields, of.dtype);
}

}  // namespace fastconv::cuda
