#include "cuda/kernel_table.h"

#include <map>
#include <mutex>
#include <stdexcept>

namespace fastconv::cuda {

// One line here and one in kLists for each file of kernels/; the order is that of the table.
const std::vector<KernelInfo>& add_relu_kernels();
const std::vector<KernelInfo>& conv2d_kernels();
const std::vector<KernelInfo>& depthwise_conv2d_kernels();
const std::vector<KernelInfo>& depthwise_separable_conv2d_kernels();
const std::vector<KernelInfo>& local_response_norm_kernels();

namespace {

using List = const std::vector<KernelInfo>& (*)();
const std::vector<List> kLists = {add_relu_kernels, conv2d_kernels, depthwise_conv2d_kernels,
                                  depthwise_separable_conv2d_kernels, local_response_norm_kernels};

std::string quoted(const char* text) {
  std::string result = "\"";
  for (const char* c = text; *c; ++c) {
    if (*c == '"' || *c == '\\') result += '\\';
    result += *c;
  }
  return result + '"';
}

std::string as_json(const KernelInfo& kernel) {
  const auto number = [](const char* name, int value) {
    return ", \"" + std::string(name) + "\": " + std::to_string(value);
  };
  const std::string tile =
      std::to_string(kernel.tile[0]) + ", " + std::to_string(kernel.tile[1]) + ", " + std::to_string(kernel.tile[2]);
  return "{\"name\": " + quoted(kernel.name) + ", \"op\": " + quoted(kernel.op) + number("arch", kernel.arch) +
         ", \"tile\": [" + tile + "]" + number("stages", kernel.stages) + number("threads", kernel.threads) +
         number("shared_bytes", kernel.shared_bytes) + ", \"needs\": " + quoted(kernel.needs) + "}";
}

std::mutex forced_mutex;

std::map<std::string, const char*>& forced() {
  static auto& table = *new std::map<std::string, const char*>;
  return table;
}

}  // namespace

const std::vector<const KernelInfo*>& kernel_table() {
  static const std::vector<const KernelInfo*> table = [] {
    std::vector<const KernelInfo*> all;
    for (const List list : kLists) {
      for (const KernelInfo& kernel : list()) all.push_back(&kernel);
    }
    return all;
  }();
  return table;
}

const std::string& kernel_table_json() {
  static const std::string json = [] {
    std::string text;
    for (const KernelInfo* kernel : kernel_table()) text += (text.empty() ? "" : ", ") + as_json(*kernel);
    return "[" + text + "]";
  }();
  return json;
}

const char* forced_kernel(const char* op) {
  const std::lock_guard<std::mutex> lock(forced_mutex);
  const auto found = forced().find(op);
  return found == forced().end() ? nullptr : found->second;
}

const KernelInfo& find_kernel(const std::vector<KernelInfo>& kernels, const char* name) {
  for (const KernelInfo& kernel : kernels) {
    if (std::string(name) == kernel.name) return kernel;
  }
  throw std::runtime_error("fastconv: there is no CUDA kernel " + std::string(name));
}

}  // namespace fastconv::cuda

const char* fastconv_cuda_kernel_table() { return fastconv::cuda::kernel_table_json().c_str(); }

int fastconv_cuda_force_kernel(const char* op, const char* name) {
  using namespace fastconv::cuda;
  const char* known = nullptr;
  for (const KernelInfo* kernel : kernel_table()) {
    if (name && std::string(op) == kernel->op && std::string(name) == kernel->name) known = kernel->name;
  }
  if (name && !known) return 1;
  const std::lock_guard<std::mutex> lock(forced_mutex);
  if (known) {
    forced()[op] = known;
  } else {
    forced().erase(op);
  }
  return 0;
}
