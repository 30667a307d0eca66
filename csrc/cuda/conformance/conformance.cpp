#include "cuda/conformance/conformance.h"

#include <exception>
#include <string>

#include "cuda/runtime/json.h"

namespace fastconv::cuda {
namespace {

std::vector<ConformanceCase>& cases() {
  static auto& all = *new std::vector<ConformanceCase>;
  return all;
}

std::string as_json(const ConformanceCase& one) {
  const auto boolean = [](bool value) { return value ? "true" : "false"; };
  return "{\"name\": " + quoted(one.name) + ", \"uses\": " + names_as_json(one.uses) +
         ", \"input\": " + quoted(one.input) + ", \"in_words\": " + std::to_string(one.in_words) +
         ", \"out_words\": " + std::to_string(one.out_words) + ", \"exact\": " + boolean(one.exact) +
         ", \"arch\": " + std::to_string(one.arch.number) + ", \"only\": " + boolean(one.arch.only) + "}";
}

}  // namespace

RegisterCases::RegisterCases(std::initializer_list<ConformanceCase> list) {
  cases().insert(cases().end(), list.begin(), list.end());
}

}  // namespace fastconv::cuda

const char* fastconv_cuda_conformance_cases() {
  using namespace fastconv::cuda;
  static const std::string json = [] {
    std::string text;
    for (const ConformanceCase& one : cases()) text += (text.empty() ? "" : ", ") + as_json(one);
    return "[" + text + "]";
  }();
  return json.c_str();
}

const char* fastconv_cuda_conformance_run(int index, const uint32_t* in, uint32_t* out, void* stream) {
  using namespace fastconv::cuda;
  thread_local std::string said;
  said.clear();
  try {
    const ConformanceCase& one = cases().at(static_cast<size_t>(index));
    one.run(one, in, out, stream);
  } catch (const std::exception& error) {
    said = error.what();
  }
  return said.c_str();
}
