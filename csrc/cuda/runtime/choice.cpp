#include "cuda/runtime/choice.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <charconv>
#include <climits>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cuda/runtime/json.h"

namespace fastconv::cuda {
namespace {

// Of every block's shared memory the system keeps a part.
constexpr int64_t kReservedShared = 1024;

std::mutex mutex;
std::atomic<int> forced_count = 0;
std::atomic<bool> recording = false;

std::map<std::string, const char*>& forced() {
  static auto& table = *new std::map<std::string, const char*>;
  return table;
}

// The kernels that no call may run. Those that a call may still look through are kept.
std::atomic<const std::vector<const KernelInfo*>*> disabled_now = nullptr;

std::string& recorded() {
  static auto& text = *new std::string;
  return text;
}

// What a thread prefers, the innermost last; a null begins what one call added.
std::vector<const KernelInfo*>& preferred() {
  thread_local std::vector<const KernelInfo*> kernels;
  return kernels;
}

// Not by std::to_string, which writes what the locale says.
std::string as_json(double value) {
  std::array<char, 32> text{};
  return {text.data(), std::to_chars(text.begin(), text.end(), value).ptr};
}

}  // namespace

int64_t resident_blocks(const LaunchShape& shape, int most, const DeviceInfo& device) {
  const auto& [grid, block, shared, cluster] = shape;
  const int64_t threads = std::max<int64_t>(int64_t{block.x} * block.y * block.z, 1);
  const int64_t by_threads = device.threads_per_multiprocessor / threads;
  const int64_t by_shared = shared > 0 ? device.shared_per_multiprocessor / (shared + kReservedShared) : INT_MAX;
  return std::max<int64_t>(std::min({int64_t{most}, by_threads, by_shared}), 1);
}

Outlook outlook(const Cost& cost, const DeviceInfo& device) {
  const Extent& grid = cost.shape.grid;
  const int64_t blocks = std::max<int64_t>(int64_t{grid.x} * grid.y * grid.z, 1);
  const int64_t resident = resident_blocks(cost.shape, cost.resident, device);
  // Blocks on one multiprocessor share it: a launch takes as long as the multiprocessor that gets the most of them.
  const int64_t most = ceil_div(blocks, device.multiprocessors);
  const double waves = static_cast<double>(blocks) / static_cast<double>(most * device.multiprocessors);
  const double occupancy = static_cast<double>(resident) / cost.resident;
  const double score = cost.objection ? 0 : cost.rate * cost.fill * cost.rest * waves * occupancy;
  return {blocks, static_cast<int>(resident), waves, score};
}

ChoiceRecord::ChoiceRecord(const char* op, const DeviceInfo& device)
    : listening_(recording), op_(op), device_(device) {}

ChoiceRecord::~ChoiceRecord() {
  if (!listening_) return;
  const std::string text = "{\"op\": " + quoted(op_) + ", \"arch\": " + std::to_string(device_.arch) +
                           ", \"multiprocessors\": " + std::to_string(device_.multiprocessors) +
                           ", \"chosen\": " + quoted(chosen_ ? chosen_->name : "") + ", \"candidates\": [" +
                           candidates_ + "]}";
  const std::lock_guard<std::mutex> lock(mutex);
  recorded() += (recorded().empty() ? "" : ", ") + text;
}

void ChoiceRecord::refuse(const KernelInfo& kernel, const char* reason) {
  if (listening_) note(kernel, reason, "");
}

void ChoiceRecord::consider(const KernelInfo& kernel, const Cost& cost, const Outlook& outlook) {
  if (!listening_) return;
  note(kernel, cost.objection ? cost.objection : "",
       ", \"score\": " + as_json(outlook.score) + ", \"blocks\": " + std::to_string(outlook.blocks) +
           ", \"resident\": " + std::to_string(outlook.resident) + ", \"fill\": " + as_json(cost.fill) +
           ", \"waves\": " + as_json(outlook.waves) + ", \"splits\": " + std::to_string(cost.splits) +
           ", \"unproven\": " + (cost.unproven ? "true" : "false"));
}

void ChoiceRecord::note(const KernelInfo& kernel, const char* reason, const std::string& numbers) {
  candidates_ += candidates_.empty() ? "{" : ", {";
  candidates_ += "\"kernel\": " + quoted(kernel.name) + ", \"reason\": " + quoted(reason) + numbers + "}";
}

const char* forced_kernel(const char* op) {
  if (forced_count == 0) return nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = forced().find(op);
  return found == forced().end() ? nullptr : found->second;
}

const KernelInfo* preferred_kernel(const char* op) {
  const auto& kernels = preferred();
  for (auto kernel = kernels.rbegin(); kernel != kernels.rend(); ++kernel) {
    if (*kernel && std::strcmp((*kernel)->op, op) == 0) return *kernel;
  }
  return nullptr;
}

const char* disabled(const KernelInfo& kernel) {
  const auto* const all = disabled_now.load();
  const bool is_one = all && std::find(all->begin(), all->end(), &kernel) != all->end();
  return is_one ? "disabled: its instruction differs on this GPU" : nullptr;
}

void refuse_forced(const KernelInfo& kernel, const char* refusal) {
  const bool may_run = *kernel.needs && !disabled(kernel);
  const std::string needs = may_run ? std::string("needs ") + kernel.needs : "cannot run this call";
  throw std::runtime_error("fastconv: kernel " + kernel.name + " was forced, but " + needs + " (" + refusal + ")");
}

void refuse_call(const char* op) {
  const auto kernels = kernel_table();
  const auto count = std::count_if(kernels.begin(), kernels.end(), [op](const KernelInfo* kernel) {
    return std::strcmp(kernel->op, op) == 0 && disabled(*kernel);
  });
  const std::string why =
      count ? ": " + std::to_string(count) + " of them are disabled, an instruction differs on this GPU" : "";
  throw std::runtime_error(std::string("fastconv: ") + op + " has no CUDA kernel for this call" + why);
}

}  // namespace fastconv::cuda

