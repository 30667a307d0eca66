// The twin of csrc/cuda/runtime/device.cpp: names the memory of tensors to the emulator, and poisons what is to be
// written.
#include "cuda/runtime/device.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <stdexcept>

#include "control.h"
#include "memory.h"

namespace fastconv::cuda {
namespace {

using emulator::global_ranges;
using emulator::Range;

std::string describe(const Tensor& tensor) {
  std::string text = "of shape [";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + "]";
}

struct Dimension {
  int64_t size, stride;
};

// Those that matter, the innermost first
std::vector<Dimension> dimensions(const Tensor& tensor) {
  std::vector<Dimension> result;
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    if (tensor.size(i) != 1) result.push_back({tensor.size(i), tensor.stride(i)});
  }
  std::sort(result.begin(), result.end(), [](auto& a, auto& b) { return a.stride < b.stride; });
  return result;
}

Range range_of(const Tensor& tensor, void* data, bool writable, const std::string& name) {
  const auto bytes = static_cast<int64_t>(tensor.element_size());
  int64_t last = 0, run = 1, pitch = 0;
  for (const auto& [size, stride] : dimensions(tensor)) {
    last += (size - 1) * stride;
    if (pitch == 0 && (stride == run || stride == 0)) {
      run = stride ? run * size : run;
    } else if (pitch == 0) {
      pitch = stride;
    } else if (stride % pitch) {
      pitch = -1;  // no such regularity: the whole span
    }
  }
  const auto begin = reinterpret_cast<uintptr_t>(data);
  Range range{begin, begin + static_cast<size_t>((last + 1) * bytes), writable, 1, 1, name, {}};
  if (pitch > run) {
    range.run = static_cast<size_t>(run * bytes);
    range.pitch = static_cast<size_t>(pitch * bytes);
  }
  return range;
}

// f(pointer) for every element
template <class F>
void for_elements(const Tensor& tensor, F&& f) {
  const std::vector<Dimension> all = dimensions(tensor);
  const auto bytes = static_cast<int64_t>(tensor.element_size());
  std::vector<int64_t> index(all.size(), 0);
  auto* at = static_cast<char*>(tensor.data_ptr());
  for (int64_t i = 0; i < tensor.numel(); ++i) {
    f(at);
    for (size_t d = 0; d < all.size(); ++d) {
      at += all[d].stride * bytes;
      if (++index[d] < all[d].size) break;
      at -= all[d].stride * bytes * all[d].size;
      index[d] = 0;
    }
  }
}

// In every floating type a NaN that no arithmetic brings forth.
constexpr int kPoison = 0xff;

void poison(const Tensor& tensor) {
  const size_t bytes = tensor.element_size();
  for_elements(tensor, [=](char* element) { std::memset(element, kPoison, bytes); });
}

void check_written(const Tensor& tensor) {
  const size_t bytes = tensor.element_size();
  int64_t missing = 0, element = 0, first = -1;
  for_elements(tensor, [&](const char* at) {
    const bool poisoned = std::all_of(at, at + bytes, [](char c) { return c == static_cast<char>(kPoison); });
    if (poisoned && missing++ == 0) first = element;
    ++element;
  });
  if (missing) {
    throw std::runtime_error("fastconv emulator: never written: " + std::to_string(missing) + " of the " +
                             std::to_string(tensor.numel()) + " elements of an output " + describe(tensor) +
                             ", the first at position " + std::to_string(first) + " in memory");
  }
}

}  // namespace

struct Device::State {
  size_t ranges_before = global_ranges().size();
  int exceptions_before = std::uncaught_exceptions();
  std::vector<Tensor> outputs;
};

Device::Device(const Tensor&) : state_(std::make_unique<State>()) {}

Device::~Device() noexcept(false) {
  global_ranges().resize(state_->ranges_before);
  if (std::uncaught_exceptions() > state_->exceptions_before) return;
  for (const Tensor& output : state_->outputs) check_written(output);
}

DeviceInfo Device::info() const { return emulator::control().device; }

void* Device::pointer(const Tensor& tensor, Use use) {
  if (tensor.numel() == 0) return tensor.data_ptr();
  constexpr const char* kUses[] = {"input", "output", "scratch", "tensor"};
  const bool writable = use != Use::kIn;
  void* data = writable ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr());
  if (emulator::control().plans_only) return data;
  const std::string number = std::to_string(global_ranges().size() - state_->ranges_before);
  const std::string name = std::string("the ") + kUses[static_cast<int>(use)] + " " + describe(tensor) + " (number " +
                           number + " of this call)";
  if (use == Use::kOut || use == Use::kScratch) poison(tensor);
  if (use == Use::kOut) state_->outputs.push_back(tensor);
  global_ranges().push_back(range_of(tensor, data, writable, name));
  return data;
}

}  // namespace fastconv::cuda
