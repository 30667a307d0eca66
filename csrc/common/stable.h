// What fastconv uses of torch: the LibTorch stable ABI (2.10 and later) and nothing else, so that
// one build of the library serves many versions of torch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

// Why the thread's last call failed; torch has it from 2.13 on.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace fastconv {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using IntList = std::vector<int64_t>;

namespace detail {

template <class Result>
struct Unpack {
  static constexpr size_t kCount = 1;
  static Result from(const StableIValue* stack) { return torch::stable::detail::to<Result>(stack[0]); }
};

template <class... Results>
struct Unpack<std::tuple<Results...>> {
  static constexpr size_t kCount = sizeof...(Results);
  static std::tuple<Results...> from(const StableIValue* stack) {
    return from(stack, std::index_sequence_for<Results...>{});
  }
  template <size_t... I>
  static std::tuple<Results...> from(const StableIValue* stack, std::index_sequence<I...>) {
    return {torch::stable::detail::to<Results>(stack[I])...};
  }
};

}  // namespace detail

// Calls an operator of torch by name. Its schema must have no Scalar argument: the stable ABI
// cannot carry one.
template <class Result, class... Args>
Result call(const char* op, const char* overload, const Args&... args) {
  // Arguments go in and results come out in the same place.
  constexpr size_t kSlots = std::max(sizeof...(Args), detail::Unpack<Result>::kCount);
  std::array<StableIValue, kSlots> stack{torch::stable::detail::from(args)...};
  if (torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION) != 0) {
    const bool has_reason = &torch_exception_get_what_without_backtrace != nullptr;
    throw std::runtime_error(std::string("fastconv: ") + op +
                             " failed: " + (has_reason ? torch_exception_get_what_without_backtrace() : "see stderr"));
  }
  return detail::Unpack<Result>::from(stack.data());
}

// f(T{}) with the C++ type that belongs to `dtype`
template <class F>
void for_floating(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(torch::headeronly::BFloat16{});
    case ScalarType::Half:
      return f(torch::headeronly::Half{});
    default:
      STD_TORCH_CHECK(false, "fastconv: no kernel for dtype ", torch::headeronly::toString(dtype));
  }
}

// An entry of a list that is empty, or not there, when no entry is meant
inline std::optional<Tensor> entry(const std::vector<Tensor>& list, size_t i) {
  return list.empty() ? std::nullopt : std::optional(list[i]);
}
inline std::optional<Tensor> entry(const std::optional<std::vector<Tensor>>& list, size_t i) {
  return list ? entry(*list, i) : std::nullopt;
}

inline bool is_low_precision(ScalarType dtype) { return dtype == ScalarType::BFloat16 || dtype == ScalarType::Half; }

}  // namespace fastconv