int fastconv_cuda_force_kernel(const char* op, const char* name) {
  using namespace fastconv::cuda;
  const KernelInfo* known = name ? find_variant(op, name) : nullptr;
  if (name && !known) return 1;
  const std::lock_guard<std::mutex> lock(mutex);
  if (known) {
    forced()[op] = known->name.c_str();
  } else {
    forced().erase(op);
  }
  forced_count = static_cast<int>(forced().size());
  return 0;
}

int fastconv_cuda_find_kernel(const char* op, const char* name) { return fastconv::cuda::variant_number(op, name); }

void fastconv_cuda_prefer_kernels(const int* kernels, int count) {
  using namespace fastconv::cuda;
  preferred().push_back(nullptr);
  for (int i = 0; i < count; ++i) {
    if (const KernelInfo* kernel = variant_of_number(kernels[i])) preferred().push_back(kernel);
  }
}

void fastconv_cuda_end_preference() {
  using namespace fastconv::cuda;
  while (!preferred().empty()) {
    const KernelInfo* last = preferred().back();
    preferred().pop_back();
    if (!last) return;
  }
}

void fastconv_cuda_disable_kernels(const char* const* names, int count) {
  using namespace fastconv::cuda;
  static auto& kept = *new std::deque<std::vector<const KernelInfo*>>;
  std::vector<const KernelInfo*> found;
  for (const KernelInfo* kernel : kernel_table()) {
    if (std::find(names, names + count, kernel->name) != names + count) found.push_back(kernel);
  }
  const std::lock_guard<std::mutex> lock(mutex);
  const auto* const now = disabled_now.load();
  if (found == (now ? *now : std::vector<const KernelInfo*>{})) return;
  disabled_now = &kept.emplace_back(std::move(found));
}

void fastconv_cuda_record_choices(int on) {
  using namespace fastconv::cuda;
  const std::lock_guard<std::mutex> lock(mutex);
  recording = on != 0;
  recorded().clear();
}

const char* fastconv_cuda_take_choices() {
  using namespace fastconv::cuda;
  thread_local std::string taken;
  const std::lock_guard<std::mutex> lock(mutex);
  taken = "[" + recorded() + "]";
  recorded().clear();
  return taken.c_str();
}
