#include "cuda/runtime/kernel_table.h"

#include <algorithm>
#include <cstring>

#include "cuda/runtime/json.h"

namespace fastconv::cuda {
namespace {

struct Listed {
  const KernelInfo* kernel;
  bool is_chosen;
};

std::vector<Listed>& listed() {
  static auto& kernels = *new std::vector<Listed>;
  return kernels;
}

std::string as_json(const KernelInfo& kernel) {
  const auto number = [](const char* name, int value) {
    return ", \"" + std::string(name) + "\": " + std::to_string(value);
  };
  const std::string tile =
      std::to_string(kernel.tile[0]) + ", " + std::to_string(kernel.tile[1]) + ", " + std::to_string(kernel.tile[2]);
  return "{\"name\": " + quoted(kernel.name) + ", \"op\": " + quoted(kernel.op) + number("arch", kernel.arch.number) +
         ", \"only\": " + (kernel.arch.only ? "true" : "false") + ", \"tile\": [" + tile + "]" +
         number("stages", kernel.stages) + number("threads", kernel.threads) +
         number("shared_bytes", kernel.shared_bytes) + ", \"needs\": " + quoted(kernel.needs) +
         ", \"uses\": " + names_as_json(kernel.uses) + "}";
}

}  // namespace

void list_kernel(const KernelInfo& kernel, bool is_chosen) { listed().push_back({&kernel, is_chosen}); }

const KernelInfo* find_variant(const std::string& op, const std::string& name) {
  return variant_of_number(variant_number(op, name));
}

int variant_number(const std::string& op, const std::string& name) {
  const auto found = std::find_if(listed().begin(), listed().end(), [&](const Listed& one) {
    return one.is_chosen && op == one.kernel->op && name == one.kernel->name;
  });
  return found == listed().end() ? -1 : static_cast<int>(found - listed().begin());
}

const KernelInfo* variant_of_number(int number) {
  if (number < 0 || number >= static_cast<int>(listed().size()) || !listed()[number].is_chosen) return nullptr;
  return listed()[number].kernel;
}

std::vector<const KernelInfo*> kernel_table() {
  std::vector<const KernelInfo*> table;
  for (const Listed& one : listed()) table.push_back(one.kernel);
  std::stable_sort(table.begin(), table.end(),
                   [](const KernelInfo* a, const KernelInfo* b) { return std::strcmp(a->op, b->op) < 0; });
  return table;
}

}  // namespace fastconv::cuda

const char* fastconv_cuda_kernel_table() {
  using namespace fastconv::cuda;
  static const std::string json = [] {
    std::string text;
    for (const KernelInfo* kernel : kernel_table()) text += (text.empty() ? "" : ", ") + as_json(*kernel);
    return "[" + text + "]";
  }();
  return json.c_str();
}
